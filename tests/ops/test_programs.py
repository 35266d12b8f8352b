"""Random lattice programs return to their exact starting bits: 2,000 in each run of the suite.

``python -m tests.ops.soak --programs 100000`` runs more of them.
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.ops import cases, programs

PROGRAMS = 2000
PARTS = 8  # tests, so that workers share them


@st.composite
def specs(draw):
    shape = tuple(draw(st.lists(st.sampled_from(programs.SIZES), min_size=1, max_size=4)))
    there, back = draw(st.sampled_from(programs.runs_on("cpu")))
    return programs.Spec(
        seed=draw(st.integers(0, 2**31 - 1)),
        shape=shape,
        layout=draw(st.sampled_from(list(cases.LAYOUTS))) if len(shape) == 4 else "contiguous",
        dtype=draw(st.sampled_from(list(programs.DTYPES))),
        guidance=draw(st.booleans()),
        by_sample=draw(st.booleans()),
        scaled=draw(st.booleans()),
        # Short programs more often than long ones.
        updates=int(2 ** draw(st.floats(0, math.log2(200.5)))),
        frac_bits=draw(st.integers(8, 28)),
        inverse_first=draw(st.booleans()),
        in_place=draw(st.booleans()),
        there=there,
        back=back,
    )


@pytest.mark.parametrize("part", range(PARTS))
def test_bits_return(part):
    @settings(
        max_examples=PROGRAMS // PARTS, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(specs())
    def run(spec):
        programs.check(spec)

    # The memory of test_native_equals_reference.py is poisoned; here that would cost minutes.
    torch.use_deterministic_algorithms(False)
    run()
