"""What is refused, with what to change, before any model is called."""

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    UniPCMultistepScheduler,
)

from inpo_fast import Inversion, invert
from tests.pipelines import tiny


@pytest.fixture
def guarded(pipe, monkeypatch):
    """A pipeline whose models must not be called."""

    def forbidden(*_, **__):
        raise AssertionError("a model was called")

    for part in (pipe.unet, pipe.text_encoder):
        monkeypatch.setattr(part, "forward", forbidden)
    monkeypatch.setattr(pipe.vae, "encode", forbidden)
    return pipe


def refused(pipe, match, error=ValueError, image=None, prompt="a cat", **options):
    image = tiny.images() if image is None else image
    with pytest.raises(error, match=match):
        invert(pipe, image, prompt, **{"num_inference_steps": 3, **options})


@pytest.mark.parametrize(
    ("image", "error", "match"),
    [
        ([], ValueError, "at least one image"),
        (PIL.Image.new("RGBA", (16, 16)), ValueError, r"mode RGB, got RGBA; use image.convert"),
        (PIL.Image.new("L", (16, 16)), ValueError, "mode RGB, got L"),
        (PIL.Image.new("RGB", (17, 16)), ValueError, "multiples of 2, got 16 x 17; resize to"),
        (np.zeros((16, 16)), ValueError, r"\[H, W, 3\]"),
        (np.zeros((3, 16, 16)), ValueError, r"\[H, W, 3\]"),
        (np.zeros((16, 16, 3), dtype=np.int64), TypeError, "uint8 or floating, got int64"),
        (np.zeros((16, 16, 3), dtype=object), TypeError, "uint8 or floating, got object"),
        (torch.zeros(3, 16, 16, dtype=torch.int64), TypeError, "uint8 or floating"),
        (np.full((16, 16, 3), 255.0), ValueError, r"in \[0, 1\], got 255"),
        (torch.full((3, 16, 16), -1.0), ValueError, r"in \[0, 1\]"),
        (torch.full((3, 16, 16), torch.nan), ValueError, r"finite values in \[0, 1\]"),
        (torch.zeros(16, 16, 3), ValueError, r"\[3, H, W\]"),
        (torch.zeros(0, 3, 16, 16), ValueError, "must not be empty"),
        ([tiny.images(), tiny.images(1, 16, 24)], ValueError, "one size"),
        ("cat.png", TypeError, "PIL image, a numpy array, a tensor"),
    ],
)
def test_images(guarded, image, error, match):
    refused(guarded, match, error, image=image)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"prompt": None}, ValueError, "exactly one of prompt"),
        ({"prompt": []}, ValueError, "a list of 0"),
        ({"prompt": ["a", "b"]}, ValueError, "1 of them, got a list of 2"),
        ({"prompt": 3}, TypeError, "prompt must be a string"),
        ({"negative_prompt": ["a", "b"]}, ValueError, "negative_prompt must be a string or 1"),
        ({"prompt_embeds": torch.zeros(1, 4, 32)}, ValueError, "exactly one of prompt"),
        (
            {"prompt": None, "prompt_embeds": torch.zeros(2, 4, 32)},
            ValueError,
            r"prompt_embeds must be \[1, L, D\], got \(2, 4, 32\)",
        ),
        (
            {"prompt": None, "prompt_embeds": torch.zeros(1, 32)},
            ValueError,
            r"prompt_embeds must be \[1, L, D\], got \(1, 32\)",
        ),
        ({"prompt": None, "prompt_embeds": "a"}, TypeError, "floating tensor"),
        (
            {"negative_prompt": "a", "negative_prompt_embeds": torch.zeros(1, 4, 32)},
            ValueError,
            "at most one of negative_prompt",
        ),
        ({"guidance_scale": [1.0, 2.0]}, ValueError, "one number or 1, got a list of 2"),
        ({"guidance_scale": float("nan")}, ValueError, "guidance_scale must be finite"),
        ({"guidance_scale": "3"}, ValueError, "guidance_scale must be finite"),
        ({"guidance_scale": [True]}, ValueError, "guidance_scale must be finite"),
        ({"num_inference_steps": 0}, ValueError, "num_inference_steps must be at least 1, got 0"),
        ({"num_inference_steps": 2.5}, TypeError, "num_inference_steps must be an integer"),
        ({"num_inference_steps": 1001}, ValueError, "num_inference_steps must be at most the 1000"),
        ({"num_inference_steps": 1}, ValueError, "at least 2 steps, got 1"),
        ({"num_inference_steps": 10, "strength": 0.1}, ValueError, "at least 2 steps"),
        ({"strength": 0}, ValueError, r"strength must be in \(0, 1\]"),
        ({"strength": 1.5}, ValueError, r"strength must be in \(0, 1\]"),
        ({"strength": True}, ValueError, r"strength must be in \(0, 1\], got True"),
        ({"timesteps": [900, 10]}, ValueError, "left out or the 2 of the explicit grid"),
        (
            {"num_inference_steps": None, "timesteps": [10, 900]},
            ValueError,
            "timesteps must fall strictly",
        ),
        (
            {"num_inference_steps": None, "timesteps": "abc"},
            ValueError,
            "timesteps must be a non-empty list of integers, got",
        ),
        ({"num_inference_steps": None, "sigmas": [1.0, 0.5]}, ValueError, "flow-matching"),
        ({"timesteps": [1], "sigmas": [1.0]}, ValueError, "at most one of timesteps"),
        ({"solver": "euler"}, ValueError, "solver must be one of .*null-text"),
        ({"solver": 3}, TypeError, "name or a function"),
        ({"gamma": 2.0}, ValueError, r"gamma must be in \(0, 1\]"),
        ({"p": 0.9}, TypeError, r"unknown arguments \['p'\]: the solver takes \['gamma'"),
        ({"control_image": tiny.images()}, TypeError, "unknown arguments"),
        ({"state": "int8"}, ValueError, "state must be 'lattice'"),
        ({"generator": 3}, TypeError, "torch.Generator"),
        ({"generator": [torch.Generator()] * 2}, ValueError, "one or 1, got a list of 2"),
        ({"solver": "null-text", "guidance_scale": 1.0}, ValueError, "must differ from 1"),
        ({"solver": "null-text", "num_inner_steps": 0}, ValueError, "at least 1"),
        ({"solver": "null-text", "learning_rate": 0.0}, ValueError, "positive"),
        ({"solver": "null-text", "early_stop": -1.0}, ValueError, "at least 0"),
        ({"clip_skip": "a"}, TypeError, "clip_skip must be an integer, got 'a'"),
        ({"clip_skip": 2}, ValueError, "clip_skip must be within 0 … 1, got 2"),
        ({"clip_skip": -1}, ValueError, "clip_skip must be within 0 … 1, got -1"),
    ],
)
def test_arguments(guarded, options, error, match):
    refused(guarded, match, error, **options)


