# SPDX-License-Identifier: Apache-2.0
"""What every benchmark shares: where it ran, how it timed, and the one shape of its results.

A result file is ``{machine, versions, commit, rows}``. A row is one case: ``ours`` and ``rivals``
in ``unit``, ``ratios`` (above 1 is in our favour), and ``target``, the ratios that must be reached.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch


@dataclass
class Row:
    """One case of a benchmark."""

    case: str
    metric: str
    unit: str
    ours: float
    rivals: dict[str, float]
    ratios: dict[str, float]
    target: dict[str, float] = field(default_factory=dict)
    met: bool | None = None
    values: dict[str, float] = field(default_factory=dict)
    """More numbers of the case, as an interval or the memory."""

    def __post_init__(self) -> None:
        if self.target and self.met is None:
            self.met = all(self.ratios[name] >= bound for name, bound in self.target.items())


def machine(device: str) -> dict[str, Any]:
    """Describe the hardware that the figures belong to."""
    described: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 1) for load in os.getloadavg()],
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        described["gpu"] = properties.name
        described["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
    return described


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def versions() -> dict[str, Any]:
    """Return the versions of everything that the figures depend on."""
    from inpo_fast import __version__, ops

    found: dict[str, Any] = {
        "inpo_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "native": ops.build_info(),
    }
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
        # a line for each GPU
        driver = _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["driver"] = driver.partition("\n")[0]
    if "triton" in sys.modules:
        found["triton"] = sys.modules["triton"].__version__
    return found


def commit() -> str:
    """Return the commit of the code, marked if the tree differs from it."""
    head = _command("git", "rev-parse", "HEAD")
    dirty = _command("git", "status", "--porcelain", "--", "inpo_fast/ops", "csrc", "setup.py")
    return f"{head}-dirty" if head and dirty else head


def _command(*words: str) -> str:
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, cwd=Path(__file__).parent, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def write(path: Path, device: str, rows: list[Row]) -> None:
    """Write a result file, to a temporary name first."""
    result = {
        "machine": machine(device),
        "versions": versions(),
        "commit": commit(),
        "rows": [asdict(row) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)


def keep_freed_memory() -> None:
    """Let malloc keep what is freed, so that a result goes into memory that was used before.

    That is the state of a run of many steps. Without it the first touch of 64 MiB of new pages
    takes longer than any of the operators, for everyone alike.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # of glibc
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def captured(function: Callable[[], object]) -> Callable[[], object]:
    """Record a function as a CUDA graph: what it takes the GPU, without the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def seconds_of_call(function: Callable[[], object], calls: int, device: str) -> float:
    """Return seconds for one of so many calls in a row."""
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else (lambda: None)
    synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize()
    return (time.perf_counter() - begin) / calls


Times = dict[str, list[float]]


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    *,
    device: str,
    rounds: int,
    seconds: float = 0.02,
) -> Times:
    """Time the contenders in turn, and return seconds for one call, one entry for each round.

    In each round everyone makes as many calls as take about ``seconds``, so that a machine that
    slows down or is shared slows down everyone. Who takes more than half a second for one call is
    timed in the first three rounds only.
    """
    calls, slow = {}, set()
    for name, function in contenders.items():
        seconds_of_call(function, 1, device)
        once = seconds_of_call(function, 1, device)
        calls[name] = max(1, min(10_000, int(seconds / max(once, 1e-9))))
        if once > 0.5:
            slow.add(name)
    times: Times = {name: [] for name in contenders}
    for i in range(rounds):
        for name, function in contenders.items():
            if i < 3 or name not in slow:
                times[name].append(seconds_of_call(function, calls[name], device))
    return times


def median_us(samples: list[float]) -> float:
    """Return the median in microseconds."""
    return statistics.median(samples) * 1e6


def speedup(times: Times, rival: str, ours: str) -> float:
    """Return how many times longer the rival takes: the median over rounds of the ratio in each."""
    pairs = zip(times[rival], times[ours], strict=False)  # a slow rival has fewer rounds
    return statistics.median(their_time / our_time for their_time, our_time in pairs)
