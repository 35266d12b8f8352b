"""Hypothesis strategies: every schedule and every reversible program that the library can make."""

from __future__ import annotations

import numpy as np
from hypothesis import reject
from hypothesis import strategies as st

from inpo_fast.schedule import NoiseSchedule, scaled_linear_alphas_cumprod
from inpo_fast.solvers import bdia, edict, mccallum_foster, obelm


def zero_snr(table: np.ndarray) -> np.ndarray:
    """The table rescaled to end at ᾱ = 0 (Lin et al. 2023, algorithm 1)."""
    root = np.sqrt(table)
    rescaled = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    rescaled[-1] = 0
    return rescaled


# as a diffusers scheduler gives them: float32 values in float64
SCALED_LINEAR = scaled_linear_alphas_cumprod().astype(np.float32).astype(np.float64)
LINEAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)).astype(np.float32).astype(np.float64)
ZERO_SNR = zero_snr(SCALED_LINEAR)

# mostly short, so that the long ones, which must be there, stay affordable
steps = st.one_of(
    st.integers(1, 60),
    st.sampled_from([1, 2, 3, 50, 100]),
    st.integers(1, 60),
    st.sampled_from([999, 1000]) | st.integers(1, 1000),
)


@st.composite
def table_schedules(draw) -> NoiseSchedule:
    table, types = draw(
        st.sampled_from(
            [
                (SCALED_LINEAR, ("epsilon", "v_prediction", "sample", "flow")),
                (LINEAR, ("epsilon", "v_prediction", "sample", "flow")),
                # ε says nothing about x where α = 0
                (ZERO_SNR, ("v_prediction", "sample", "flow")),
            ]
        )
    )
    options = {
        "final_alpha_cumprod": draw(st.sampled_from([1.0, table[0]])),
        "prediction_type": draw(st.sampled_from(types)),
    }
    if draw(st.integers(0, 4)) == 0:
        grid = draw(st.sets(st.integers(0, 999), min_size=1, max_size=40))
        return NoiseSchedule.from_alphas_cumprod(
            table, timesteps=sorted(grid, reverse=True), **options
        )
    return NoiseSchedule.from_alphas_cumprod(
        table,
        draw(steps),
        spacing=draw(st.sampled_from(["leading", "trailing", "linspace"])),
        steps_offset=draw(st.sampled_from([0, 1])),
        **options,
    )


flow_schedules = st.builds(NoiseSchedule.flow, st.integers(1, 100), shift=st.floats(0.25, 8))
edm_schedules = st.builds(
    NoiseSchedule.edm, st.integers(1, 60), rho=st.floats(1, 10), sigma_data=st.floats(0.2, 2)
)
schedules = st.one_of(
    table_schedules(), table_schedules(), table_schedules(), flow_schedules, edm_schedules
)


integrators = st.sampled_from(["ddim", "ddim", "heun", "dpm++2s"])


@st.composite
def reversible_programs(draw) -> tuple[NoiseSchedule, object]:
    schedule = draw(schedules)
    direction = draw(st.sampled_from(["sample", "invert"]))
    match draw(st.sampled_from(["bdia", "bdia", "mccallum_foster", "edict", "obelm"])):
        case "bdia":
            gamma = draw(st.sampled_from([1, 0.94, 15 / 16, 0.5]) | st.floats(0.05, 1))
            integrator = draw(integrators)
            return schedule, bdia(schedule, gamma=gamma, integrator=integrator, direction=direction)
        case "mccallum_foster":
            zeta = draw(st.sampled_from([1, 0.999, 0.9]) | st.floats(0.5, 1))
            integrator = draw(integrators)
            return schedule, mccallum_foster(
                schedule, zeta=zeta, integrator=integrator, direction=direction
            )
        case "edict":
            p = draw(st.sampled_from([1, 0.93]) | st.floats(0.51, 1))
            return schedule, edict(schedule, p=p, direction=direction)
        case "obelm":
            try:
                return schedule, obelm(schedule, direction=direction)
            except ValueError as error:
                # explicit timesteps may ask for an a out of range
                assert "O-BELM needs a" in str(error)
                reject()
