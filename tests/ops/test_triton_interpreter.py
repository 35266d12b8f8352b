"""Runs interpreted.py, in parts that workers share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).with_name("interpreted.py")
PARTS = {
    "kernels": "test_kernels",
    "programs": "test_bits_return or test_one_compilation",
    "the rest": "not test_kernels and not test_bits_return and not test_one_compilation",
}


@pytest.mark.parametrize("part", PARTS)
def test_interpreted(part):
    pytest.importorskip("triton")
    environment = {key: v for key, v in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(TESTS), "-k", PARTS[part]],
        cwd=TESTS.parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
