"""Pipelines with random weights: small, but the code paths are the real ones."""

import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from transformers import CLIPTextModelWithProjection

from tests.pipelines.tiny import WIDTH, _clip, _clip_tokenizer, _unet, _vae
from tests.schedulers.cases import STABLE_DIFFUSION

SIZE = 16
"""Of the images; the latents are half as large."""


def _stable_diffusion(cls, **parts):
    torch.manual_seed(0)
    return cls(
        vae=_vae(),
        text_encoder=_clip(layers=3),
        tokenizer=_clip_tokenizer(),
        unet=_unet(),
        scheduler=DDIMScheduler(**STABLE_DIFFUSION),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **parts,
    )


def _controlnet():
    torch.manual_seed(1)
    net = ControlNetModel.from_unet(_unet(), conditioning_embedding_out_channels=(8, 8))
    for parameter in net.parameters():
        # a fresh ControlNet adds nothing
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return net


def _xl(cls):
    torch.manual_seed(0)
    return cls(
        vae=_vae(),
        text_encoder=_clip(layers=3),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_clip(CLIPTextModelWithProjection, layers=3),
        tokenizer_2=_clip_tokenizer(),
        unet=_unet(
            cross_attention_dim=2 * WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
            transformer_layers_per_block=(1, 2),
        ),
        scheduler=DDIMScheduler(**STABLE_DIFFUSION),
        add_watermarker=False,
    )


def image():
    """[1, 3, H, W] in [0, 1]."""
    return torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))


def mask():
    """[1, 1, H, W] the left half is painted anew."""
    left = torch.zeros(1, 1, SIZE, SIZE)
    left[..., : SIZE // 2] = 1
    return left


SD, XL = StableDiffusionPipeline, StableDiffusionXLPipeline

FAMILIES = {
    "sd": (lambda: _stable_diffusion(SD), {}),
    "img2img": (
        lambda: _stable_diffusion(StableDiffusionImg2ImgPipeline),
        {"image": image(), "strength": 0.6},
    ),
    "inpaint": (
        lambda: _stable_diffusion(StableDiffusionInpaintPipeline),
        {"image": image(), "mask_image": mask(), "strength": 0.8, "height": SIZE, "width": SIZE},
    ),
    "controlnet": (
        lambda: _stable_diffusion(StableDiffusionControlNetPipeline, controlnet=_controlnet()),
        {"image": image()},
    ),
    "controlnet-img2img": (
        lambda: _stable_diffusion(
            StableDiffusionControlNetImg2ImgPipeline, controlnet=_controlnet()
        ),
        {"image": image(), "control_image": image(), "strength": 0.6},
    ),
    "sdxl": (lambda: _xl(XL), {}),
    "sdxl-img2img": (
        lambda: _xl(StableDiffusionXLImg2ImgPipeline),
        {"image": image(), "strength": 0.6},
    ),
    "sdxl-inpaint": (
        lambda: _xl(StableDiffusionXLInpaintPipeline),
        {"image": image(), "mask_image": mask(), "strength": 0.8, "height": SIZE, "width": SIZE},
    ),
}
"""How to make a pipeline, and what it is called with beside a prompt."""


def build(name):
    """The pipeline of a family, always the same, in evaluation mode, without progress bars."""
    make, _ = FAMILIES[name]
    pipe = make()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe, name, *, steps=5, seed=0, **options):
    """The latents of a call."""
    _, own = FAMILIES[name]
    arguments = {
        "prompt": "a red circle",
        "num_inference_steps": steps,
        "guidance_scale": 3.0,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
        **own,
        **options,
    }
    return pipe(**arguments).images
