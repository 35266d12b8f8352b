"""Very small models of every family, and pairs for them: a training step takes milliseconds."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from inpo_fast.training.config import PreferenceConfig
from inpo_fast.training.stored import MemoryPairs

TEXT, WIDTH, SIZE = 4, 8, 8
PAIRS = 12


def unet(**changes):
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            **{
                "sample_size": SIZE,
                "block_out_channels": (8, 8),
                "layers_per_block": 1,
                "norm_num_groups": 4,
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
                "cross_attention_dim": WIDTH,
                "attention_head_dim": 4,
                **changes,
            }
        )


def with_trained_norms(model):
    """The model, its norms as training leaves them: fresh ones are 1 and 0, which no dtype rounds,
    so that whoever rounds them by mistake goes unnoticed."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            torch.nn.init.normal_(module.weight, 1.0, 0.1, generator)
            torch.nn.init.normal_(module.bias, 0.0, 0.1, generator)
    return model


def unet_xl():
    return unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=WIDTH + 6 * 4,
    )


def sd3():
    from diffusers import SD3Transformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SD3Transformer2DModel(
            sample_size=SIZE,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=4,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            caption_projection_dim=8,
            pooled_projection_dim=WIDTH,
            out_channels=4,
            pos_embed_max_size=8,
        )


def flux():
    from diffusers import FluxTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=1,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(2, 2, 4),
        )


FAMILIES = {
    "StableDiffusionPipeline": ("unet", unet),
    "StableDiffusionXLPipeline": ("unet", unet_xl),
    "StableDiffusion3Pipeline": ("transformer", sd3),
    "FluxPipeline": ("transformer", flux),
}


def save_pipeline(folder: Path, family: str = "StableDiffusionPipeline", **scheduler) -> Path:
    """A pipeline folder with denoiser and scheduler only."""
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    component, make = FAMILIES[family]
    make().save_pretrained(folder / component)
    flow = component == "transformer"
    kind = FlowMatchEulerDiscreteScheduler if flow else DDIMScheduler
    dynamic = {"use_dynamic_shifting": True} if family == "FluxPipeline" else {}
    stable = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "steps_offset": 1,
    }
    noise = dynamic if flow else stable
    kind(**{**noise, **scheduler}).save_pretrained(folder / "scheduler")
    parts = ["vae", "text_encoder", "tokenizer"]
    if family != "StableDiffusionPipeline":
        parts += ["text_encoder_2", "tokenizer_2"]
    if family == "StableDiffusion3Pipeline":
        parts += ["text_encoder_3", "tokenizer_3"]
    if family == "StableDiffusionPipeline":
        parts += ["safety_checker", "feature_extractor"]
    index = {
        "_class_name": family,
        component: ["diffusers", type(make()).__name__],
        "scheduler": ["diffusers", kind.__name__],
        **{part: [None, None] for part in parts},
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def load_pipeline(folder: Path):
    """What `save_pipeline` wrote, as diffusers reads it."""
    from diffusers import DiffusionPipeline

    index = json.loads((folder / "model_index.json").read_text())
    return DiffusionPipeline.from_pretrained(
        folder, **{part: None for part, kind in index.items() if kind == [None, None]}
    )


def pairs(count: int = PAIRS, *, seed: int = 0, xl: bool = False, size: int = SIZE) -> MemoryPairs:
    """Bright winners and dark losers, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    bright = 1 + 0.3 * torch.randn(count, 1, 4, size, size, generator=generator)
    text = {
        "prompt_embeds": torch.randn(count, TEXT, WIDTH, generator=generator),
        "pooled_prompt_embeds": torch.randn(count, WIDTH, generator=generator),
    }
    time_ids = torch.full((count, 2, 6), float(8 * size)) if xl else None
    empty = {name: value[0] * 0 for name, value in text.items()}
    return MemoryPairs(
        torch.cat([bright, -bright], dim=1), None, text, empty_text=empty, time_ids=time_ids
    )


def config(model: Path, output: Path, **changes) -> PreferenceConfig:
    """Three steps of two pairs."""
    return PreferenceConfig(
        **{
            "pretrained_model_name_or_path": str(model),
            "output_dir": str(output),
            "max_train_steps": 3,
            "train_batch_size": 2,
            "lr_warmup_steps": 0,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "checkpointing_steps": 1000,
            **changes,
        }
    )
