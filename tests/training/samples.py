"""Small pairs, sources and pipelines with random weights."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from inpo_fast.shipped import model_path
from inpo_fast.training.images import Preprocess
from inpo_fast.training.pairs import Ties


def picture(seed, size=(16, 24)):
    """RGB image of height and width `size`."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(seed, size=(16, 24), kind="PNG"):
    buffer = io.BytesIO()
    picture(seed, size).save(buffer, format=kind)
    return buffer.getvalue()


def row(number, *, label=1, caption=None, size=(16, 24), **change):
    return {
        "jpg_0": encoded(2 * number, size),
        "jpg_1": encoded(2 * number + 1, size),
        "label_0": label,
        "caption": f"a red circle {number}" if caption is None else caption,
        **change,
    }


def mixed_rows():
    """Ten rows with all that a source may hold: seven usable pairs, eight with the tie."""
    cut = encoded(1)
    rows = [row(0), row(1, label=0), row(2, label=0.5, caption="a tie")]
    rows.append(row(3, jpg_1=cut[: len(cut) // 2]))
    rows.append(row(4, size=(24, 16), caption="a red circle 0"))
    rows.append(row(5, caption=""))
    rows.append(row(0))
    rows.append(row(7, jpg_0=b"not an image"))
    rows.append(row(8, size=(17, 33)))
    rows.append(row(9, label=0, caption="blue"))
    return rows


def write_parquet(path, rows, **options):
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, path, **options)
    return path


BUCKETS = Preprocess(((16, 24), (24, 16)))
DROP = Ties("drop")


def save_pipeline(folder, *, xl=False, seed=0, **vae_options):
    """A Stable Diffusion or SDXL pipeline with random weights that uses the shipped tokenizer."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
    )

    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        **vae_options,
    )
    text = CLIPTextConfig(
        vocab_size=288,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        projection_dim=8,
        bos_token_id=286,
        eos_token_id=287,
        pad_token_id=287,
    )
    blocks = {
        "sample_size": 2,
        "block_out_channels": (8,),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "attention_head_dim": 2,
    }
    tokenizer = CLIPTokenizer.from_pretrained(model_path() / "tokenizer")
    parts = {
        "vae": vae,
        "tokenizer": tokenizer,
        "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1),
    }
    if xl:
        unet = UNet2DConditionModel(
            **blocks,
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=8 + 6 * 4,
        )
        pipe = StableDiffusionXLPipeline(
            **parts,
            text_encoder=CLIPTextModel(text),
            text_encoder_2=CLIPTextModelWithProjection(text),
            tokenizer_2=tokenizer,
            unet=unet,
        )
    else:
        pipe = StableDiffusionPipeline(
            **parts,
            text_encoder=CLIPTextModel(text),
            unet=UNet2DConditionModel(**blocks, cross_attention_dim=16),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.save_pretrained(folder)
    return folder
