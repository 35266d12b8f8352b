"""Win rates, their intervals, scorers, and the command."""

import json
import math
import re

import numpy as np
import pytest
import torch

from inpo_fast import evaluation, shipped
from inpo_fast.cli import main
from inpo_fast.evaluation import command, scorers
from inpo_fast.evaluation.compare import Comparison
from inpo_fast.evaluation.models import Parts
from inpo_fast.training import PreferenceConfig, weights
from inpo_fast.training.artefacts import CONFIG
from inpo_fast.training.checkpoint import STATE

PROMPTS = shipped.held_out_prompts(2)
PROMPTS_FILE = "\n\n".join(PROMPTS).encode()


def test_wilson_intervals_of_the_literature():
    """Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for wins, trials, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        found = evaluation.wilson(wins, trials)
        assert found.low == pytest.approx(low, abs=5e-5)
        assert found.high == pytest.approx(high, abs=5e-5)
    with pytest.raises(ValueError, match="wins must be in 0 … trials"):
        evaluation.wilson(3, 2)


def test_the_bootstrap_resamples_prompts_not_images():
    """Equal images of a prompt add no certainty: the interval is that of the prompts."""
    once = np.random.default_rng(0).normal(size=(400, 1))
    low, high = evaluation.bootstrap(once)
    # a mean of 400: deviation s/20, and the interval is ± 1.96 of them
    expected = 1.96 * once.std(ddof=1) / 20
    assert (high - low) / 2 == pytest.approx(expected, rel=0.05)
    assert evaluation.bootstrap(np.repeat(once, 8, axis=1)) == pytest.approx((low, high))
    with pytest.raises(ValueError, match="not empty"):
        evaluation.bootstrap(once[:0])


def test_wins_ties_and_differences():
    mine = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    theirs = torch.tensor([[0.0, 2.0], [4.0, -1.0]])
    found = Comparison.of("s", mine, theirs)
    assert (found.win_rate, found.ties, found.difference) == (2.5 / 4, 1, 0.25)
    assert found.wilson_95 == evaluation.wilson(2.5, 4)
    assert "62.5%" in found.text()
    mirrored = Comparison.of("s", theirs, mine)
    assert mirrored.win_rate == 1 - found.win_rate
    with pytest.raises(ValueError, match="for the baseline must be finite"):
        Comparison.of("s", mine, theirs * math.nan)


def test_the_reader_scores_attributes():
    prompts = shipped.held_out_prompts(3)
    images = (shipped.render([shipped.parse(p) for p in prompts]) + 1) / 2
    scorer = evaluation.make_scorer("attributes")
    assert scorer(images, prompts).tolist() == [1, 1, 1]
    assert scorer(images, prompts[1:] + prompts[:1]).max() < 1


def test_jpeg_sizes_grow_with_detail():
    smooth, noise = torch.zeros(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    sizes = evaluation.make_scorer("jpeg-size")(torch.cat([smooth, noise]), ["", ""])
    assert 100 < sizes[0] < sizes[1]


@pytest.fixture
def clip(monkeypatch):
    """A CLIP with random weights in the place of the downloaded ones, and pixels as they are."""
    import transformers

    torch.manual_seed(0)
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = transformers.CLIPConfig(
        text_config={**small, "num_attention_heads": 2, "vocab_size": 300, "eos_token_id": 2},
        vision_config={**small, "num_attention_heads": 2, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    model = transformers.CLIPModel(config)

    def prepare(text, images, **_):
        ids = torch.tensor([[min(ord(c), 299) for c in t[:3].ljust(3)] for t in text])
        pixels = torch.stack([torch.from_numpy(np.array(i)) for i in images]).permute(0, 3, 1, 2)
        return transformers.BatchEncoding({"input_ids": ids, "pixel_values": pixels / 255})

    monkeypatch.setattr(transformers.CLIPModel, "from_pretrained", lambda _: model)
    monkeypatch.setattr(transformers.CLIPProcessor, "from_pretrained", lambda _: prepare)
    return model, prepare


@pytest.mark.parametrize("name", ["clip", "pickscore"])
def test_clip_scores_are_cosines(clip, name):
    model, prepare = clip
    images = torch.rand(3, 3, 32, 32)
    prompts = ["abc", "xyz", "a b"]
    found = evaluation.make_scorer(name)(images, prompts)
    output = model(**prepare(prompts, scorers._pictures(images)))
    cosine = torch.cosine_similarity(output.image_embeds, output.text_embeds)
    expected = 100 * (cosine.clamp(min=0) if name == "clip" else cosine)
    assert torch.allclose(found, expected.detach(), atol=1e-4)


def test_what_is_missing_is_named(monkeypatch):
    import transformers

    with pytest.raises(ValueError, match="scorer must be one of attributes, "):
        evaluation.make_scorer("taste")
    for name, package in (("hpsv2", "hpsv2"), ("aesthetic", "simple-aesthetics-predictor")):
        with pytest.raises(evaluation.ScorerError, match=f"pip install {package}"):
            evaluation.make_scorer(name)

    def absent(_):
        raise OSError("not cached")

    monkeypatch.setattr(transformers.CLIPModel, "from_pretrained", absent)
    with pytest.raises(evaluation.ScorerError, match="hf download yuvalkirstain/PickScore_v1"):
        evaluation.make_scorer("pickscore")


def test_equal_models_tie_everywhere():
    settings = evaluation.Settings(
        ("a large red circle", "a small blue square"), (3, 4), steps=2, batch_size=3
    )
    scorer = {"jpeg-size": evaluation.make_scorer("jpeg-size")}
    (found,), schedulers = evaluation.compare(
        shipped.load_pipeline, shipped.load_pipeline, settings, scorer
    )
    assert (found.win_rate, found.ties, found.difference) == (0.5, 4, 0)
    assert len({score for row in found.candidate for score in row}) > 1
    assert schedulers["candidate"]["class"] == schedulers["baseline"]["class"]


def test_an_image_depends_on_its_seed_alone():
    seen = {}

    def keep(name, prompt, seed, image):
        seen.setdefault((prompt, seed), []).append(image)

    for batch in (1, 4):
        settings = evaluation.Settings(("a large red circle",), (0, 1), steps=1, batch_size=batch)
        evaluation.compare(shipped.load_pipeline, shipped.load_pipeline, settings, {}, keep=keep)
    assert seen.keys() == {(0, 0), (0, 1)}
    for images in seen.values():
        # another batch size rounds differently, as the sampler's docs say
        assert all(torch.allclose(image, images[0], atol=1e-3) for image in images)
    assert not torch.allclose(seen[0, 0][0], seen[0, 1][0], atol=1e-2)


@pytest.fixture
def trained(tmp_path):
    """A folder as a full training leaves it, with a moved denoiser."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(shipped.model_path(), subfolder="unet")
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.5)
    unet.save_pretrained(tmp_path / "trained" / "unet")
    return tmp_path / "trained"