@pytest.mark.parametrize(
    ("name", "options", "error", "match"),
    [
        ("sdxl", {"original_size": 512}, ValueError, "original_size must be two integers, height"),
        ("sdxl", {"target_size": (512,)}, ValueError, "target_size must be two integers"),
        ("sdxl", {"crops_coords_top_left": (0.5, 0)}, ValueError, "crops_coords_top_left must be"),
        (
            "sdxl",
            {"negative_original_size": (16, 16)},
            ValueError,
            "negative_original_size and negative_target_size must be given together",
        ),
        ("sdxl", {"clip_skip": 3}, ValueError, "clip_skip must be within 0 … 2"),
        ("sdxl", {"prompt_2": ["a", "b"]}, ValueError, "prompt_2 must be a string or 1"),
        ("sdxl", {"pooled_prompt_embeds": torch.zeros(1, 2, 3)}, ValueError, r"\[1, D\], got"),
        ("sd3", {"max_sequence_length": 0}, ValueError, "max_sequence_length must be within 1 …"),
        ("sd3", {"max_sequence_length": "a"}, TypeError, "max_sequence_length must be an integer"),
        ("flux", {"max_sequence_length": 513}, ValueError, "must be within 1 … 512, got 513"),
        ("flux", {"true_cfg_scale": "a"}, ValueError, "true_cfg_scale must be finite numbers"),
        ("flux", {"true_cfg_scale": True}, ValueError, "true_cfg_scale must be finite numbers"),
        ("flux", {"true_cfg_scale": [1.0, 2.0]}, ValueError, "true_cfg_scale must be one number"),
        (
            "controlnet",
            {"controlnet_conditioning_scale": "a"},
            ValueError,
            "controlnet_conditioning_scale must be finite numbers, one or 1",
        ),
        ("controlnet", {"guess_mode": "no"}, TypeError, "guess_mode must be True or False"),
        (
            "sd3",
            {"num_inference_steps": None, "sigmas": [0.2, 0.5]},
            ValueError,
            r"sigmas must fall strictly within \[0, 1\], got \[0.2, 0.5\]",
        ),
        (
            "sd3",
            {"num_inference_steps": None, "sigmas": [2.0, float("nan")]},
            ValueError,
            "sigmas must fall strictly within",
        ),
        ("sd3", {"num_inference_steps": None, "sigmas": "ab"}, ValueError, "list of numbers"),
    ],
)
def test_arguments_of_a_family(pipe_of, monkeypatch, name, options, error, match):
    pipe = pipe_of(name)

    def forbidden(*_, **__):
        raise AssertionError("a model was called")

    monkeypatch.setattr(pipe, "encode_prompt", forbidden)
    monkeypatch.setattr(pipe.vae, "encode", forbidden)
    if name == "controlnet":
        options = {"control_image": tiny.images(), **options}
    refused(pipe, match, error, **options)


