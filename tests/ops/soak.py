"""Run many random lattice programs: ``python -m tests.ops.soak --programs 100000``."""

import argparse
import multiprocessing
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

from inpo_fast import ops
from tests.ops import programs


def _run(seed: int) -> tuple[int, int, str]:
    """Return the updates and elements of the program of this seed, and what went wrong."""
    torch.set_num_threads(1)
    native = ops.backends()["native"].available
    runs = programs.RUNS if native else [("reference", "reference")]
    spec = programs.random_spec(np.random.default_rng(seed), runs)
    try:
        programs.check(spec)
    except AssertionError as error:
        return spec.updates, 0, f"{error}: {spec}"
    return spec.updates, int(np.prod(spec.shape)), ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first program")
    parser.add_argument("--processes", type=int, default=None)
    options = parser.parse_args()
    seeds = range(options.seed, options.seed + options.programs)
    begin, updates, failures = time.monotonic(), 0, []
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for done, _, failure in tqdm(pool.imap_unordered(_run, seeds, 64), total=len(seeds)):
            updates += done
            if failure:
                failures.append(failure)
                print(failure, file=sys.stderr)
    seconds = time.monotonic() - begin
    print(
        f"{options.programs} programs, {updates} updates there and back, seeds {seeds.start} to"
        f" {seeds.stop - 1}: {len(failures)} failures in {seconds:.0f} s"
    )
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