def run(tmp_path, candidate, *more, prompts=PROMPTS_FILE):
    if prompts is not None:
        (tmp_path / "prompts.txt").write_bytes(prompts)
    return main(
        [
            *("eval", str(candidate), "--prompts", str(tmp_path / "prompts.txt")),
            *("--pretrained_model_name_or_path", str(shipped.model_path())),
            *("--scorer", "attributes", "jpeg-size", "--json", str(tmp_path / "eval.json")),
            *("--num_seeds", "2", "--num_inference_steps", "2", "--device", "cpu"),
            *("--images", str(tmp_path / "images"), *more),
        ]
    )


def test_the_command_pins_everything(tmp_path, trained, capsys):
    assert run(tmp_path, trained) == 0
    assert "attributes: the candidate wins" in capsys.readouterr().out
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["settings"]["prompts"] == PROMPTS
    assert found["settings"]["seeds"] == [0, 1]
    assert found["versions"]["diffusers"]
    assert [c["scorer"] for c in found["comparisons"]] == ["attributes", "jpeg-size"]
    assert found["comparisons"][1]["ties"] < 4
    candidate, baseline = (found["models"][name] for name in ("candidate", "baseline"))
    assert candidate["scheduler"] == baseline["scheduler"]
    extra = candidate["sha256"].keys() - baseline["sha256"].keys()
    assert extra == {"trained/unet/diffusion_pytorch_model.safetensors"}
    assert all(len(digest) == 64 for digest in candidate["sha256"].values())
    from PIL import Image

    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert names == ["00000-0.png", "00000-1.png", "00001-0.png", "00001-1.png"]
    assert Image.open(tmp_path / "images" / names[0]).size == (128, 64)


