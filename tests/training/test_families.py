"""The denoisers are told what stock pipelines tell them: time, text, sizes, packing, guidance."""

import numpy as np
import pytest
import torch

from inpo_fast.training import ConfigError
from inpo_fast.training.families import FAMILIES, Conditioning
from inpo_fast.training.models import load_model

from . import tiny

B, C, HIGH, WIDE = 2, 4, 8, 12


def stock_call(pipe, denoiser, latents, text, **options):
    """The time that a stock pipeline passes in its first step, and what the denoiser answers."""
    seen = []

    def watch(module, args, kwargs, output):
        time = kwargs["timestep"] if "timestep" in kwargs else args[1]
        seen.append((time, (output[0] if isinstance(output, tuple) else output.sample).detach()))

    handle = denoiser.register_forward_hook(watch, with_kwargs=True)
    pipe.set_progress_bar_config(disable=True)
    pipe(
        latents=latents,
        num_inference_steps=3,
        height=8 * HIGH,
        width=8 * WIDE,
        output_type="latent",
        **text,
        **options,
    )
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_denoiser_is_called_as_its_pipeline_calls_it(family, tmp_path):
    folder = tiny.save_pipeline(tmp_path, family)
    pipe = tiny.load_pipeline(folder)
    denoiser = getattr(pipe, FAMILIES[family].component).eval()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(B, C, HIGH, WIDE, generator=generator)
    text = {"prompt_embeds": torch.randn(B, tiny.TEXT, tiny.WIDTH, generator=generator)}
    if family != "StableDiffusionPipeline":
        text["pooled_prompt_embeds"] = torch.randn(B, tiny.WIDTH, generator=generator)
    options, given = {"guidance_scale": 1.0}, latents
    ids = None
    if family == "StableDiffusionXLPipeline":
        sizes = {"original_size": (50, 60), "crops_coords_top_left": (7, 9)}
        options |= {**sizes, "target_size": (8 * HIGH, 8 * WIDE)}
        ids = torch.tensor([[50.0, 60, 7, 9, 8 * HIGH, 8 * WIDE]] * B)
    if family == "FluxPipeline":
        options = {"guidance_scale": 2.5}
        given = type(pipe)._pack_latents(latents, B, C, HIGH, WIDE)
    with torch.no_grad():
        time, expected = stock_call(pipe, denoiser, given, text, **options)
        if family == "FluxPipeline":
            # its pipeline divides by the length of the schedule
            time = time * 1000
            expected = type(pipe)._unpack_latents(expected, 8 * HIGH, 8 * WIDE, 8)
        times = time.expand(B).to(torch.float32)
        told = Conditioning(text, ids, options["guidance_scale"])
        found = FAMILIES[family].predict(denoiser, latents, times, told)
    assert 600 < times[0] <= 1000
    assert found.shape == latents.shape
    # the time may have been rounded once more on its way
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    other = Conditioning(text, ids, 1.0)
    again = FAMILIES[family].predict(denoiser, latents, times, other)
    assert torch.allclose(again, expected, rtol=1e-4, atol=1e-5) == (family != "FluxPipeline")


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        # the model's own resolution is 1024
        ({}, 64**2),
        ({"resolution": 64}, 4**2),
        ({"aspect_ratio_buckets": "64,64"}, 4**2),
        ({"aspect_ratio_buckets": "64,256;128,128", "resolution": 512}, 8**2),
    ],
)
def test_flux_is_trained_on_the_levels_that_its_pipeline_draws_with(settings, tokens, tmp_path):
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    folder = tiny.save_pipeline(tmp_path / "model", "FluxPipeline", base_shift=0.4, max_shift=1.2)
    scheduler = tiny.load_pipeline(folder).scheduler
    config = tiny.config(folder, tmp_path / "out", rank=2, **settings)
    found = load_model(config, None, torch.float32).schedule
    known = scheduler.config
    mu = calculate_shift(
        *(tokens, known.base_image_seq_len, known.max_image_seq_len),
        *(known.base_shift, known.max_shift),
    )
    total = known.num_train_timesteps
    scheduler.set_timesteps(sigmas=np.arange(total, 0, -1) / total, mu=mu)
    # float32 there
    assert np.allclose(found.sigma[1:], scheduler.sigmas[:-1].numpy()[::-1], rtol=1e-6)
    assert np.allclose(found.timesteps[1:], scheduler.timesteps.numpy()[::-1], rtol=1e-6)
    assert np.allclose(found.alpha, 1 - found.sigma)


def test_buckets_of_several_areas_have_no_one_shift(tmp_path):
    buckets = {"aspect_ratio_buckets": "64,64;64,128", "rank": 2}
    folder = tiny.save_pipeline(tmp_path / "flux", "FluxPipeline")
    message = (
        r"FlowMatchEulerDiscreteScheduler shifts .* aspect_ratio_buckets must all have one area, "
        r"got 64,64 \(16 tokens\); 64,128 \(32 tokens\)"
    )
    with pytest.raises(ConfigError, match=message):
        load_model(tiny.config(folder, tmp_path / "out", **buckets), None, torch.float32)
    # a shift that is always the same does not mind
    folder = tiny.save_pipeline(tmp_path / "sd3", "StableDiffusion3Pipeline")
    load_model(tiny.config(folder, tmp_path / "out", **buckets), None, torch.float32)
