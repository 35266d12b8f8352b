"""Pipelines that are made once."""

import pytest

from tests.training import samples


@pytest.fixture(scope="session")
def sd(tmp_path_factory):
    return samples.save_pipeline(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory):
    return samples.save_pipeline(tmp_path_factory.mktemp("sdxl"), xl=True)
