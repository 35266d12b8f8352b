"""A pipeline of the shipped one's kind with random weights, small enough to run in milliseconds."""

import pytest
import torch

from inpo_fast.demo import align, pipeline, roundtrip
from inpo_fast.shipped import scenes, train


@pytest.fixture(scope="session")
def shipped(tmp_path_factory):
    """A folder like inpo_fast/shipped: `model/` and `preferences.parquet`."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("shipped")
    blocks = {"layers_per_block": 1, "norm_num_groups": 4}
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        sample_size=64,
        mid_block_add_attention=False,
        **blocks,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=2,
        **blocks,
    )
    text_encoder: CLIPTextModel = train.build_text_encoder()
    train.assemble(vae, train.TextToImage(unet, text_encoder)).save_pretrained(folder / "model")
    write_pairs(folder / "preferences.parquet", count=12)
    return folder


def write_pairs(path, count):
    """Pairs whose winner shows the caption's scene and whose loser shows another, and one tie."""
    columns = {"jpg_0": [], "jpg_1": [], "label_0": [], "caption": []}
    chosen = scenes.sample_scenes(count + 1, torch.Generator().manual_seed(0))
    files = [train.encode_jpeg(image) for image in scenes.render(chosen)]
    for index in range(count):
        pair = files[index], files[(index + 1) % count]
        first_wins = index % 2 == 0
        columns["jpg_0"].append(pair[0] if first_wins else pair[1])
        columns["jpg_1"].append(pair[1] if first_wins else pair[0])
        columns["label_0"].append(float(first_wins))
        columns["caption"].append(scenes.prompt(chosen[index]))
    for column, value in zip(columns, (files[0], files[1], 0.5, "a tie"), strict=True):
        columns[column].append(value)
    train.write_preferences(columns, path)


@pytest.fixture(scope="session")
def tiny(shipped):
    return pipeline.load(shipped / "model", "cpu")


@pytest.fixture
def settings():
    """The demo in miniature."""
    from inpo_fast import demo

    return demo.Settings(
        scenes=2,
        round_trips=(roundtrip.Setting(steps=3),),
        edits=3,
        edit_steps=4,
        align=align.Settings(steps=2, pairs=2, prompts=3, sample_steps=2),
    )
