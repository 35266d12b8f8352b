"""Images as noise: what `invert` returns, and the ways back from it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..sampler import Model, Sampler, State, StateKind
from ..schedule import NoiseSchedule
from ..solvers.program import Program, is_unguided
from .adapter import Adapter, Conditioning, Request, gives_negative
from .fingerprint import Fingerprint, check_dtypes
from .outputs import EditOutput, ReconstructionOutput
from .plan import NULL_TEXT, Plan
from .request import Guidance, check_generators, make_request, split_options
from .steps import StepCallback, Steps

Compile = bool | Literal["graph"]
"""See `Sampler`."""

_OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class Inversion:
    """Images turned into noise, with all that it takes to come back or to go elsewhere.

    Attributes:
        adapter: the pipeline's adapter.
        plan: solver, schedule and programs.
        request: prompts, guidance and options of the inversion.
        conditioning: what the prompts were encoded to.
        image_latents: [B, …] float32 latents of the images.
        state: both tracks at the noisy end.
        state_kind: `lattice` or the dtype of the tracks.
        compile: how the model is compiled, see `Sampler`.
        vae_floor: root mean squared pixel error, in [−1, 1], of the autoencoder alone: what no
            inversion can be better than.
        models: fingerprints of the pipeline's models.
        grid: num_inference_steps, timesteps, sigmas and strength as given.
        model_calls: calls of the denoiser; with guidance one call sees the batch twice over.
        interrupted: whether a callback stopped the run early; the way back is then as short.
        null_embeddings: [N, B, L, D] of null-text inversion, else None.
        bits_equal, latent_error: whether the round trip returned the same bits, and the largest
            difference; None until `reconstruct` was called.
    """

    adapter: Adapter = field(repr=False)
    plan: Plan = field(repr=False)
    request: Request = field(repr=False)
    conditioning: Conditioning = field(repr=False)
    image_latents: Tensor = field(repr=False)
    state: State = field(repr=False)
    state_kind: StateKind
    compile: Compile
    models: Mapping[str, Fingerprint] = field(repr=False)
    grid: Mapping[str, Any]
    vae_floor: float
    model_calls: int
    interrupted: bool = False
    null_embeddings: Tensor | None = field(default=None, repr=False)
    bits_equal: bool | None = None
    latent_error: float | None = None

    @property
    def latents(self) -> Tensor:
        """[B, …] the noisy latents in the model's dtype, for `pipe(prompt, latents=…)`."""
        return self.state.sample().to(self.adapter.dtype)

    @property
    def noise(self) -> Tensor:
        """[B, …] float32 (z − α x)/σ, the noise between the latents and those of the images."""
        alpha, sigma = self.schedule.alpha[-1], self.schedule.sigma[-1]
        noisy = self.state.sample().double()
        noise: Tensor = (noisy - alpha * self.image_latents.double()) / sigma
        return noise.float()

    @property
    def schedule(self) -> NoiseSchedule:
        """The grid that was used, from the images' node 0 to the noise."""
        return self.plan.schedule

    @property
    def report(self) -> dict[str, Any]:
        """What to know before trusting the noise, as plain values.

        `noise_mean` and `noise_std` are those of `noise`; N(0, 1) has 0 and 1. `amplification` is
        how much the inversion may have magnified a perturbation of the state.
        """
        noise = self.noise
        return {
            "solver": self.plan.to_noise.name if self.solver != NULL_TEXT else NULL_TEXT,
            "reversible": self.plan.reversible,
            "steps": self.schedule.num_steps,
            "guidance_scale": self.request.guidance_scale,
            "state": self.state_kind,
            "model_calls": self.model_calls,
            "amplification": self.plan.to_noise.amplification,
            "noise_mean": float(noise.mean()),
            "noise_std": float(noise.std()),
            "vae_floor": self.vae_floor,
            "bits_equal": self.bits_equal,
            "latent_error": self.latent_error,
            "interrupted": self.interrupted,
        }

    @property
    def solver(self) -> str:
        """Name of the solver."""
        return self.plan.solver

    def __str__(self) -> str:
        rows = self.report
        exact = "exact to the bit" if self.state_kind == "lattice" else "reversible"
        rows["reversible"] = exact if self.plan.reversible else "no: the way back is inexact"
        values = ((k, f"{v:.4g}" if isinstance(v, float) else v) for k, v in rows.items())
        return "\n".join(f"{name.replace('_', ' '):15s} {value}" for name, value in values)

    def reconstruct(
        self,
        *,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ReconstructionOutput:
        """Go back under the same prompt and compare; sets `bits_equal` and `latent_error`.

        A callback that interrupts gives the images of that moment.

        Raises:
            ValueError: the pipeline's dtype has changed since.
        """
        _check_output_type(output_type)
        self._check_dtype()
        with self.adapter.session(), torch.no_grad():
            steps = Steps(
                self.adapter.pipe,
                callback_on_step_end,
                callback_on_step_end_tensor_inputs,
                self.conditioning.tensors,
            )
            end = self._back(self.request, self.conditioning, steps)
            start = self._sampler(no_model, self.plan.to_noise, 1.0).start(self.image_latents)
            latents, origin = end.sample(), start.sample()
            equal = start.equal(end) if self.plan.reversible else torch.equal(latents, origin)
            error = float((latents - origin).abs().max())
            if not steps.stopped:
                self.bits_equal, self.latent_error = equal, error
            images, _ = self._pictures(latents, output_type, checked=False)
        return ReconstructionOutput(images, latents, equal, error)

    def edit(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        guidance_scale: Guidance | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **options: Any,
    ) -> EditOutput:
        """Go back from the noise under another prompt.

        What is left out stays as it was in the inversion: guidance, negative prompt, the settings
        of the pipeline family.

        Args:
            prompt: one, or one per image; or `prompt_embeds` among the options.
            negative_prompt: "" for none.
            guidance_scale: one number or one per image.
            generator: one, or one per image; given to the decoder, as the pipelines do.
            output_type: "pil", "np", "pt" or "latent".
            callback_on_step_end, callback_on_step_end_tensor_inputs: as in the pipelines; the
                callback may read the tensors and may set `pipe._interrupt`.
            options: arguments of the pipeline family, as in `invert`.

        Raises:
            ValueError, TypeError: naming the argument; or the pipeline's dtype has changed since.
        """
        _check_output_type(output_type)
        check_generators(generator, self.request.batch)
        self._check_dtype()
        adapter = self.adapter
        family, _ = split_options(adapter, options, ())
        # the negative prompt is inherited as it was encoded, whatever it came from
        inherits = negative_prompt is None and not gives_negative(family)
        if not inherits and self.null_embeddings is not None:
            raise ValueError("negative_prompt must be left out: null-text inversion has its own")
        if negative_prompt is None and "negative_prompt_embeds" not in family:
            negative_prompt = self.request.negative_prompt
        settings = {k: v for k, v in self.request.options.items() if k in adapter.setting_options}
        request = make_request(
            adapter,
            prompt,
            negative_prompt,
            self.request.guidance_scale if guidance_scale is None else guidance_scale,
            self.request.batch,
            self.request.size,
            {**settings, **family},
        )
        guided = not is_unguided(adapter.guidance(request))
        with adapter.session(), torch.no_grad():
            inherited = self.conditioning.negative() if inherits else {}
            conditioning = adapter.encode_prompt(request, guided and not inherited)
            if guided:
                self._check_halves(conditioning.tensors, inherited)
            # sizes that are conditioning come from the request, which has inherited them
            tensors = {**inherited, **conditioning.tensors}
            conditioning = replace(conditioning, tensors=tensors)
            steps = Steps(
                adapter.pipe,
                callback_on_step_end,
                callback_on_step_end_tensor_inputs,
                conditioning.tensors,
            )
            latents = self._back(request, conditioning, steps).sample()
            images, flagged = self._pictures(latents, output_type, generator=generator)
        return EditOutput(images, flagged)

    def _check_halves(self, tensors: Mapping[str, Tensor], inherited: Mapping[str, Tensor]) -> None:
        """Refuse a prompt whose embeddings do not go with the negative ones of the inversion."""
        remedy = "" if self.null_embeddings is not None else "; give negative_prompt as well"
        for negative, tensor in inherited.items():
            name = negative.removeprefix("negative_")
            if tensors[name].shape != tensor.shape:
                raise ValueError(
                    f"{name} must have the shape {tuple(tensor.shape)} of the inversion's "
                    f"{negative}, got {tuple(tensors[name].shape)}{remedy}"
                )

    def _check_dtype(self) -> None:
        name = self.adapter.denoiser_name
        made, modules = {name: self.models[name]}, self.adapter.modules()
        check_dtypes("the inversion", made, modules)

    def _back(self, request: Request, conditioning: Conditioning, steps: Steps) -> State:
        """From the noise to latents under `conditioning`."""
        guidance = self.adapter.guidance(request)
        model = self._model(conditioning, not is_unguided(guidance))
        sampler = self._sampler(model, self.plan.to_image, guidance)
        initial = self.state if self.plan.reversible else self.state.sample()
        return steps.run(sampler, initial)[0]

    def _model(self, conditioning: Conditioning, guided: bool) -> Model:
        size = self.request.size
        if self.null_embeddings is None or not guided:
            return self.adapter.model(conditioning, guided, size)
        embeddings = iter(self.null_embeddings)

        def denoise(sample: Tensor, timestep: Tensor) -> Tensor:
            # DDIM calls the model once a step
            tensors = {**conditioning.tensors, "negative_prompt_embeds": next(embeddings)}
            step = replace(conditioning, tensors=tensors)
            return self.adapter.model(step, guided, size)(sample, timestep)

        return denoise

    def _sampler(
        self, model: Model, program: Program, guidance: float | tuple[float, ...]
    ) -> Sampler:
        return make_sampler(self.adapter, model, program, guidance, self.state_kind, self.compile)

    def _pictures(
        self,
        latents: Tensor,
        output_type: str,
        generator: torch.Generator | list[torch.Generator] | None = None,
        checked: bool = True,
    ) -> tuple[Any, list[bool] | None]:
        """`latents` as images; with `checked` through the pipeline's safety checker and
        watermark."""
        if output_type == "latent":
            return latents, None
        images = self.adapter.to_images(latents, self.request.size, generator)
        if checked:
            return self.adapter.finish(images, output_type)
        return self.adapter.pipe.image_processor.postprocess(images, output_type=output_type), None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the inversion as safetensors, all of it or nothing; see `storage`."""
        from .storage import save

        save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], pipe: Any, **expected: Any) -> Inversion:
        """Read what `save` wrote; see `storage.load` for what is refused."""
        from .storage import load

        return load(path, pipe, **expected)


def make_sampler(
    adapter: Adapter,
    model: Model,
    program: Program,
    guidance: float | tuple[float, ...],
    state: StateKind,
    compile: Compile,
) -> Sampler:
    """The one place where a sampler of a pipeline is made."""
    return Sampler(
        model,
        program,
        guidance_scale=guidance,
        state=state,
        model_dtype=adapter.dtype,
        compile=compile,
    )


def no_model(sample: Tensor, timestep: Tensor) -> Tensor:
    raise AssertionError("this sampler runs no model")


def _check_output_type(output_type: str) -> None:
    if output_type not in _OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {_OUTPUT_TYPES}, got {output_type!r}")
