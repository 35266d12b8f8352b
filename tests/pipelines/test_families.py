"""Every family: the way back is exact, and the model is called as the pipeline calls it."""

import pytest
import torch

from inpo_fast import SOLVERS, invert
from tests.pipelines import tiny

PROMPTS = ["a cat", "a red dog"]
FAMILIES = list(tiny.BUILDERS)


def needed(name, count=2, height=16, width=24):
    """What a family needs besides a prompt."""
    if name == "controlnet":
        return {"control_image": tiny.images(count, height, width, seed=9)}
    if name == "flux":
        return {"true_cfg_scale": 2.0, "negative_prompt": "bad"}
    return {}


@pytest.mark.filterwarnings("ignore::inpo_fast.AmplificationWarning")
@pytest.mark.filterwarnings("ignore:negative_prompt has no effect")
@pytest.mark.parametrize("guidance", [1.0, 3.0, 7.5])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip(pipe_of, name, solver, guidance):
    options = needed(name)
    if name == "flux":
        options["true_cfg_scale"] = guidance
    inversion = invert(
        pipe_of(name),
        tiny.images(2, 16, 24),
        PROMPTS,
        solver=solver,
        num_inference_steps=3,
        guidance_scale=guidance,
        verify=True,
        **options,
    )
    report = inversion.report
    assert report["reversible"] == inversion.bits_equal == (solver != "ddim")
    assert (report["latent_error"] == 0) == report["reversible"]
    assert report["model_calls"] == inversion.plan.to_noise.model_calls
    assert "inexact" in str(inversion) or report["reversible"]


@pytest.mark.parametrize("name", FAMILIES)
def test_sampling_is_that_of_the_pipeline(pipe_of, name):
    """An edit with DDIM is what the pipeline draws from the same latents with its own scheduler."""
    pipe = pipe_of(name)
    options = needed(name)
    common = {"guidance_scale": 2.5, "num_inference_steps": 4}
    inversion = invert(
        pipe, tiny.images(2, 16, 24), PROMPTS, solver="ddim", state="float32", **common, **options
    )
    target = ["a green dog", "a dog"]
    options.pop("control_image", None)
    edited = inversion.edit(target, output_type="pt", **options).images
    if name == "controlnet":
        options["image"] = needed(name)["control_image"]
    own = _copy_with_own_scheduler(pipe)
    expected = own(
        target,
        latents=inversion.latents,
        height=16,
        width=24,
        output_type="pt",
        **common,
        **options,
    ).images
    # float32 against float32: the pipeline rounds the guided output and every step as well
    torch.testing.assert_close(edited, expected, rtol=0, atol=2e-4)
    other = inversion.edit(PROMPTS, output_type="pt").images
    assert (other - edited).abs().max() > 1e-3


