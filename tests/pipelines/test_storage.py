"""Inversions on disk, and everything that `load` refuses."""

import json
import os
import threading

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors import safe_open
from safetensors.torch import save_file

import inpo_fast.state
from inpo_fast import SOLVERS, Inversion, invert
from inpo_fast.files import read_tensors
from tests.pipelines import tiny


@pytest.fixture
def inversion(pipe):
    return invert(
        pipe,
        tiny.images(2),
        ["a cat", "a dog"],
        negative_prompt="bad",
        guidance_scale=[2.0, 3.0],
        num_inference_steps=4,
        gamma=0.94,
        verify=True,
    )


@pytest.fixture
def path(inversion, tmp_path):
    inversion.save(tmp_path / "inversion.safetensors")
    return tmp_path / "inversion.safetensors"


def test_everything_comes_back(inversion, path, pipe):
    loaded = Inversion.load(path, pipe)
    assert loaded.report == inversion.report and loaded.request == inversion.request
    assert loaded.state.equal(inversion.state)
    assert torch.equal(loaded.image_latents, inversion.image_latents)
    assert str(loaded) == str(inversion)
    assert loaded.reconstruct().bits_equal
    kept = loaded.edit("a bird", output_type="pt").images
    assert torch.equal(kept, inversion.edit("a bird", output_type="pt").images)


def test_products_of_what_is_read_are_rounded_as_before(tmp_path):
    """They depend on where operands begin, and in a file tensors lie anywhere."""
    pipe = tiny.build("flux")
    inversion = invert(pipe, tiny.images(2), ["a cat", "a dog"], num_inference_steps=2)
    inversion.save(tmp_path / "flux")
    assert Inversion.load(tmp_path / "flux", pipe).reconstruct(output_type="latent").bits_equal
    tensors, _ = read_tensors(tmp_path / "flux")
    assert {tensor.data_ptr() % 64 for tensor in tensors.values()} == {0}


def test_embeddings_stay_as_they_were_given(tmp_path):
    pipe = tiny.build("flux")
    text, pooled, _ = pipe.encode_prompt(["a cat", "a dog"], None)
    # begins where no allocator would begin
    given = torch.empty(pooled.numel() + 1)[1:].view_as(pooled).copy_(pooled)
    told = {"prompt_embeds": text, "pooled_prompt_embeds": given}
    inversion = invert(pipe, tiny.images(2), num_inference_steps=2, **told)
    given.zero_()
    assert inversion.reconstruct(output_type="latent").bits_equal
    told["pooled_prompt_embeds"] = pooled
    same = invert(pipe, tiny.images(2), num_inference_steps=2, **told)
    assert inversion.state.equal(same.state)


def test_an_equal_pipeline_will_do(path):
    assert Inversion.load(path, tiny.build("sd")).reconstruct().bits_equal


def test_other_kernels_are_another_model(path):
    """They round in other places, so that the bits would not come back."""
    pytest.importorskip("triton")
    from inpo_fast import fuse_layers

    pipe = tiny.build("sd")
    inversion = Inversion.load(path, pipe)
    assert fuse_layers(pipe.unet)
    other = (
        "made with unet in float32, which the pipeline has in float32 with fused layers.*neither"
    )
    with pytest.raises(ValueError, match=other):
        Inversion.load(path, pipe)
    for use in (inversion.reconstruct, lambda: inversion.edit("a cow")):
        with pytest.raises(ValueError, match=other):
            use()
    again = invert(pipe, tiny.images(), "a cat", num_inference_steps=2)
    assert again.reconstruct().bits_equal


@pytest.mark.parametrize("name", ["sd", "sd3", "flux"])
def test_fused_projections_are_another_model(tmp_path, name):
    """Their products may round in other ways, too."""
    path, pipe = tmp_path / "inversion", tiny.build(name)
    denoiser = pipe.unet if name == "sd" else pipe.transformer
    inversion = invert(pipe, tiny.images(), "a cat", num_inference_steps=2)
    inversion.save(path)
    denoiser.fuse_qkv_projections()
    refused = "in float32 with fused QKV: .*fuse_qkv_projections for both or for neither"
    for use in (inversion.reconstruct, lambda: Inversion.load(path, pipe)):
        with pytest.raises(ValueError, match=refused):
            use()
    fused = invert(pipe, tiny.images(), "a cat", num_inference_steps=2)
    fused.save(path)
    assert Inversion.load(path, pipe).reconstruct().bits_equal
    denoiser.unfuse_qkv_projections()
    for use in (fused.reconstruct, lambda: Inversion.load(path, pipe)):
        with pytest.raises(ValueError, match=r"with fused QKV, which .*for neither"):
            use()
    assert inversion.reconstruct().bits_equal


