"""The public call on the shipped model, and the commands."""

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

import inpo_fast
from inpo_fast import cli, invert, shipped
from inpo_fast.evaluation.models import Parts
from inpo_fast.pipelines import edit_command, invert_command, loading

STEPS = 20


@pytest.fixture(scope="module")
def model():
    return shipped.load_pipeline()


@pytest.fixture(scope="module")
def scene():
    """A scene and its edit: another background, everything else as it was."""
    source = shipped.held_out_scenes(1, seed=0)[0]
    target = next(t for key, t in shipped.edits(source) if key == "background")
    return source, target


@pytest.fixture(scope="module")
def picture(scene):
    """[1, 3, H, W] in [0, 1]"""
    image = shipped.render([scene[0]], generator=torch.Generator().manual_seed(0))
    return (image / 2 + 0.5).clamp(0, 1)


def test_round_trip_and_edit(model, scene, picture):
    source, target = scene
    inversion = invert(
        model, picture, shipped.prompt(source), num_inference_steps=STEPS, guidance_scale=3.0
    )
    back = inversion.reconstruct(output_type="pt")
    assert back.bits_equal and back.latent_error == 0
    # what is missing is the autoencoder's alone, known before (images there in [-1, 1])
    missing = 2 * (back.images - picture).square().mean().sqrt()
    assert float(missing) == pytest.approx(inversion.vae_floor, rel=1e-3)
    edited = inversion.edit(shipped.prompt(target), output_type="pt").images * 2 - 1
    found = shipped.read_attributes(edited, [target])[0]
    assert found["background"] == shipped.attributes(target)["background"]


def test_another_process_returns_the_same_bits(model, scene, picture, tmp_path):
    inversion = invert(model, picture, shipped.prompt(scene[0]), num_inference_steps=5)
    inversion.save(tmp_path / "scene")
    program = f"""
from inpo_fast import Inversion, shipped
loaded = Inversion.load({str(tmp_path / "scene")!r}, shipped.load_pipeline())
print(loaded.reconstruct(output_type="latent").bits_equal)
"""
    finished = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(Path(inpo_fast.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert finished.stdout.strip() == "True", finished.stderr


def test_commands(scene, picture, tmp_path, capsys):
    source, target = scene
    pixels = (picture[0] * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(tmp_path / "scene.png")
    written = tmp_path / "scene.safetensors"
    status = cli.main(
        [
            *("invert", str(tmp_path / "scene.png"), "--prompt", shipped.prompt(source)),
            *("--solver", "bdia", "--set", "gamma=1", "--steps", "10", "--guidance", "3"),
            *("--output", str(written)),
        ]
    )
    printed = capsys.readouterr().out
    assert status == 0 and "exact to the bit" in printed and str(written) in printed
    assert "bits equal      True" in printed
    back = torch.from_numpy(np.array(Image.open(tmp_path / "scene-reconstruction.png")))
    assert (back.float() - torch.from_numpy(pixels).float()).abs().mean() < 8

    output = tmp_path / "edited.png"
    arguments = ["--prompt", shipped.prompt(target), "--output", str(output)]
    assert cli.main(["edit", str(written), *arguments]) == 0
    assert Image.open(output).size == (64, 64)

    before = output.read_bytes()
    assert cli.main(["edit", str(written), *arguments, "--overwrite", "--set", "clip_skip=9"]) == 1
    assert "clip_skip must be within 0 … " in capsys.readouterr().err

    arguments += ["--guidance", "1"]
    assert cli.main(["edit", str(written), *arguments]) == 1
    assert f"{output} exists" in capsys.readouterr().err and output.read_bytes() == before
    assert cli.main(["edit", str(written), *arguments, "--overwrite"]) == 0
    assert output.read_bytes() != before

    assert cli.main(["edit", str(written), *arguments, "--overwrite", "--dtype", "bfloat16"]) == 1
    assert "in float32, which the pipeline has in bfloat16" in capsys.readouterr().err


@pytest.mark.parametrize("full", ["inversion", "picture"])
def test_a_full_disk_is_one_line_and_leaves_what_was_there(
    full, picture, tmp_path, capsys, monkeypatch
):
    def no_space(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device")

    def no_room(image, file, **_):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    pixels = (picture[0] * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(tmp_path / "scene.png")
    written = tmp_path / "scene.safetensors"
    invert_it = ["invert", str(tmp_path / "scene.png"), "--steps", "2", "--output", str(written)]
    edit_it = ["edit", str(written), "--prompt", "a", "--output", str(tmp_path / "edited.png")]
    assert cli.main(invert_it) == 0 and cli.main(edit_it) == 0
    before = {path: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert len(before) == 3
    capsys.readouterr()
    if full == "inversion":
        monkeypatch.setattr("safetensors.torch.save_file", no_space)
        commands = [invert_it]
    else:
        monkeypatch.setattr(Image.Image, "save", no_room)
        written.unlink()
        # the first leaves the inversion, which comes before its picture
        commands = [invert_it, edit_it]
    for command in commands:
        assert cli.main([*command, "--overwrite"]) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"inpo-fast {command[0]}: ") and "No space left" in line
    assert {path: path.read_bytes() for path in tmp_path.glob("*.png")} == before
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in before} | {
        written.name
    }


def test_commands_load_pipelines_that_were_saved_with_a_scheduler_of_this_package(
    tmp_path, monkeypatch
):
    pipe = shipped.load_pipeline()
    pipe.scheduler = inpo_fast.BDIAScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)
    for load in (
        lambda: loading.load(Namespace(model=str(tmp_path), device="cpu", dtype="float32")),
        lambda: Parts.find(str(tmp_path), None).load(dtype=torch.float32, device="cpu"),
    ):
        # as in a process that has not used them; what is imported here goes with the rest
        monkeypatch.setattr(inpo_fast, "schedulers", inpo_fast.schedulers)
        for name in [n for n in sys.modules if n.startswith("inpo_fast.schedulers")]:
            monkeypatch.delitem(sys.modules, name)
        assert type(load().scheduler).__name__ == "BDIAScheduler"
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--steps", "1001"], "--steps must be at most the 1000 timesteps of the table"),
        (["--steps", "1"], "--steps times strength must leave bdia at least 2 steps"),
        (["--guidance", "nan"], "--guidance must be finite"),
        (["--guidance", "1", "--solver", "null-text"], "--guidance must differ from 1"),
    ],
)
def test_errors_name_the_flag_that_was_typed(arguments, message, picture, tmp_path, capsys):
    pixels = (picture[0] * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(tmp_path / "scene.png")
    given = [str(tmp_path / "scene.png"), "--output", str(tmp_path / "x.safetensors")]
    assert cli.main(["invert", *given, *arguments]) == 1
    # what loads the weights may say something before
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"inpo-fast invert: {message}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["edit", "nothing.safetensors", "--prompt", "a"], "inpo-fast edit: no file at"),
        (["edit", "x", "--prompt", "a", "--output", "no/where.png"], "no folder no to write"),
        (["edit", "x", "--prompt", "a", "--set", "p"], "--set must be NAME=VALUE, got 'p'"),
        (["invert", "x.png", "--set", "gamma"], "--set must be NAME=VALUE, got 'gamma'"),
        (["invert", "x.png"], "inpo-fast invert: "),
    ],
)
def test_what_the_user_can_mend_is_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def loaded(_):
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr(edit_command, "load", loaded)
    monkeypatch.setattr(invert_command, "load", loaded)
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not list(tmp_path.iterdir())
