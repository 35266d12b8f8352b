import pytest

pytest.importorskip("diffusers")

from tests.pipelines import tiny

_pipes = {}


@pytest.fixture
def pipe_of():
    """A family's pipeline by name, made once: nothing that is tested may change it."""

    def build(name):
        if name not in _pipes:
            _pipes[name] = tiny.build(name)
        return _pipes[name]

    return build


@pytest.fixture
def pipe(pipe_of):
    return pipe_of("sd")