def test_what_is_expected_is_compared(path, pipe):
    Inversion.load(
        path,
        pipe,
        prompt=["a cat", "a dog"],
        negative_prompt="bad",
        guidance_scale=[2.0, 3.0],
        num_inference_steps=4,
        timesteps=None,
        strength=1.0,
        solver="bdia",
    )
    for expected in (
        {"prompt": "a cat"},
        {"prompt": ["a cat", "a cow"]},
        {"negative_prompt": "worse"},
        {"negative_prompt": None},
        {"guidance_scale": 2.0},
        {"guidance_scale": (2.0, 4.0)},
        {"num_inference_steps": 5},
        {"strength": 0.5},
        {"gamma": 0.9},
    ):
        (name, value), *_ = expected.items()
        with pytest.raises(ValueError, match=f"was made with {name} .*, expected"):
            Inversion.load(path, pipe, **{name: value})
    with pytest.raises(ValueError, match="was made with solver 'bdia', got 'ddim'"):
        Inversion.load(path, pipe, solver=lambda_ddim)
    with pytest.raises(TypeError, match=r"has no \['seed'\] to compare, but prompt, .*gamma"):
        Inversion.load(path, pipe, seed=1)


def test_settings_of_a_family_are_compared(tmp_path):
    pipe = tiny.build("flux")
    told = {"true_cfg_scale": 2.0, "negative_prompt": "bad"}
    inversion = invert(pipe, tiny.images(), "a cat", num_inference_steps=2, **told)
    inversion.save(tmp_path / "flux")
    assert Inversion.load(tmp_path / "flux", pipe, **told).request == inversion.request
    with pytest.raises(ValueError, match=r"was made with true_cfg_scale 2.0, expected 3.0"):
        Inversion.load(tmp_path / "flux", pipe, true_cfg_scale=3.0)


def lambda_ddim(schedule, *, direction, gamma):
    return SOLVERS["ddim"](schedule, direction=direction)


lambda_ddim.__name__ = "ddim"


def test_a_factory_has_to_be_given_again(pipe, tmp_path):
    def mine(schedule, *, direction):
        return SOLVERS["bdia"](schedule, direction=direction)

    inversion = invert(pipe, tiny.images(), "a cat", num_inference_steps=3, solver=mine)
    inversion.save(tmp_path / "mine")
    with pytest.raises(ValueError, match="solver must be one of"):
        Inversion.load(tmp_path / "mine", pipe)
    assert Inversion.load(tmp_path / "mine", pipe, solver=mine).reconstruct().bits_equal


def test_a_wrong_solver_is_no_damage_to_the_file(path, pipe, tmp_path):
    def mine(schedule, *, direction):
        return SOLVERS["bdia"](schedule, direction=direction)

    with pytest.raises(TypeError, match="solver must be a name or a function, got int"):
        Inversion.load(path, pipe, solver=3)
    with pytest.raises(ValueError, match=r"solver must be one of .*got 'euler'"):
        Inversion.load(path, pipe, solver="euler")
    said = r"with solver 'bdia' and its parameters \{'gamma': 0.94\}, from which no program can"
    with pytest.raises(ValueError, match=f"{said} be made: .*unexpected keyword argument 'gamma'"):
        Inversion.load(path, pipe, solver=mine)
    other = rewritten(path, tmp_path / "other", parameters={"gamma": "much"})
    with pytest.raises(ValueError, match=r"parameters \{'gamma': 'much'\}, from which no program"):
        Inversion.load(other, pipe)
    other = rewritten(path, tmp_path / "other", solver=3)
    with pytest.raises(ValueError, match=r"with solver 3 .* solver must be a name or a function"):
        Inversion.load(other, pipe)


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder"])
def test_another_model(path, name):
    other = tiny.build("sd")
    with torch.no_grad():
        next(getattr(other, name).parameters()).view(-1)[3] += 1e-3
    with pytest.raises(ValueError, match=f"another model: .* of {name} differ"):
        Inversion.load(path, other)


