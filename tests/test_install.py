"""The package as users get it: what importing and installing do, what the archives hold."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import inpo_fast

ROOT = Path(__file__).resolve().parents[1]


def run(*command, cwd, **environment):
    finished = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def test_import_touches_no_optional_package_and_starts_no_compiler(tmp_path):
    program = """
import subprocess, sys
import numpy, torch

OPTIONAL = set("accelerate datasets diffusers pyarrow safetensors tqdm transformers triton".split())

class Forbidden:
    # RuntimeError, so that an import inside `try ... except ImportError` is found too.
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OPTIONAL:
            raise RuntimeError(f"import of {name}")

def forbidden(*command, **_):
    raise RuntimeError(f"subprocess {command}")

sys.meta_path.insert(0, Forbidden())
subprocess.Popen.__init__ = forbidden
import inpo_fast
assert "torch.utils.cpp_extension" not in sys.modules
print(inpo_fast.__version__)
"""
    printed = run("-c", program, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert printed.strip() == inpo_fast.__version__


def test_the_version_has_one_source():
    assert inpo_fast.__version__ == metadata.version("inpo-fast")


def test_requirements_have_no_upper_bounds():
    for requirement in metadata.requires("inpo-fast"):
        specifier = requirement.partition(";")[0]
        assert not any(sign in specifier for sign in ("<", "==", "~=", "!=")), requirement


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory):
    """A copy to build in, so that no build leaves anything in the checkout."""
    tree = tmp_path_factory.mktemp("source") / "inpo_fast"
    not_source = ("__pycache__", "*.so", "*.egg-info", "build", "dist", "demo-output", ".*")
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*not_source))
    return tree


def files_under(tree, folder):
    return {
        path.relative_to(tree).as_posix() for path in (tree / folder).rglob("*") if path.is_file()
    }


def test_installing_changes_no_installed_package(source_tree):
    # Everything is satisfied by what is installed, torch first of all: --no-index allows no other.
    arguments = ["--dry-run", "--quiet", "--no-index", "--no-build-isolation", "--report", "-"]
    printed = run("-m", "pip", "install", *arguments, f"{source_tree}[train]", cwd=source_tree)
    installed = {item["metadata"]["name"] for item in json.loads(printed)["install"]}
    assert installed <= {"inpo-fast"}


def test_archives_hold_the_package_and_its_sources(source_tree, tmp_path):
    package = files_under(source_tree, "inpo_fast")
    assert "inpo_fast/py.typed" in package

    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    run("-c", build, cwd=source_tree, INPO_FAST_NATIVE="0")
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        in_sdist = {
            member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()
        }
    assert in_sdist >= package | files_under(source_tree, "csrc")
    assert in_sdist >= {"LICENSE", "README.md", "pyproject.toml", "setup.py"}

    arguments = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    run("-m", "pip", "wheel", *arguments, str(sdist), cwd=tmp_path, INPO_FAST_NATIVE="0")
    # Without the extension the wheel suits every Python and machine.
    (wheel,) = tmp_path.glob("*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    assert in_wheel == package
    assert licences