def test_the_command_overwrites_nothing_unasked(tmp_path, trained, capsys, monkeypatch):
    def drawn(*_, **__):
        raise OSError("drawn")

    monkeypatch.setattr(Parts, "load", drawn)
    (tmp_path / "images").mkdir()
    for flags in ((), ("--overwrite",)):
        assert run(tmp_path, trained, *flags) == 1
        assert capsys.readouterr().err == "inpo-fast eval: drawn\n"
    (tmp_path / "images" / "mine").touch()
    assert run(tmp_path, trained) == 1
    assert "images is not empty; name another folder, or give --over" in capsys.readouterr().err
    (tmp_path / "eval.json").write_text("mine")
    assert run(tmp_path, trained) == 1
    assert "eval.json exists; name another file, or give --overwrite" in capsys.readouterr().err
    assert run(tmp_path, trained, "--overwrite") == 1
    assert capsys.readouterr().err == "inpo-fast eval: drawn\n"
    assert run(tmp_path, trained, "--json", str(tmp_path / "no" / "eval.json")) == 1
    assert f"no folder {tmp_path / 'no'} to write eval.json to" in capsys.readouterr().err
    assert run(tmp_path, trained, "--overwrite", "--images", str(tmp_path / "eval.json")) == 1
    assert "eval.json is a file; name a folder to write to" in capsys.readouterr().err
    assert (tmp_path / "eval.json").read_text() == "mine"


def test_what_is_no_model_is_refused_before_anything_is_loaded(
    tmp_path, trained, capsys, monkeypatch
):
    def loaded(*_, **__):
        raise AssertionError("something was loaded")

    monkeypatch.setattr(Parts, "load", loaded)
    monkeypatch.setattr(command, "make_scorer", loaded)
    (tmp_path / "empty").mkdir()
    for candidate, *more in (
        (tmp_path / "empty",),
        (trained, "--baseline", str(tmp_path / "empty")),
        (trained, "--baseline", str(tmp_path / "none")),
    ):
        assert run(tmp_path, candidate, *more) == 1
        wrong = more[-1] if more else candidate
        expected = f"inpo-fast eval: {wrong} must hold pytorch_lora_weights.safetensors, unet/"
        assert capsys.readouterr().err.startswith(expected)
    none = str(tmp_path / "none")
    assert run(tmp_path, trained, "--pretrained_model_name_or_path", none) == 1
    assert none in capsys.readouterr().err
    assert not (tmp_path / "images").exists()


def test_a_base_on_the_hub_is_hashed_when_it_is_there(tmp_path, trained, monkeypatch):
    import huggingface_hub
    from diffusers import DiffusionPipeline

    here, fetched = str(shipped.model_path()), set()
    load, load_config = DiffusionPipeline.from_pretrained, DiffusionPipeline.load_config

    def from_hub(name, **options):
        fetched.add(name)
        return load(here, **options)

    def cached(name, *, local_files_only):
        if name not in fetched:
            raise FileNotFoundError(f"{name} is not in the cache")
        return here

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", from_hub)
    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda _: load_config(here))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    flags = ["--num_seeds", "1", "--num_inference_steps", "1"]
    assert run(tmp_path, trained, "--pretrained_model_name_or_path", "owner/base", *flags) == 0
    found = json.loads((tmp_path / "eval.json").read_text())["models"]
    assert found["candidate"]["base"] == "owner/base"
    assert found["baseline"]["sha256"] == Parts.find(here, None).fingerprint()


