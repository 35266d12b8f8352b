"""What this installation consists of: `inpo-fast env`."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from inpo_fast import ops
from inpo_fast._version import __version__

PACKAGES = (
    "torch",
    "numpy",
    "triton",
    "diffusers",
    "transformers",
    "accelerate",
    "datasets",
    "peft",
)


def versions() -> dict[str, str | None]:
    """Versions of inpo_fast, Python and the packages it can work with; None where one is missing.

    Nothing is imported to find out.
    """
    found: dict[str, str | None] = {
        "inpo_fast": __version__,
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def machine() -> dict[str, Any]:
    """Platform, CPU and GPUs."""
    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpus.append(
                {
                    "name": properties.name,
                    "capability": f"{properties.major}.{properties.minor}",
                    "memory_gib": round(properties.total_memory / 2**30, 1),
                }
            )
    return {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        # macOS and Windows do not tell which cores a process may use
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda,
        "gpus": gpus,
    }


def available_device(name: str) -> str:
    """The name of a device of this torch.

    Raises:
        ValueError: it has no such device.
    """
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} is not available: {reason}") from error
    return name


def collect() -> dict[str, Any]:
    """All that `inpo-fast env` prints."""
    return {
        "versions": versions(),
        "machine": machine(),
        "backends": {
            name: {"available": available, "reason": reason}
            for name, (available, reason) in ops.backends().items()
        },
        "native_build": ops.build_info(),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON for a bug report or script")


def run(arguments: argparse.Namespace) -> int:
    found = collect()
    print(json.dumps(found, indent=2) if arguments.json else _as_text(found))
    return 0


def _cpu_name() -> str:
    # Linux leaves platform.processor() empty or generic.
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _as_text(found: dict[str, Any]) -> str:
    machine = found["machine"]
    gpus = [
        f"{gpu['name']}, {gpu['memory_gib']} GiB, capability {gpu['capability']}"
        for gpu in machine["gpus"]
    ]
    sections = {
        "versions": {
            name: version or "not installed" for name, version in found["versions"].items()
        },
        "machine": {
            "platform": machine["platform"],
            "cpu": f"{machine['cpu']}, {machine['cores']} cores, {machine['cpu_capability']}",
            "cuda": machine["cuda"] or "torch is built without it",
            "gpus": "; ".join(gpus) or "none",
        },
        "backends": {
            name: f"{'available' if state['available'] else 'missing'}: {state['reason']}"
            for name, state in found["backends"].items()
        },
        "native build": found["native_build"] or {"none": "pure Python"},
    }
    lines = []
    for title, rows in sections.items():
        lines.append(title)
        for name, value in rows.items():
            text = ", ".join(value) or "none" if isinstance(value, list) else value
            lines.append(f"  {name:<21}{text}")
    return "\n".join(lines)
