# SPDX-License-Identifier: Apache-2.0
"""Run a benchmark: ``python -m benchmarks.run ops --device cpu --json FILE``.

A benchmark is a module of this folder with a function ``rows(device, quick, only)`` that yields
``common.Row``, and perhaps ``picture(rows, path)``, which draws them beside the JSON. It checks
that its contenders agree before it times them, and stops if they do not.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from benchmarks import common

BENCHMARKS = ("align", "attention", "levers", "loop", "ops", "shipped", "solvers", "train")


def line(row: common.Row) -> str:
    """Return a row as a line of text: ratios, and a mark where a target is missed."""
    parts = []
    for name, value in row.ratios.items():
        missed = value < row.target.get(name, 0.0)
        parts.append(f"{name} {value:6.2f}" + (f" < {row.target[name]:g}" if missed else ""))
    ratios = "  ".join(parts)
    mark = {True: "met ", False: "MISS", None: "    "}[row.met]
    return f"{mark} {row.case:44} {row.ours:12.4g} {row.unit}  {ratios}"


def main() -> None:
    """Parse the arguments, run the benchmark, print it, and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    parser.add_argument("--quick", action="store_true", help="few rounds: does it run at all")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these cases")
    options = parser.parse_args()
    module = importlib.import_module(f"benchmarks.{options.benchmark}")
    rows = []
    for row in module.rows(options.device, options.quick, options.only):
        print(line(row), flush=True)
        rows.append(row)
        if options.json is not None:
            # After each row: a run that is cut short keeps what it has.
            common.write(options.json, options.device, rows)
    missed = [row.case for row in rows if row.met is False]
    judged = sum(row.met is not None for row in rows)
    print(f"{judged - len(missed)} of {judged} targets met on {common.machine(options.device)}")
    if options.json is not None:
        if hasattr(module, "picture"):
            module.picture(rows, options.json.with_suffix(".png"))
        print(f"written to {options.json}", file=sys.stderr)


if __name__ == "__main__":
    main()
