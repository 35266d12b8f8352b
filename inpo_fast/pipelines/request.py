"""Checks what users type, before any model is called."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ..naming import naming
from ..schedule import NoiseSchedule
from .adapter import Adapter, Request, Size
from .settings import one_or_each
from .stable_diffusion import StableDiffusion, StableDiffusionControlNet, StableDiffusionXL
from .transformers import Flux, StableDiffusion3

Guidance = float | Sequence[float]

ADAPTERS: dict[str, type[Adapter]] = {
    family.pipeline_class: family
    for family in (
        StableDiffusion,
        StableDiffusionXL,
        StableDiffusionControlNet,
        StableDiffusion3,
        Flux,
    )
}


def adapter_of(pipe: Any) -> Adapter:
    """The adapter of a pipeline.

    Raises:
        ValueError: a pipeline of another class, or one that its adapter refuses.
    """
    for base in type(pipe).__mro__:
        if base.__name__ in ADAPTERS:
            return ADAPTERS[base.__name__](pipe)
    raise ValueError(
        f"pipe must be one of {list(ADAPTERS)}, got {type(pipe).__name__}; a pipeline of the same "
        "model for another task becomes one with StableDiffusionPipeline.from_pipe(pipe)"
    )


def split_options(
    adapter: Adapter, options: Mapping[str, Any], solver_names: Iterable[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the family's options, the solver's parameters) of further keyword arguments.

    Raises:
        TypeError: an argument that neither knows.
    """
    family = adapter.prompt_options | adapter.setting_options
    solver = set(solver_names) - family
    if unknown := sorted(set(options) - family - solver):
        raise TypeError(
            f"unknown arguments {unknown}: the solver takes {sorted(solver)}, "
            f"{adapter.pipeline_class} takes {sorted(family)}"
        )
    given = {k: v for k, v in options.items() if v is not None}
    return (
        {k: v for k, v in given.items() if k in family},
        {k: v for k, v in given.items() if k in solver},
    )


def make_request(
    adapter: Adapter,
    prompt: str | Sequence[str] | None,
    negative_prompt: str | Sequence[str] | None,
    guidance_scale: Guidance | None,
    batch: int,
    size: Size,
    options: Mapping[str, Any],
) -> Request:
    """Prompts and guidance, checked and spread over the batch."""
    if (prompt is None) == (options.get("prompt_embeds") is None):
        raise ValueError("give exactly one of prompt ('' for an empty one) and prompt_embeds")
    if negative_prompt is not None and options.get("negative_prompt_embeds") is not None:
        raise ValueError("give at most one of negative_prompt and negative_prompt_embeds")
    for name, value in options.items():
        if name.endswith("_embeds"):
            _check_embeddings(name, value, batch)
        elif name in adapter.prompt_options:
            _texts(name, value, batch)
    if guidance_scale is None:
        guidance_scale = adapter.default_guidance
    request = Request(
        prompt=_texts("prompt", prompt, batch),
        negative_prompt=_texts("negative_prompt", negative_prompt, batch),
        batch=batch,
        size=size,
        guidance_scale=one_or_each("guidance_scale", guidance_scale, batch),
        options=dict(options),
    )
    adapter.check_settings(request)
    return request


def _texts(name: str, value: str | Sequence[str] | None, batch: int) -> list[str] | None:
    if value is None:
        return None
    texts = [value] * batch if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(t, str) for t in texts):
        raise TypeError(f"{name} must be a string or a list of strings, got {value!r}")
    if len(texts) != batch:
        raise ValueError(f"{name} must be a string or {batch} of them, got a list of {len(texts)}")
    return list(texts)


def _check_embeddings(name: str, value: Any, batch: int) -> None:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor, got {type(value).__name__}")
    axes = "D" if "pooled" in name else "L, D"
    if value.shape[:1] != (batch,) or value.ndim != axes.count(",") + 2:
        raise ValueError(f"{name} must be [{batch}, {axes}], got {tuple(value.shape)}")


def make_schedule(
    adapter: Adapter,
    num_inference_steps: int | None,
    timesteps: Sequence[int] | None,
    sigmas: Sequence[float] | None,
    strength: float,
    size: Size,
) -> NoiseSchedule:
    """The cleanest `strength` of the pipeline's grid.

    Raises:
        ValueError: steps, timesteps, sigmas or strength that the scheduler's grid does not have.
    """
    if timesteps is not None and sigmas is not None:
        raise ValueError("give at most one of timesteps and sigmas")
    explicit = timesteps if timesteps is not None else sigmas
    if explicit is None:
        num_inference_steps = 50 if num_inference_steps is None else num_inference_steps
    elif num_inference_steps not in (None, len(explicit)):
        raise ValueError(
            f"num_inference_steps must be left out or the {len(explicit)} of the explicit grid, "
            f"got {num_inference_steps}"
        )
    else:
        num_inference_steps = None
    with naming({"num_steps": "num_inference_steps"}):
        return adapter.schedule(num_inference_steps, timesteps, sigmas, size).fraction(strength)


def check_generators(generator: torch.Generator | list[torch.Generator] | None, batch: int) -> None:
    """One generator, or one per image."""
    generators = generator if isinstance(generator, list) else [generator] * (generator is not None)
    if not all(isinstance(g, torch.Generator) for g in generators):
        raise TypeError("generator must be a torch.Generator or a list of them")
    if isinstance(generator, list) and len(generator) != batch:
        raise ValueError(f"generator must be one or {batch}, got a list of {len(generator)}")