def _copy_with_own_scheduler(pipe):
    """A pipeline on the same models: calling it sets up its scheduler."""
    parts = {
        **pipe.components,
        "scheduler": type(pipe.scheduler).from_config(pipe.scheduler.config),
    }
    known = {k: v for k, v in pipe.config.items() if k in ("requires_safety_checker",)}
    if type(pipe).__name__ == "StableDiffusionXLPipeline":
        known["add_watermarker"] = False
    own = type(pipe)(**parts, **known)
    own.set_progress_bar_config(disable=True)
    return own


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_is_its_images_one_by_one(pipe_of, name):
    pipe, images = pipe_of(name), tiny.images(2, 24, 16)
    guidance = [2.0, 4.0]
    options = needed(name, height=24, width=16)

    def noise(index=slice(None)):
        own = dict(options)
        if "control_image" in own:
            own["control_image"] = own["control_image"][index]
        return invert(
            pipe,
            images[index],
            PROMPTS[index],
            guidance_scale=guidance[index],
            num_inference_steps=3,
            **own,
        ).state.sample()

    together = noise()
    for index in range(2):
        alone = noise(slice(index, index + 1))
        # other kernels for another batch size: rounding of float32, magnified by 3 steps
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_save_load_reconstruct_and_edit(pipe_of, name, tmp_path):
    pipe = pipe_of(name)
    options = needed(name)
    inversion = invert(pipe, tiny.images(2, 16, 24), PROMPTS, num_inference_steps=3, **options)
    inversion.save(tmp_path / "inversion")
    loaded = inversion.load(tmp_path / "inversion", pipe, prompt=PROMPTS)
    assert loaded.reconstruct(output_type="latent").bits_equal
    expected = inversion.edit("a dog", output_type="pt").images
    assert torch.equal(loaded.edit("a dog", output_type="pt").images, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_exact_in_16_bits(name):
    dtype = torch.bfloat16
    pipe = tiny.build(name).to(dtype)
    inversion = invert(
        pipe,
        tiny.images(1, 16, 24),
        "a cat",
        num_inference_steps=3,
        verify=True,
        **needed(name, count=1),
    )
    assert inversion.bits_equal and inversion.latents.dtype == dtype


def test_two_controlnets(tmp_path):
    pipe = tiny.build("controlnet")
    two = type(pipe)(
        **{**pipe.components, "controlnet": [pipe.controlnet, tiny.controlnet().controlnet.eval()]},
        requires_safety_checker=False,
    )
    two.set_progress_bar_config(disable=True)
    controls = [tiny.images(1, seed=3), tiny.images(1, seed=4)]
    options = {"control_image": controls, "controlnet_conditioning_scale": [0.5, 1.0]}
    inversion = invert(two, tiny.images(), "a cat", num_inference_steps=2, verify=True, **options)
    assert inversion.bits_equal
    inversion.save(tmp_path / "two")
    loaded = inversion.load(tmp_path / "two", two)
    same = loaded.edit("a dog", output_type="pt").images
    assert torch.equal(same, inversion.edit("a dog", output_type="pt").images)
    weaker = inversion.edit("a dog", output_type="pt", controlnet_conditioning_scale=0.0).images
    assert not torch.equal(weaker, same)


@pytest.mark.parametrize("shuffle", [False, True])
def test_guess_mode_shows_the_control_to_the_conditional_half_alone(shuffle):
    pipe = tiny.build("controlnet")
    # a ControlNet of shuffled content always guesses
    pipe.controlnet.register_to_config(global_pool_conditions=shuffle)
    guessed = {} if shuffle else {"guess_mode": True}
    common = {"guidance_scale": 2.0, "num_inference_steps": 3}
    control = tiny.images(1, seed=3)
    inversion = invert(
        pipe,
        tiny.images(),
        "a cat",
        solver="ddim",
        state="float32",
        control_image=control,
        **guessed,
        **common,
    )
    edited = inversion.edit("a dog", output_type="pt").images
    expected = _copy_with_own_scheduler(pipe)(
        "a dog",
        image=control,
        latents=inversion.latents,
        **guessed,
        output_type="pt",
        **common,
    ).images
    torch.testing.assert_close(edited, expected, rtol=0, atol=2e-4)


def test_flux_without_guidance_embedding():
    pipe = tiny.flux(guidance_embeds=False)
    pipe.set_progress_bar_config(disable=True)
    with pytest.warns(UserWarning, match="guidance_scale has no effect"):
        inversion = invert(
            pipe, tiny.images(), "a cat", guidance_scale=5.0, num_inference_steps=2, verify=True
        )
    assert inversion.bits_equal


def test_xl_sizes_reach_the_model(pipe_of):
    pipe = pipe_of("sdxl")

    def noise(**sizes):
        return invert(
            pipe, tiny.images(), "a cat", num_inference_steps=2, guidance_scale=2.0, **sizes
        ).state.sample()

    plain = noise()
    assert torch.equal(plain, noise(original_size=(16, 16), crops_coords_top_left=(0, 0)))
    assert not torch.equal(plain, noise(crops_coords_top_left=(8, 8)))
    assert not torch.equal(
        plain, noise(negative_original_size=(64, 64), negative_target_size=(16, 16))
    )


def test_xl_latents_with_statistics_of_their_own():
    pipe = tiny.build("sdxl")
    pipe.vae.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[2.0, 3.0, 4.0, 5.0])
    inversion = invert(
        pipe, tiny.images(), "a cat", solver="ddim", state="float32", num_inference_steps=3
    )
    # they go there and back: the floor is that of the autoencoder with its plain scaling
    plain = invert(tiny.build("sdxl"), tiny.images(), "a cat", num_inference_steps=2)
    assert inversion.vae_floor == pytest.approx(plain.vae_floor, rel=1e-4)
    assert not torch.allclose(inversion.image_latents, plain.image_latents)
    expected = _copy_with_own_scheduler(pipe)(
        "a dog",
        latents=inversion.latents,
        height=16,
        width=16,
        num_inference_steps=3,
        guidance_scale=3.0,
        output_type="pt",
    ).images
    edited = inversion.edit("a dog", output_type="pt").images
    torch.testing.assert_close(edited, expected, rtol=0, atol=2e-4)


def test_xl_marks_edits_and_not_reconstructions():
    class Watermark:
        @staticmethod
        def apply_watermark(images):
            return torch.full_like(images, -1)

    pipe = tiny.build("sdxl")
    pipe.watermark = Watermark
    inversion = invert(pipe, tiny.images(), "a cat", num_inference_steps=2)
    assert not inversion.edit("a dog", output_type="np").images.any()
    assert inversion.reconstruct(output_type="np").images.any()


def test_xl_decodes_in_float32_where_float16_overflows(pipe_of):
    """A copy is cast, so the pipeline's own autoencoder stays what and where it was."""
    half = tiny.build("sdxl").to(torch.float16)
    assert half.vae.config.force_upcast
    inversion = invert(half, tiny.images(), "a cat", num_inference_steps=2, verify=True)
    assert half.vae.dtype == torch.float16 and inversion.adapter.vae.dtype == torch.float32
    assert inversion.bits_equal
    whole = tiny.build("sdxl")
    whole.vae.to(torch.float16).to(torch.float32)
    reference = invert(whole, tiny.images(), "a cat", num_inference_steps=2)
    assert torch.equal(inversion.image_latents, reference.image_latents)


def test_the_grid_is_the_pipelines_own(pipe_of):
    """Flux shifts its even σ by the number of tokens; 3 has a fixed shift."""
    for name, size in (("flux", (16, 24)), ("sd3", (16, 24))):
        pipe = pipe_of(name)
        inversion = invert(
            pipe, tiny.images(1, *size), "a cat", num_inference_steps=4, guidance_scale=1.0
        )
        own = _copy_with_own_scheduler(pipe)
        own("a cat", height=size[0], width=size[1], num_inference_steps=4, output_type="latent")
        sigmas = own.scheduler.sigmas.double().numpy()[::-1]
        assert (inversion.schedule.sigma == sigmas).all()
