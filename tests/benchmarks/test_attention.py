"""The benchmark of attention, in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_it_runs():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "benchmarks.run", "attention", "--quick"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "quick, forward and backward" in done.stdout
    assert "quick, text, tiles of_queries" in done.stdout
