"""What the inverse schedulers share."""

from __future__ import annotations

from torch import Tensor

from .run import Plan
from .scheduling_reversible import ReversibleScheduler


class InverseScheduler(ReversibleScheduler):
    """Base of the inverses: data to noise, with the same interface.

    `timesteps` holds the timestep of every model call, in the order of the calls. Unlike
    `DDIMInverseScheduler`, a two-step solver is called at the noise level where the sample stands,
    so its list begins with the clean end, t = 0, and ends one short of the noisiest timestep.
    """

    direction = "invert"

    @property
    def _clean_end_is_mute(self) -> bool:
        """Whether the model's output at node 0 says nothing about the noise, so that the first call
        is at the timestep of node 1."""
        return self.config.prediction_type == "sample" and float(self.final_alpha_cumprod) == 1

    def _call_times(self, grid: list[int]) -> list[int]:
        return [grid[0] if self._clean_end_is_mute else 0, *grid[:-1]]

    def _make_plan(self, index: int | None, timestep: int) -> Plan:
        remaining = [t for t in self._grid if index == 0 or t > timestep]
        if not remaining:
            raise ValueError(
                f"timestep must be below the noisiest one, {self._grid[-1]}, got {timestep}"
            )
        if index == 0:
            schedule = self._schedule(remaining, clean=True)
        else:
            schedule = self._schedule([timestep, *remaining], clean=False)
        return Plan(schedule, self._solver(schedule))

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """What the model is called on: the sample, except in the first call with sample prediction
        from clean data, which is at the next timestep and needs z at the level of that one."""
        if self.num_inference_steps is None or timestep is None or not self._clean_end_is_mute:
            return sample
        index, value, run = self._locate(timestep)
        if run is not None or index != 0:
            return sample
        program = self._plan(index, value).program
        scale = program.start[program.input]
        assert scale is not None
        return sample * (program.updates[0].model_scale / scale)
