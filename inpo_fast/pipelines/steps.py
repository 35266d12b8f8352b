"""What happens around the steps of a run: progress bar, `callback_on_step_end`, interruption."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..sampler import Sampler, State
from ..solvers import Update

StepCallback = Callable[[Any, int, Tensor, dict[str, Tensor]], Any]
"""callback(pipe, step_index, timestep, tensors) → dict, as diffusers calls it."""


class _Interrupted(Exception):
    def __init__(self, updates: int, state: State) -> None:
        self.updates = updates
        self.state = state


class Steps:
    """Follows the model calls of one call of `invert`, `reconstruct` or `edit`.

    Args:
        pipe: given to the callback; its `_interrupt` stops the run.
        callback: `callback_on_step_end`, called after every update that called the model. It may
            read the tensors, not replace them: the way back would not be the way there.
        names: `callback_on_step_end_tensor_inputs`.
        tensors: the tensors that it can ask for besides `latents`.

    Raises:
        ValueError, TypeError: an unknown name, or a callback that cannot be called.
    """

    def __init__(
        self,
        pipe: Any,
        callback: StepCallback | None,
        names: Sequence[str],
        tensors: Mapping[str, Tensor],
    ) -> None:
        if callback is not None and not callable(callback):
            raise TypeError(
                f"callback_on_step_end must be a function, got {type(callback).__name__}"
            )
        names = getattr(callback, "tensor_inputs", names)
        known = ["latents", *tensors]
        if unknown := [name for name in names if name not in known]:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be in {known}, got {unknown}"
            )
        self.pipe = pipe
        self.callback = callback
        self.names = list(names)
        self.tensors = tensors
        self.index = 0
        self.stopped = False
        if callback is not None and getattr(pipe, "_interrupt", False):
            # as every pipeline does: what stopped an earlier run does not stop this one
            pipe._interrupt = False

    def progress(self, total: int, description: str) -> Any:
        """The pipeline's progress bar over `total` steps."""
        from tqdm.auto import tqdm

        config = {"desc": description, **getattr(self.pipe, "_progress_bar_config", {})}
        return tqdm(total=total, **config)

    def done(self, timestep: float, latents: Callable[[], Tensor]) -> bool:
        """Call the callback after a step; whether the run is to go on."""
        index, self.index = self.index, self.index + 1
        if self.callback is None:
            return True
        # copies: what it writes into them is not what the way back starts from or is told
        given = {
            name: latents() if name == "latents" else self.tensors[name].clone()
            for name in self.names
        }
        returned = self.callback(self.pipe, index, torch.tensor(timestep), dict(given))
        if returned is not None:
            if not isinstance(returned, Mapping):
                raise TypeError(
                    "callback_on_step_end must return the dict of its tensors, as in diffusers, or "
                    f"None, got {type(returned).__name__}"
                )
            replaced = [k for k, v in returned.items() if v is not given.get(k)]
            if replaced:
                raise ValueError(
                    f"callback_on_step_end must not replace {replaced}: what it changes cannot be "
                    "undone on the way back"
                )
        self.stopped = bool(getattr(self.pipe, "_interrupt", False))
        return not self.stopped

    def run(
        self, sampler: Sampler, initial: Tensor | State, record: list[Tensor] | None = None
    ) -> tuple[State, int | None]:
        """Run a program; `record` receives the float32 sample after every model call.

        Returns:
            The end state and None, or the state at an interruption and the updates done until then.
        """
        program = sampler.program
        total = sum(update.node is not None for update in program.updates)
        with self.progress(total, program.name) as bar:

            def after(index: int, update: Update, state: State) -> None:
                if update.node is None:
                    return
                bar.update()
                if record is not None:
                    record.append(state.sample().float())
                if not self.done(update.timestep, state.sample):
                    # the memory is the run's own, which may reuse it
                    raise _Interrupted(index + 1, state.clone())

            try:
                return sampler.run(initial, callback=after), None
            except _Interrupted as stopped:
                state = stopped.state
                if state.status is not None:
                    ops.check_status(state.status)
                return replace(state, status=None), stopped.updates