def test_callbacks(pipe):
    refused(pipe, "on_step_end must be a function, got int", TypeError, callback_on_step_end=3)
    refused(
        pipe,
        "callback_on_step_end must return the dict of its tensors.* got list",
        TypeError,
        callback_on_step_end=lambda *_: [1],
    )


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_an_autoencoder_that_overflows_in_float16(name, half):
    """SDXL's own says so in its configuration and is copied to float32; of others nobody knows."""
    pipe = tiny.build(name).to(torch.float16)
    pipe.vae.register_to_config(force_upcast=False)
    inversion = invert(pipe, tiny.images(), "a cat", num_inference_steps=2)
    vae = pipe.vae
    # its result stays as large as it was, what is between two layers does not
    if half == "encoder":
        first, second, factor = vae.encoder.conv_out, vae.quant_conv, 3e5
    else:
        first, second, factor = vae.decoder.conv_norm_out, vae.decoder.conv_out, 6e4
    with torch.no_grad():
        first.weight.mul_(factor)
        first.bias.mul_(factor)
        second.weight.div_(factor)
    kind = "latents" if half == "encoder" else "images"
    said = rf"pipe.vae must give finite {kind}, got NaN.* float16; call pipe.vae.to\(torch.float32"
    refused(pipe, said)
    if half == "decoder":
        with pytest.raises(ValueError, match=said):
            inversion.edit("a dog")
    pipe.vae.to(torch.float32)
    assert invert(pipe, tiny.images(), "a cat", num_inference_steps=2, verify=True).bits_equal


def test_names_of_callback_tensors(pipe):
    refused(
        pipe,
        r"must be in \['latents', 'prompt_embeds'.* got \['nothing'\]",
        callback_on_step_end=lambda *_: {},
        callback_on_step_end_tensor_inputs=["nothing"],
    )


def with_scheduler(scheduler, name="sd", **options):
    pipe = tiny.build(name)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **options)
    return pipe


def test_schedulers():
    refused(with_scheduler(DDPMScheduler, clip_sample=True), "clip_sample=False")
    refused(with_scheduler(EDMEulerScheduler), "alphas_cumprod or be a flow-matching scheduler")
    wrong = with_scheduler(DDIMScheduler, prediction_type="flow_prediction")
    refused(wrong, "prediction_type that the model was trained with.*got 'flow_prediction'")
    euler = with_scheduler(EulerDiscreteScheduler)
    assert invert(euler, tiny.images(), "a cat", num_inference_steps=2, verify=True).bits_equal
    flow = with_scheduler(UniPCMultistepScheduler, use_flow_sigmas=True)
    refused(flow, "use_flow_sigmas=False.*FlowMatchEulerDiscreteScheduler")
    heun = with_scheduler(FlowMatchHeunDiscreteScheduler, "sd3")
    refused(heun, r"one sigma a step, got FlowMatchHeun.*EulerDiscreteScheduler\.from_config")


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_flow_model_is_never_taken_for_an_epsilon_model(name):
    pipe = tiny.build(name)
    pipe.scheduler = DDIMScheduler(clip_sample=False)
    refused(pipe, "flow-matching scheduler for")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    refused(pipe, "takes sigmas, not timesteps", timesteps=[900, 10, 1])


def test_a_scheduler_that_does_not_say_what_the_model_predicts():
    pipe = tiny.build("sd")

    class Silent:
        config = type("Config", (), {})()
        alphas_cumprod = pipe.scheduler.alphas_cumprod

    pipe.scheduler = Silent()
    refused(pipe, "prediction_type that the model was trained with.*got None")


def test_pipelines():
    pipe = tiny.build("sd")
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    refused(other, r"StableDiffusionImg2ImgPipeline; .*from_pipe\(pipe\)")
    refused(object(), "pipe must be one of")


def test_models():
    pipe = tiny.build("sd")
    torch.manual_seed(0)
    pipe.unet = tiny._unet(in_channels=9)
    refused(pipe, "inpainting")
    pipe.unet = tiny._unet(time_cond_proj_dim=8)
    refused(pipe, "distilled")
    pipe.unet = tiny._unet(dropout=0.1)
    refused(pipe, r"evaluation mode.*pipe.unet.eval\(\)")
    pipe.unet.eval()
    assert invert(pipe, tiny.images(), "a cat", num_inference_steps=2, verify=True).bits_equal


