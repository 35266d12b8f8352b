"""Fixtures of the tests that need a GPU; without one they are skipped."""

import contextlib

import pytest
import torch

from inpo_fast.ops.choice import resolve

# helpers whose assertions are to show their values, as those of tests do
pytest.register_assert_rewrite("tests.gpu.trainings", "tests.training.two_processes")


def _problem(name):
    try:
        resolve(name, torch.device("cuda", torch.cuda.current_device()))
    except ValueError as error:
        return str(error)
    return None


@pytest.fixture
def cuda():
    """The device; skips without one."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return "cuda"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A pipeline folder with a UNet that trains in a moment; for tests of the trainer."""
    from tests.gpu.trainings import BLOCKS, save_model

    return save_model(tmp_path_factory.mktemp("model"), **BLOCKS)


@pytest.fixture
def unmeasured(cuda, monkeypatch):
    """Trainings count no FLOPs and measure no peak."""
    from tests.gpu.trainings import without_measuring

    without_measuring(monkeypatch)


@pytest.fixture(params=["native", "triton", "reference"])
def impl(request, cuda):
    """Every backend that runs on the GPU."""
    problem = _problem(request.param)
    if problem is not None:
        pytest.skip(problem)
    return request.param


@pytest.fixture(params=["native", "triton"])
def kernels(request, cuda):
    """The backends with kernels for the GPU."""
    problem = _problem(request.param)
    if problem is not None:
        pytest.skip(problem)
    return request.param


@pytest.fixture
def no_sync(cuda):
    """A context in which an operation that waits for the device raises."""

    @contextlib.contextmanager
    def context():
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return context
