"""Every operator once in many ways, to be watched by compute-sanitizer (``make sanitize``).

Results are compared with the reference on the CPU, so no other GPU kernel runs beside those under
test. Each tensor is an allocation of its own, so that an access beside it is seen.
"""

import argparse
import itertools
import os
from functools import partial

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch

from inpo_fast.ops.registration import KERNELS, REFERENCE
from tests.ops import cases, equality
from tests.ops.equality import BF16, DTYPES, F16, F32


def calls():
    """Calls of all operators, dtypes, numbers of outputs and ways of access, interleaved."""
    layouts = (cases.contiguous, cases.sliced, cases.channels_last)
    either = (False, True)
    updates = (
        *(partial(equality.affine, dtype) for dtype in DTYPES),
        *(partial(equality.lattice, dtype) for dtype in (F32, F16, BF16)),
    )
    others = (
        *(partial(equality.encode_and_decode, dtype) for dtype in DTYPES),
        *(partial(equality.preference_backward, dtype) for dtype in DTYPES),
    )
    sources = [
        *(make(layout, inverse) for make in updates for layout in layouts for inverse in either),
        *(make(layout) for make in others for layout in layouts),
    ]
    for round_ in itertools.zip_longest(*sources):
        yield from (call for call in round_ if call is not None)


def errors(kernels):
    """The reduction, at sizes with one and with many blocks for a sample."""
    rng = cases.generator(7)
    for dtype in DTYPES:
        for shape in [(2, 3, 5, 7), (130, 4, 8, 8), (1, 4, 64, 65), (3, 1, 1, 1)]:
            theta, ref, target = (cases.floats(shape, dtype, rng) for _ in range(3))
            for other in (ref, None):
                got = kernels["preference_errors"](
                    theta.cuda(), None if other is None else other.cuda(), target.cuda()
                )
                expected = REFERENCE["preference_errors"](theta, other, target)
                for one, two in zip(got, expected, strict=True):
                    torch.testing.assert_close(one.cpu(), two, rtol=1e-6, atol=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--impl", nargs="+", default=["native", "triton"])
    parser.add_argument("--stride", type=int, default=12, help="take every so-manieth call")
    options = parser.parse_args()
    for impl in options.impl:
        taken = list(itertools.islice(calls(), 0, None, options.stride))
        for call in taken:
            equality.assert_same(call, (KERNELS[impl], "cuda"))
        errors(KERNELS[impl])
        print(f"{impl}: {len(taken)} calls agree with the reference", flush=True)


if __name__ == "__main__":
    main()