@pytest.fixture
def lora(tmp_path):
    """A folder with a LoRA for the shipped model, as any tool writes one."""
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    unet = UNet2DConditionModel.from_pretrained(shipped.model_path(), subfolder="unet")
    unet.add_adapter(LoraConfig(r=1, lora_alpha=1, target_modules=["to_q"]))
    state = unet.state_dict()
    weights.save_lora(tmp_path / "lora", "StableDiffusionPipeline", "unet", unet, state)
    return tmp_path / "lora"


def remember(folder, kind, **settings):
    """Write what a training says about itself."""
    config = PreferenceConfig(rank=1, **settings).to_dict()
    (folder / kind).write_text(json.dumps({"config": config} if kind == STATE else config))


@pytest.mark.parametrize("kind", [CONFIG, STATE])
def test_a_lora_is_drawn_on_the_denoiser_that_it_was_trained_on(tmp_path, trained, lora, kind):
    def drawn_with():
        parts = Parts.find(str(shipped.model_path()), str(lora))
        unet = parts.load(dtype=torch.float32, device="cpu").unet
        assert unet.peft_config
        return parts.fingerprint(), unet.conv_out.weight

    base = shipped.load_pipeline().unet.conv_out.weight
    hashes, weight = drawn_with()
    assert torch.equal(weight, base)
    remember(lora, kind)
    assert torch.equal(drawn_with()[1], base)
    for place, start in (("unet", trained), (".", trained / "unet")):
        remember(lora, kind, unet_init=str(start))
        now, weight = drawn_with()
        assert torch.equal(weight, base / 2), place
        extra = now.keys() - hashes.keys()
        assert extra == {"unet_init/diffusion_pytorch_model.safetensors"}


def test_a_lora_whose_denoiser_cannot_be_had_is_refused(tmp_path, lora, capsys):
    remember(lora, CONFIG, unet_init=str(tmp_path / "gone"))
    assert run(tmp_path, lora) == 1
    error = capsys.readouterr().err
    assert f"the LoRA in {lora} was trained on the denoiser unet_init={tmp_path}/gone, whi" in error
    (lora / CONFIG).write_text("{")
    assert run(tmp_path, lora) == 1
    assert f"{CONFIG} cannot be read: " in capsys.readouterr().err


def test_prompts_that_a_scorer_cannot_judge_are_refused_before_anything_is_drawn(
    tmp_path, capsys, monkeypatch
):
    def drawn(*_, **__):
        raise AssertionError("a model was loaded")

    settings = evaluation.Settings((PROMPTS[0], "a cat"))
    scorers = {name: evaluation.make_scorer(name) for name in ("jpeg-size", "attributes")}
    with pytest.raises(ValueError, match=r"scorer attributes cannot judge .*got 'a cat'"):
        evaluation.compare(drawn, drawn, settings, scorers)
    del scorers["attributes"]
    with pytest.raises(AssertionError, match="a model was loaded"):
        evaluation.compare(drawn, drawn, settings, scorers)

    monkeypatch.setattr(Parts, "load", drawn)
    assert run(tmp_path, shipped.model_path(), prompts=b"a cat\n") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "scorer attributes cannot judge" in line and "'a cat'" in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: .*No such file"),
        (b"\xff\xfe\x00", "cannot be read: .*decode byte 0xff"),
        (b" \n\n", "must have a line that is not empty"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_is_named_in_a_line(tmp_path, capsys, content, message):
    assert run(tmp_path, tmp_path, prompts=content) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"^inpo-fast eval: the prompts .*prompts.txt {message}", line)


@pytest.mark.parametrize("flag", ["--num_inference_steps", "--num_seeds", "--batch_size"])
def test_a_flag_is_named_as_it_was_typed(tmp_path, capsys, flag):
    assert run(tmp_path, tmp_path, flag, "0") == 1
    assert capsys.readouterr().err.startswith(f"inpo-fast eval: {flag} must")


def test_settings_that_cannot_be():
    for change, message in (
        ({"prompts": ()}, "must not be empty"),
        ({"seeds": (1, 1)}, "seeds must differ"),
        ({"steps": 0}, "steps must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluation.Settings(**{"prompts": ("a",), **change})
