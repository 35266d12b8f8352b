"""Pipelines of every family with random weights: small, but the code paths are the real ones."""

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from inpo_fast.shipped import model_path

WIDTH = 32
"""Of all embeddings."""


def _vae(channels=4, **options):
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        mid_block_add_attention=False,
        sample_size=16,
        **options,
    )


def _unet(**options):
    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
        **{"cross_attention_dim": WIDTH, "sample_size": 8, **options},
    )


def _clip(kind=CLIPTextModel, layers=2):
    return kind(
        CLIPTextConfig(
            vocab_size=300,
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=24,
            projection_dim=WIDTH,
            bos_token_id=286,
            eos_token_id=287,
            pad_token_id=287,
        )
    )


def _clip_tokenizer():
    return CLIPTokenizer.from_pretrained(str(model_path() / "tokenizer"))


def _t5():
    return T5EncoderModel(
        T5Config(vocab_size=64, d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2)
    )


def _t5_tokenizer():
    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5TokenizerFast(vocab=specials + letters, extra_ids=0)


def _ddim(**options):
    table = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    common = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    return DDIMScheduler(**table, **common, **options)


def _no_safety():
    return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def stable_diffusion(**scheduler):
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_clip(),
        tokenizer=_clip_tokenizer(),
        unet=_unet(),
        scheduler=_ddim(**scheduler),
        **_no_safety(),
    )


def stable_diffusion_2():
    """v-prediction with zero terminal SNR."""
    return stable_diffusion(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )


def controlnet(count=1):
    unet = _unet()
    nets = [
        ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8))
        for _ in range(count)
    ]
    for net in nets:
        # a fresh ControlNet adds nothing
        for parameter in net.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    return StableDiffusionControlNetPipeline(
        vae=_vae(),
        text_encoder=_clip(),
        tokenizer=_clip_tokenizer(),
        unet=unet,
        controlnet=nets[0] if count == 1 else nets,
        scheduler=_ddim(),
        **_no_safety(),
    )


def stable_diffusion_xl():
    unet = _unet(
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        transformer_layers_per_block=(1, 2),
    )
    return StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=_clip(layers=3),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_clip(CLIPTextModelWithProjection, layers=3),
        tokenizer_2=_clip_tokenizer(),
        unet=unet,
        scheduler=_ddim(timestep_spacing="leading"),
        add_watermarker=False,
    )


def stable_diffusion_3():
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=32,
    )
    t5 = T5EncoderModel(
        T5Config(vocab_size=64, d_model=2 * WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2)
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip(CLIPTextModelWithProjection, layers=3),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_clip(CLIPTextModelWithProjection, layers=3),
        tokenizer_2=_clip_tokenizer(),
        text_encoder_3=t5,
        tokenizer_3=_t5_tokenizer(),
    )


def flux(guidance_embeds=True):
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip(),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_t5(),
        tokenizer_2=_t5_tokenizer(),
        transformer=transformer,
    )


BUILDERS = {
    "sd": stable_diffusion,
    "sd2-v": stable_diffusion_2,
    "sdxl": stable_diffusion_xl,
    "controlnet": controlnet,
    "sd3": stable_diffusion_3,
    "flux": flux,
}


def build(name):
    """The pipeline of a family, always the same, in evaluation mode and without progress bars."""
    torch.manual_seed(0)
    pipe = BUILDERS[name]()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(count=1, height=16, width=16, seed=0):
    """[B, 3, H, W] in [0, 1]."""
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))
