"""Settings are there for the time of a run, whoever else runs."""

import contextlib
import os

import pytest
import torch
import torch._inductor.config

from inpo_fast import determinism
from inpo_fast.determinism import (
    deterministic_gradients,
    reproducible,
    reproducible_training,
)


def settings():
    return {
        "benchmark": torch.backends.cudnn.benchmark,
        "deterministic": torch.backends.cudnn.deterministic,
        "inductor": torch._inductor.config.deterministic,
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


@pytest.fixture(params=["default", "strict", "inductor"])
def before(request, monkeypatch):
    """What the user has set."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    if request.param == "strict":
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
        torch.use_deterministic_algorithms(True)
    elif request.param == "inductor":
        torch._inductor.config.deterministic = True
    yield settings()
    torch.use_deterministic_algorithms(False)


def test_a_training_has_its_settings_and_leaves_no_trace(before):
    with pytest.raises(KeyError), reproducible_training():
        inside = settings()
        raise KeyError
    assert settings() == before
    assert inside["deterministic"] and not inside["benchmark"] and inside["inductor"]
    assert inside["workspace"] == (before["workspace"] or ":4096:8")
    # of gradients only
    assert inside["algorithms"] is before["algorithms"]


def test_gradients_are_deterministic_and_leave_no_trace(before):
    """Warnings alone would let attention use an algorithm that repeats no bits."""
    with pytest.raises(KeyError), deterministic_gradients():
        inside = settings()
        raise KeyError
    assert settings() == before
    assert inside["algorithms"] and not inside["warn_only"] and not inside["fill"]


def test_where_cublas_was_used_before_attention_alone_is_kept_from_cudnn(before, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(determinism, "_products_may_run", lambda: False)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    with deterministic_gradients():
        inside = settings()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert inside["algorithms"] and inside["warn_only"]
    assert settings() == before
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_runs_within_runs_restore_once(before):
    with reproducible():
        with reproducible_training(), deterministic_gradients():
            pass
        assert torch.backends.cudnn.deterministic and torch._inductor.config.deterministic
        assert settings()["algorithms"] is before["algorithms"]
    assert settings() == before


def test_trainings_at_the_same_time_restore_when_the_last_one_ends(before):
    """As in two threads, whose ends need not be nested."""

    @contextlib.contextmanager
    def training():
        with reproducible_training(), deterministic_gradients():
            yield

    first, second = training(), training()
    with first:
        inside = settings()
        second.__enter__()
    assert settings() == inside
    second.__exit__(None, None, None)
    assert settings() == before
    with training():
        assert settings() == inside
    assert settings() == before