def test_another_dtype_is_named(path):
    other = tiny.build("sd").to(torch.bfloat16)
    said = "text_encoder, unet, vae in float32, which the pipeline has in bfloat16: use the same"
    with pytest.raises(ValueError, match=said):
        Inversion.load(path, other)
    other = tiny.build("sd")
    other.vae.to(torch.float64)
    with pytest.raises(ValueError, match="with vae in float32, which the pipeline has in float64"):
        Inversion.load(path, other)


def test_another_pipeline(path, pipe_of):
    with pytest.raises(ValueError, match="with a StableDiffusionPipeline, got a StableDiffusionXL"):
        Inversion.load(path, pipe_of("sdxl"))
    with pytest.raises(ValueError, match="pipe must be one of"):
        Inversion.load(path, object())


@pytest.mark.parametrize(
    "change",
    [
        {"beta_end": 0.02},
        {"timestep_spacing": "trailing"},
        {"prediction_type": "v_prediction"},
        {"set_alpha_to_one": True},
    ],
)
def test_another_schedule(path, change):
    other = tiny.build("sd")
    other.scheduler = DDIMScheduler.from_config(other.scheduler.config, **change)
    with pytest.raises(ValueError, match=r"another schedule: pipe\.scheduler"):
        Inversion.load(path, other)


def rewritten(path, target, **changes):
    """The file with changed fields of its header."""
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        fields = dict(file.metadata())
    header = json.loads(fields["inversion"])
    fields.update({k: v for k, v in changes.items() if k in ("format", "inversion")})
    header.update({k: v for k, v in changes.items() if k in header})
    for key in [k for k, v in changes.items() if v is None and k in tensors]:
        del tensors[key]
    if "inversion" not in changes:
        fields["inversion"] = json.dumps(header)
    save_file(tensors, target, metadata=fields)
    return target


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"format": "inpo_fast.inversion/1"}, "not an inversion of this version"),
        ({"inversion": "{"}, "damaged header"),
        ({"inversion": "{}"}, "damaged header"),
        ({"program": "0"}, "another version of the solver 'bdia'"),
        ({"image_latents": None}, "damaged header"),
        ({"state.track0": None}, "lacks a track"),
    ],
)
def test_damaged_files(path, pipe, tmp_path, changes, match):
    with pytest.raises(ValueError, match=match):
        Inversion.load(rewritten(path, tmp_path / "other", **changes), pipe)


def test_files_that_are_something_else(path, pipe, inversion, tmp_path):
    with pytest.raises(FileNotFoundError, match="no file at"):
        Inversion.load(tmp_path / "nothing", pipe)
    (tmp_path / "text").write_text("text")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        Inversion.load(tmp_path / "text", pipe)
    inversion.state.save(tmp_path / "state")
    with pytest.raises(ValueError, match="not an inversion of this version"):
        Inversion.load(tmp_path / "state", pipe)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        Inversion.load(path, pipe)


def test_no_folder_to_write_to(inversion, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*/no to write where\.safetensors to"):
        inversion.save(tmp_path / "no" / "where.safetensors")


def test_nothing_half_written(inversion, path, monkeypatch):
    whole = path.read_bytes()

    def fails(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(inpo_fast.state.os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        inversion.save(path)
    assert path.read_bytes() == whole and os.listdir(path.parent) == [path.name]


def test_parameters_that_are_not_plain_data(pipe, tmp_path):
    def mine(schedule, *, direction, inner):
        return inner(schedule, direction=direction)

    inversion = invert(
        pipe, tiny.images(), "a cat", num_inference_steps=3, solver=mine, inner=SOLVERS["bdia"]
    )
    with pytest.raises(TypeError, match="inner cannot be saved"):
        inversion.save(tmp_path / "mine")
    assert not os.listdir(tmp_path)


def test_saving_from_threads(inversion, pipe, tmp_path):
    threads = [threading.Thread(target=inversion.save, args=(tmp_path / "same",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert os.listdir(tmp_path) == ["same"]
    assert Inversion.load(tmp_path / "same", pipe).state.equal(inversion.state)
