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


def vae_blocks():
    return {
        "block_out_channels": (4, 4, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "norm_num_groups": 4,
    }


def clip_config():
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
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
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
    )

    torch.manual_seed(seed)
    vae = AutoencoderKL(**vae_blocks(), **vae_options)
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
            text_encoder=CLIPTextModel(clip_config()),
            text_encoder_2=CLIPTextModelWithProjection(clip_config()),
            tokenizer_2=tokenizer,
            unet=unet,
        )
    else:
        pipe = StableDiffusionPipeline(
            **parts,
            text_encoder=CLIPTextModel(clip_config()),
            unet=UNet2DConditionModel(**blocks, cross_attention_dim=16),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.save_pretrained(folder)
    return folder


def save_transformer_pipeline(folder, kind):
    """The encoders of a Stable Diffusion 3 or FLUX pipeline with random weights, no denoiser."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        StableDiffusion3Pipeline,
    )
    from transformers import (
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        T5Config,
        T5EncoderModel,
        T5Tokenizer,
    )

    torch.manual_seed(0)
    vae = AutoencoderKL(
        **vae_blocks(),
        latent_channels=16,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    t5 = T5EncoderModel(
        T5Config(vocab_size=30, d_model=40, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    t5_tokenizer = T5Tokenizer(vocab=vocabulary + letters, extra_ids=0)
    clip_tokenizer = CLIPTokenizer.from_pretrained(model_path() / "tokenizer")
    parts = {"vae": vae, "scheduler": FlowMatchEulerDiscreteScheduler(), "transformer": None}
    parts |= {"tokenizer": clip_tokenizer}
    if kind == "sd3":
        pipe = StableDiffusion3Pipeline(
            **parts,
            text_encoder=CLIPTextModelWithProjection(clip_config()),
            text_encoder_2=CLIPTextModelWithProjection(clip_config()),
            tokenizer_2=clip_tokenizer,
            text_encoder_3=t5,
            tokenizer_3=t5_tokenizer,
        )
    else:
        pipe = FluxPipeline(
            **parts,
            text_encoder=CLIPTextModel(clip_config()),
            text_encoder_2=t5,
            tokenizer_2=t5_tokenizer,
        )
    pipe.save_pretrained(folder)
    return folder