def test_embeddings_that_belong_together(pipe_of):
    text = torch.zeros(1, 24, 2 * tiny.WIDTH)
    for name in ("sdxl", "sd3", "flux"):
        refused(
            pipe_of(name),
            "prompt_embeds and pooled_prompt_embeds must be given together",
            prompt=None,
            prompt_embeds=text,
        )
    refused(
        pipe_of("sd"),
        "negative_prompt_embeds must have the shape of prompt_embeds",
        negative_prompt_embeds=torch.zeros(1, 3, tiny.WIDTH),
    )


def test_control_images(pipe_of):
    pipe = pipe_of("controlnet")
    refused(pipe, "control_image must be given")
    refused(pipe, "height and width", control_image=tiny.images(1, 24, 16))
    refused(pipe, "must be 1 or 1 images", control_image=tiny.images(2))
    refused(
        pipe,
        "controlnet_conditioning_scale must be one number or 1",
        control_image=tiny.images(),
        controlnet_conditioning_scale=[1.0, 2.0],
    )


def test_flux_says_what_its_negative_prompt_needs(pipe_of):
    pipe = pipe_of("flux")
    refused(pipe, "negative_prompt must be given with true_cfg_scale", true_cfg_scale=2.0)
    with pytest.warns(UserWarning, match="negative_prompt has no effect without true_cfg_scale"):
        invert(pipe, tiny.images(), "a cat", negative_prompt="bad", num_inference_steps=2)


def test_a_caching_transformer_is_refused():
    from diffusers import FasterCacheConfig

    pipe = tiny.build("flux")
    pipe.transformer.enable_cache(
        FasterCacheConfig(current_timestep_callback=lambda: 1, is_guidance_distilled=True)
    )
    refused(pipe, r"pipe.transformer.disable_cache\(\)")


def test_edits(pipe):
    inversion = invert(pipe, tiny.images(2), "a cat", num_inference_steps=3)
    with pytest.raises(ValueError, match="exactly one of prompt"):
        inversion.edit()
    with pytest.raises(ValueError, match="2 of them, got a list of 1"):
        inversion.edit(["a dog"])
    with pytest.raises(ValueError, match="output_type must be one of"):
        inversion.edit("a dog", output_type="jpeg")
    with pytest.raises(ValueError, match="output_type must be one of"):
        inversion.reconstruct(output_type="jpeg")
    with pytest.raises(TypeError, match=r"unknown arguments \['gamma'\]"):
        inversion.edit("a dog", gamma=1)
    with pytest.raises(ValueError, match="guidance_scale must be one number or 2"):
        inversion.edit("a dog", guidance_scale=[1.0])
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator"):
        inversion.edit("a dog", generator=3)
    with pytest.raises(ValueError, match="generator must be one or 2"):
        inversion.edit("a dog", generator=[torch.Generator()])
    # the negative half is inherited as it was encoded
    short = torch.zeros(2, 8, tiny.WIDTH)
    said = (
        r"prompt_embeds must have the shape \(2, 24, 32\) of the inversion's negative_prompt_embe"
    )
    with pytest.raises(ValueError, match=rf"{said}ds, got \(2, 8, 32\); give negative_prompt as w"):
        inversion.edit(prompt_embeds=short)
    inversion.edit(prompt_embeds=short, negative_prompt="")
    inversion.edit(prompt_embeds=short, guidance_scale=1.0)


def test_a_pipeline_that_is_cast_after_the_inversion():
    pipe = tiny.build("sd")
    inversion = invert(pipe, tiny.images(), "a cat", num_inference_steps=2)
    pipe.to(torch.bfloat16)
    said = "the inversion was made with unet in float32, which the pipeline has in bfloat16"
    with pytest.raises(ValueError, match=said):
        inversion.reconstruct()
    with pytest.raises(ValueError, match=said):
        inversion.edit("a dog")
    pipe.to(torch.float32)
    pipe.vae.to(torch.bfloat16)  # on the way back only the pictures are its
    inversion.edit("a dog")


def test_an_error_in_a_callback_leaves_the_pipeline_as_it_was(pipe):
    before = dict(vars(pipe))

    def broken(*_):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        invert(pipe, tiny.images(), "a cat", num_inference_steps=3, callback_on_step_end=broken)
    assert vars(pipe) == before
    assert isinstance(invert(pipe, tiny.images(), "a cat", num_inference_steps=2), Inversion)
