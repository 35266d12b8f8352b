"""Pipelines that are made once."""

import pytest

from tests.training import samples


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Also where there is a GPU, on which tests/gpu trains: much here is compared to the bit with
    computations on the CPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="session")
def sd(tmp_path_factory):
    return samples.save_pipeline(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory):
    return samples.save_pipeline(tmp_path_factory.mktemp("sdxl"), xl=True)
