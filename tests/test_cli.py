"""The command line: help, lazy commands and `inpo-fast env`."""

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, entry_points
from types import ModuleType

import pytest
import torch

import inpo_fast
from inpo_fast import cli, environment


def test_entry_point_and_module_run_the_same_main():
    (script,) = entry_points(group="console_scripts", name="inpo-fast")
    assert script.load() is cli.main
    command = [sys.executable, "-m", "inpo_fast", "--version"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed == f"inpo_fast {inpo_fast.__version__}\n"


def test_help_lists_every_command_and_imports_none(capsys, monkeypatch):
    for command in cli.COMMANDS.values():
        # An import of the module would now raise.
        monkeypatch.setitem(sys.modules, command.module, None)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in cli.COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["nothing"], "invalid choice: 'nothing'"),
        (["env", "--nothing"], "inpo-fast env: error: unrecognized arguments: --nothing"),
        (["--nothing", "env"], "unrecognized arguments: --nothing"),
        (["demo", "--seed", "-3"], "argument --seed: must be in [0, 2^31), got -3"),
    ],
)
def test_wrong_usage_is_one_error_line_and_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert message in capsys.readouterr().err.splitlines()[-1]


def command_that_raises(error):
    module = ModuleType("command")
    module.add_arguments = lambda parser: parser.add_argument("--steps", type=int)

    def run(arguments):
        assert arguments.steps == 3
        raise error

    module.run = run
    return module


def test_a_missing_package_is_named_with_its_extra(capsys, monkeypatch):
    error = ModuleNotFoundError("No module named 'diffusers'", name="diffusers")
    monkeypatch.setitem(sys.modules, "inpo_fast.demo", command_that_raises(error))
    assert cli.main(["demo", "--steps", "3"]) == 1
    expected = 'inpo-fast demo needs the package diffusers: pip install "inpo-fast[demo]"\n'
    assert capsys.readouterr().err == expected


def test_a_broken_module_of_ours_is_not_reported_as_a_missing_package(monkeypatch):
    error = ModuleNotFoundError("No module named 'inpo_fast.gone'", name="inpo_fast.gone")
    monkeypatch.setitem(sys.modules, "inpo_fast.demo", command_that_raises(error))
    with pytest.raises(ModuleNotFoundError, match="gone"):
        cli.main(["demo", "--steps", "3"])


def test_env_json_is_what_collect_returns(capsys):
    assert cli.main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(json.dumps(environment.collect()))
    assert found["versions"]["torch"] == torch.__version__
    assert found["backends"]["reference"]["available"] is True
    # Available or not, a backend says what it is or what it lacks.
    assert all(backend["reason"] for backend in found["backends"].values())
    assert (found["native_build"] is not None) == found["backends"]["native"]["available"]


def test_env_text_shows_missing_packages_backends_and_gpus(capsys, monkeypatch):
    def nothing_installed(package):
        raise PackageNotFoundError(package)

    gpu = {"name": "Example GPU", "capability": "9.0", "memory_gib": 139.8}
    machine = {**environment.machine(), "gpus": [gpu]}
    backends = {"native": (False, "no compiler"), "reference": (True, "plain torch")}
    monkeypatch.setattr(environment, "version", nothing_installed)
    monkeypatch.setattr(environment, "machine", lambda: machine)
    monkeypatch.setattr(environment.ops, "backends", lambda: backends)
    monkeypatch.setattr(environment.ops, "build_info", lambda: None)
    assert cli.main(["env"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert ["inpo_fast", inpo_fast.__version__] in lines
    for package in environment.PACKAGES:
        assert [package, "not installed"] in lines
    assert ["gpus", "Example GPU, 139.8 GiB, capability 9.0"] in lines
    assert ["native", "missing: no compiler"] in lines
    assert ["reference", "available: plain torch"] in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.png"], "no picture at nothing.png"),
        ([__file__], "is not a readable picture"),
        (["a.png", "--output", "."], ". is a folder; name a file to write"),
        (["a.png", "--reconstruction", "a.foo"], "a.foo must end in .png or as another picture"),
        (["a.png", "--output", __file__], f"{__file__} exists; name another file, or give --over"),
        (
            ["a.png", "--output", "x.png", "--reconstruction", "./x.png"],
            "--output and --reconstruction must differ",
        ),
    ],
)
def test_invert_refuses_paths_before_it_loads_a_model(arguments, message, capsys, monkeypatch):
    pytest.importorskip("diffusers")
    from inpo_fast.pipelines import invert_command

    monkeypatch.setattr(invert_command, "load", None)
    assert cli.main(["invert", *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("inpo-fast invert: ") and message in line


@pytest.mark.parametrize("exists", ["inversion.safetensors", "inversion-reconstruction.png"])
def test_invert_overwrites_only_when_told(exists, tmp_path, capsys, monkeypatch):
    pytest.importorskip("diffusers")
    from PIL import Image

    from inpo_fast.pipelines import invert_command

    def loaded(_):
        raise ValueError("a model was loaded")

    monkeypatch.setattr(invert_command, "load", loaded)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("a.png")
    (tmp_path / exists).write_text("mine")
    assert cli.main(["invert", "a.png"]) == 1
    assert f"{exists} exists" in capsys.readouterr().err
    assert cli.main(["invert", "a.png", "--overwrite"]) == 1
    assert "a model was loaded" in capsys.readouterr().err
    assert (tmp_path / exists).read_text() == "mine"


def test_a_device_that_torch_does_not_have_is_a_value_error():
    assert environment.available_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="--device gpu is not available"):
        environment.available_device("gpu")


def test_a_lazy_name_says_which_package_it_needs(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("inpo_fast.schedulers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setitem(sys.modules, "diffusers.configuration_utils", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "inpo-fast\[diffusers\]"'):
        _ = inpo_fast.BDIAScheduler


def test_fused_layers_need_triton(monkeypatch):
    pytest.importorskip("diffusers")
    for name in [name for name in sys.modules if name.startswith("inpo_fast.layers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "inpo-fast\[triton\]"'):
        _ = inpo_fast.fuse_layers
