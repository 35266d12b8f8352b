"""Run many random lattice programs: ``python -m tests.ops.soak --programs 100000``.

``--device cuda --programs 10000`` runs them on a GPU, over all pairs of its backends.
"""

import argparse
import dataclasses
import functools
import multiprocessing
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

from tests.ops import programs

# Updates of a program on a GPU, where each takes many launches.
MAX_GPU_UPDATES = 50


def _run(device: str, seed: int) -> tuple[int, str]:
    """Return the updates of the program of this seed, and what went wrong."""
    torch.set_num_threads(1)
    spec = programs.random_spec(np.random.default_rng(seed), _runs(device))
    if device != "cpu":
        spec = dataclasses.replace(spec, updates=min(spec.updates, MAX_GPU_UPDATES))
    try:
        programs.check(spec, device)
    except AssertionError as error:
        return spec.updates, f"{error}: {spec}"
    return spec.updates, ""


_runs = functools.cache(programs.runs_on)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first program")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--processes", type=int, default=None, help="default: all cores, 8 on cuda")
    options = parser.parse_args()
    processes = options.processes
    if options.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device cuda needs a GPU, and torch sees none")
        processes = processes or 8
    run = functools.partial(_run, options.device)
    seeds = range(options.seed, options.seed + options.programs)
    begin, updates, failures = time.monotonic(), 0, []
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for done, failure in tqdm(pool.imap_unordered(run, seeds, 64), total=len(seeds)):
            updates += done
            if failure:
                failures.append(failure)
                print(failure, file=sys.stderr)
    seconds = time.monotonic() - begin
    pairs = ", ".join(sorted({" and ".join(pair) for pair in _runs(options.device)}))
    print(
        f"{options.programs} programs on {options.device} ({pairs}), {updates} updates there and"
        f" back, seeds {seeds.start} to {seeds.stop - 1}: {len(failures)} failures in"
        f" {seconds:.0f} s"
    )
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
