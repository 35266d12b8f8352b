"""The demo's view of a diffusers pipeline agrees with the pipeline itself."""

import pytest
import torch

from inpo_fast.demo.pipeline import DemoError, cast, choose_device, deterministic, load
from inpo_fast.shipped import sampling, scenes

PROMPTS = [scenes.prompt(scene) for scene in scenes.held_out_scenes(3)]


def test_generate_equals_diffusers(tiny, shipped):
    noise = tiny.noise(3, seed=5)
    images = tiny.generate(PROMPTS, noise, steps=4, guidance=3.0)
    pipe = sampling.load_pipeline(shipped / "model")
    expected = pipe(
        PROMPTS, latents=noise, num_inference_steps=4, guidance_scale=3.0, output_type="pt"
    ).images
    # Two orders of the same float32 arithmetic.
    torch.testing.assert_close(images, expected * 2 - 1, rtol=0, atol=1e-5)


def test_calls_of_few_images_draw_what_one_call_draws(tiny, monkeypatch):
    noise, sizes = tiny.noise(3, seed=5), []
    with tiny.unet.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0]))):
        together = tiny.generate(PROMPTS, noise, steps=2, guidance=3.0)
        monkeypatch.setattr("inpo_fast.demo.pipeline._CPU_CHUNK", 2)
        images = tiny.generate(PROMPTS, noise, steps=2, guidance=3.0)
    assert sizes == [6, 6, 4, 4, 2, 2]
    # Two orders of the same float32 arithmetic.
    torch.testing.assert_close(images, together, rtol=0, atol=1e-5)


def test_encode_is_the_scaled_posterior_mean_and_decode_its_counterpart(tiny):
    images = scenes.render(scenes.held_out_scenes(2))
    latents = tiny.encode(images)
    factor = tiny.vae.config.scaling_factor
    mean = tiny.vae.encode(images).latent_dist.mean
    torch.testing.assert_close(latents, mean * factor)
    decoded = tiny.vae.decode(latents / factor).sample.clamp(-1, 1)
    torch.testing.assert_close(tiny.decode(latents), decoded)


def test_denoiser_binds_text_and_counts(tiny):
    model = tiny.denoiser(PROMPTS)
    sample, times = tiny.noise(3, seed=1), torch.full((6,), 7)
    both = model(torch.cat([sample] * 2), times)
    conditional = model(sample, times[:3])
    assert model.calls == 2
    torch.testing.assert_close(both[3:], conditional)
    empty = tiny.denoiser([""] * 3)(sample, times[:3])
    torch.testing.assert_close(both[:3], empty)


def test_cast_leaves_the_original_alone(tiny):
    half = cast(tiny.unet, torch.bfloat16)
    assert next(half.parameters()).dtype == torch.bfloat16
    assert next(tiny.unet.parameters()).dtype == torch.float32
    assert cast(tiny.unet, torch.float32) is tiny.unet


def test_a_missing_model_is_one_clear_line(tmp_path):
    with pytest.raises(DemoError, match="no model can be loaded from"):
        load(tmp_path, "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_devices():
    assert choose_device("auto") == choose_device("cpu") == "cpu"
    for name in ("cuda", "nothing"):
        with pytest.raises(DemoError, match=f"--device {name} is not available"):
            choose_device(name)


def test_deterministic_restores():
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic():
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.allow_tf32
    assert not torch.are_deterministic_algorithms_enabled()
