"""`invert`: images to noise on a stock diffusers pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..solvers.program import is_unguided
from ..state import State, StateKind
from .fingerprint import fingerprint
from .images import to_tensor
from .inversion import Compile, Inversion, make_sampler, no_model
from .null_text import check_null_text, null_text_embeddings
from .plan import NULL_TEXT, Factory, make_plan, parameter_names
from .request import (
    Guidance,
    adapter_of,
    check_generators,
    make_request,
    make_schedule,
    split_options,
)
from .steps import StepCallback, Steps


def invert(
    pipe: Any,
    image: Any,
    prompt: str | Sequence[str] | None = None,
    *,
    negative_prompt: str | Sequence[str] | None = None,
    solver: str | Factory = "bdia",
    num_inference_steps: int | None = None,
    timesteps: Sequence[int] | None = None,
    sigmas: Sequence[float] | None = None,
    guidance_scale: Guidance | None = None,
    strength: float = 1.0,
    state: StateKind = "lattice",
    compile: Compile = False,
    generator: torch.Generator | list[torch.Generator] | None = None,
    verify: bool = False,
    callback_on_step_end: StepCallback | None = None,
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    **options: Any,
) -> Inversion:
    """Turn images into noise with a diffusers pipeline, so that the way back is exact to the bit.

    The pipeline is read and never changed: its scheduler gives the noise levels, its modules are
    called in their own dtype, where they are or where their hooks bring them. Threads may share it.

    Args:
        pipe: StableDiffusionPipeline (1.x, 2.x), StableDiffusionXLPipeline,
            StableDiffusionControlNetPipeline, StableDiffusion3Pipeline or FluxPipeline.
        image: see `pipelines.images.to_tensor`; B images of one size.
        prompt: what the images show, one string or B; "" for none. Or `prompt_embeds`.
        negative_prompt: one string or B, with guidance.
        solver: a name of `inpo_fast.SOLVERS`, "null-text" (DDIM inversion without guidance and
            optimised unconditional embeddings), or a function (schedule, *, direction) → Program.
            "ddim" and "null-text" do not return exactly, and say so.
        num_inference_steps: N of the scheduler's grid, 50 unless given.
        timesteps, sigmas: the grid itself, falling, of a diffusion or a flow-matching scheduler.
        guidance_scale: one number or B; 3.0 unless given, 3.5 for Flux, where it is an embedding
            and `true_cfg_scale` is classifier-free guidance.
        strength: fraction of the grid to go, from the images' end.
        state: "lattice", exact to the bit, or the dtype of floating tracks.
        compile: as in `Sampler`; the way back is compiled alike, or its bits would differ.
        generator: draws the latents from the autoencoder's posterior, one generator or B of them;
            without one they are its mode.
        verify: go back at once, which fills `bits_equal` and `latent_error`.
        callback_on_step_end, callback_on_step_end_tensor_inputs: as in the pipelines. The callback
            may read the tensors, not replace them. `pipe._interrupt = True` ends the inversion at
            that step; what was done can be reconstructed and edited.
        options: parameters of the solver (`gamma`, `p`, …; null-text: `num_inner_steps`,
            `learning_rate`, `early_stop`) and arguments of the pipeline family: `prompt_embeds`,
            `negative_prompt_embeds` and their pooled and second variants, `clip_skip`,
            `max_sequence_length`, `original_size` …, `control_image`,
            `controlnet_conditioning_scale`, `guess_mode`, `true_cfg_scale`.

    Raises:
        ValueError, TypeError: naming the argument and what to change, before any model call.
        LatticeRangeError, NonFiniteError: the run went wrong; names the step.
    """
    adapter = adapter_of(pipe)
    family, parameters = split_options(adapter, options, parameter_names(solver))
    pixels = to_tensor(image, adapter.multiple)
    batch, size = len(pixels), (pixels.shape[-2], pixels.shape[-1])
    request = make_request(adapter, prompt, negative_prompt, guidance_scale, batch, size, family)
    check_generators(generator, batch)
    grid: dict[str, Any] = {
        "num_inference_steps": _plain(num_inference_steps),
        "timesteps": None if timesteps is None else [_plain(t) for t in timesteps],
        "sigmas": None if sigmas is None else [_plain(s) for s in sigmas],
        "strength": _plain(strength),
    }
    schedule = make_schedule(adapter, size=size, **grid)
    plan = make_plan(solver, schedule, parameters)
    if plan.to_image.model_calls == 0:
        raise ValueError(
            f"num_inference_steps times strength must leave {plan.solver} at least 2 steps, got "
            f"{schedule.num_steps}: from one step the way back needs no model and cannot edit"
        )
    guidance = adapter.guidance(request)
    guided = not is_unguided(guidance)
    if plan.solver == NULL_TEXT:
        check_null_text(guided, request.options, **parameters)
        if compile:
            raise ValueError("compile must be False with null-text: its model changes every step")
    # refuses state, dtype and compile before the first model call
    idle = make_sampler(adapter, no_model, plan.to_noise, guidance, state, compile)

    with adapter.session(), torch.no_grad():
        # a negative prompt that was given is kept for edits, even where the inversion has no use
        conditioning = adapter.encode_prompt(request, guided or request.has_negative)
        steps = Steps(
            pipe, callback_on_step_end, callback_on_step_end_tensor_inputs, conditioning.tensors
        )
        images = pixels * 2 - 1
        latents = adapter.to_latents(images, generator)
        difference = adapter.to_images(latents, size).float().clamp(-1, 1).cpu() - images
        inversion = Inversion(
            adapter=adapter,
            plan=plan,
            request=request,
            conditioning=conditioning,
            image_latents=latents,
            state=idle.start(latents),
            state_kind=state,
            compile=compile,
            models={name: fingerprint(module) for name, module in adapter.modules().items()},
            grid=grid,
            vae_floor=float(difference.square().mean().sqrt()),
            model_calls=0,
        )
        if plan.solver == NULL_TEXT:
            _run_null_text(inversion, steps)
        else:
            model = adapter.model(conditioning, guided, size)
            sampler = make_sampler(adapter, model, plan.to_noise, guidance, state, compile)
            _finish(inversion, *steps.run(sampler, latents))
    if verify:
        inversion.reconstruct(output_type="latent")
    return inversion


def _finish(inversion: Inversion, state: State, stopped: int | None) -> None:
    """Take in the end of the run, or where it was interrupted."""
    if stopped is not None:
        inversion.interrupted = True
        inversion.plan = plan = inversion.plan.stopped(stopped)
        # the updates that were run are a program of their own, which has its own inverse
        inverse = plan.to_image.fingerprint if plan.reversible else None
        state = replace(state, program=plan.to_noise.fingerprint, inverse=inverse)
    inversion.state = state
    inversion.model_calls = inversion.plan.to_noise.model_calls


def _run_null_text(inversion: Inversion, steps: Steps) -> None:
    adapter, request, conditioning = inversion.adapter, inversion.request, inversion.conditioning
    trajectory: list[Tensor] = []
    sampler = make_sampler(
        adapter,
        adapter.model(conditioning, False, request.size),
        inversion.plan.to_noise,
        1.0,
        inversion.state_kind,
        False,
    )
    _finish(inversion, *steps.run(sampler, inversion.image_latents, trajectory))
    inversion.null_embeddings, calls = null_text_embeddings(
        lambda told: adapter.model(told, False, request.size),
        conditioning,
        inversion.plan.to_image,
        adapter.guidance(request),
        [inversion.image_latents, *trajectory],
        steps,
        dtype=adapter.dtype,
        **inversion.plan.parameters,
    )
    inversion.model_calls += calls
    inversion.interrupted = steps.stopped


def _plain(number: Any) -> Any:
    """A number of numpy or torch as Python's, so that it can be written to a file."""
    return number.item() if hasattr(number, "item") else number
