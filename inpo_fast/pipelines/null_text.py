"""Null-text inversion (Mokady et al., CVPR 2023): unconditional embeddings that lead DDIM back.

z*_0 … z*_N is the trajectory of DDIM inversion with the prompt and guidance 1. From z̄_N = z*_N the
guided DDIM step S follows it with an embedding ∅_i per step that minimises

    ‖S(z̄_i, ∅_i, c) − z*_{i−1}‖²,        then z̄_{i−1} = S(z̄_i, ∅_i, c), ∅_{i−1} starts at ∅_i,

by Adam. As in the authors' code, whose 50 steps these are, with f the fraction of steps done: the
learning rate falls as lr (1 − f/2) and a step is good enough at a loss of early_stop (1 + 100 f).

The batch is one problem per image. An image that is good enough is masked out of the update, on the
device: the number of inner steps is fixed and nothing waits for a loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..sampler import Model
from ..solvers import Program
from .adapter import Conditioning
from .steps import Steps

NUM_INNER_STEPS = 10
LEARNING_RATE = 1e-2
EARLY_STOP = 1e-5


def check_null_text(
    guided: bool,
    options: Mapping[str, Any],
    *,
    num_inner_steps: int = NUM_INNER_STEPS,
    learning_rate: float = LEARNING_RATE,
    early_stop: float = EARLY_STOP,
) -> None:
    """Refuse arguments with which there is nothing to optimise."""
    if not guided:
        raise ValueError(
            "guidance_scale must differ from 1 for null-text inversion: without guidance the "
            "unconditional embedding has no effect (for Flux, set true_cfg_scale)"
        )
    if options.get("guess_mode"):
        raise ValueError("guess_mode must be off for null-text inversion")
    if isinstance(num_inner_steps, bool) or not isinstance(num_inner_steps, int):
        raise TypeError(f"num_inner_steps must be an integer, got {num_inner_steps!r}")
    if num_inner_steps < 1:
        raise ValueError(f"num_inner_steps must be at least 1, got {num_inner_steps}")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be positive, got {learning_rate}")
    if not early_stop >= 0:
        raise ValueError(f"early_stop must be at least 0, got {early_stop}")


def null_text_embeddings(
    bind: Callable[[Conditioning], Model],
    conditioning: Conditioning,
    program: Program,
    guidance_scale: float | tuple[float, ...],
    trajectory: Sequence[Tensor],
    steps: Steps,
    *,
    dtype: torch.dtype,
    num_inner_steps: int = NUM_INNER_STEPS,
    learning_rate: float = LEARNING_RATE,
    early_stop: float = EARLY_STOP,
) -> tuple[Tensor, int]:
    """Optimise the unconditional embedding of every step.

    Args:
        bind: conditioning of B images to their model, without guidance.
        conditioning: both halves.
        program: DDIM from noise to image, N steps.
        guidance_scale: w, one number or B.
        trajectory: N+1 samples z*_0 … z*_N, [B, …] float32.
        steps: callback and progress of the call; an interruption, also an earlier one, leaves the
            remaining steps with the last embedding.
        dtype: what the model computes in; the embeddings are optimised in float32.
        num_inner_steps, learning_rate, early_stop: see above; the loss is a mean over the latent.

    Returns:
        [N, B, L, D] embeddings in `dtype`, first the noisiest step's, and the number of model
        calls.
    """
    targets = trajectory[::-1]
    z = targets[0]
    rows = torch.from_numpy(program.coefficients(guidance_scale)).to(z.device, torch.float32)
    null = conditioning.tensors["negative_prompt_embeds"].to(dtype)  # [B, L, D]
    total = len(program.updates)
    if steps.stopped:
        return torch.stack([null] * total), 0
    conditional = bind(conditioning)
    found: list[Tensor] = []
    with steps.progress(total, "null-text") as bar:
        for index, update in enumerate(program.updates):
            kind = torch.int64 if isinstance(update.timestep, int) else torch.float32
            time = torch.full((len(z),), update.timestep, dtype=kind, device=z.device)
            seen = (z * update.model_scale).to(dtype)
            known = conditional(seen, time)
            step = _Step(bind, conditioning, z, seen, time, known, rows[index], dtype)
            done = index / total
            null = _descend(
                step,
                targets[index + 1],
                null,
                num_inner_steps=num_inner_steps,
                learning_rate=learning_rate * (1 - done / 2),
                good_enough=early_stop * (1 + 100 * done),
            )
            # from the embedding that the model will be given on the way back
            z = step(null)
            found.append(null)
            bar.update()
            if not steps.done(update.timestep, z.clone):
                break
    calls = len(found) * (num_inner_steps + 2)
    return torch.stack(found + [null] * (total - len(found))), calls


class _Step(NamedTuple):
    """S(z̄_i, ·, c): one guided DDIM step as a function of the unconditional embedding, with the
    arithmetic of the way back."""

    bind: Callable[[Conditioning], Model]
    conditioning: Conditioning
    z: Tensor  # [B, …]
    seen: Tensor  # [B, …] as the model sees it
    time: Tensor  # [B]
    conditional: Tensor  # [B, …] the output that does not depend on the embedding
    coef: Tensor  # [4] or [B, 4], a = 0
    dtype: torch.dtype

    def __call__(self, null: Tensor) -> Tensor:
        told = self.conditioning.tensors
        halves = {k: told.get(f"negative_{k}", v) for k, v in told.items()}
        halves["prompt_embeds"] = null.to(self.dtype)
        model = self.bind(Conditioning(halves, self.conditioning.settings))
        output = model(self.seen, self.time)
        return ops.affine_update(self.z, self.z, self.coef, output, self.conditional)


def _descend(
    step: _Step,
    target: Tensor,
    start: Tensor,
    *,
    num_inner_steps: int,
    learning_rate: float,
    good_enough: float,
) -> Tensor:
    """Adam (β = 0.9, 0.999) on the embedding of every image until its loss is below `good_enough`.

    Returns:
        [B, L, D] in the dtype of `start`; float32 in between.
    """
    null = start.float()
    mean, square = torch.zeros_like(null), torch.zeros_like(null)
    active = torch.ones(len(null), 1, 1, dtype=torch.bool, device=null.device)
    for k in range(1, num_inner_steps + 1):
        null.requires_grad_()
        with torch.enable_grad():
            losses = (step(null) - target).square().flatten(1).mean(dim=1)  # [B]
            # of the sum: an image's loss depends on its own embedding only
            (gradient,) = torch.autograd.grad(losses.sum(), null)
        active = active & (losses.detach() >= good_enough)[:, None, None]
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient.square()
        deviation = (square / (1 - 0.999**k)).sqrt() + 1e-8
        moved = null.detach() - learning_rate * mean / (1 - 0.9**k) / deviation
        null = torch.where(active, moved, null.detach())
    return null.to(start.dtype)
