"""What `inpo-fast invert` and `inpo-fast edit` share: the pipeline, and one-line errors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..environment import available_device
from ..naming import naming
from ..ops import LatticeRangeError, NonFiniteError
from ..shipped import load_pipeline
from ..writable import writable

_DTYPES = ("float32", "bfloat16", "float16")

# arguments whose flags have other names
_FLAGS = {
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "negative_prompt": "--negative-prompt",
    "control_image": "--control-image",
}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """`--model`, `--device` and `--dtype`."""
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="folder or hub name of a diffusers pipeline (default: the shipped model)",
    )
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="default: float32")


def load(arguments: argparse.Namespace) -> Any:
    """The pipeline that the arguments name."""
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    # a saved pipeline may have one of these; diffusers loads only what has been imported
    import_module("inpo_fast.schedulers")
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    device = available_device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, arguments.dtype)
    if arguments.model is None:
        pipe = load_pipeline(device=device, dtype=dtype)
    else:
        pipe = DiffusionPipeline.from_pretrained(arguments.model, dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty())
    return pipe


def add_set_argument(parser: argparse.ArgumentParser, what: str) -> None:
    """`--set NAME=VALUE`."""
    parser.add_argument(
        "--set", metavar="NAME=VALUE", action="append", default=[], help=f"{what}; repeatable"
    )


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `--set` has set, values as the int, float or string that they look like.

    Raises:
        ValueError: something else than NAME=VALUE.
    """
    found: dict[str, Any] = {}
    for setting in arguments.set:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set must be NAME=VALUE, got {setting!r}")
        found[name] = _number(value)
    return found


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def writable_picture(path: str, *, overwrite: bool) -> Path:
    """A path, as of `writable`, whose ending names a format of pictures.

    Raises:
        ValueError: see `writable`, or no such format.
    """
    from PIL import Image

    ending = Path(path).suffix.lower()
    if Image.registered_extensions().get(ending) not in Image.SAVE:
        raise ValueError(f"{path} must end in .png or as another picture, got {ending!r}")
    return writable(path, overwrite=overwrite)


def picture(path: str) -> Any:
    """The picture in a file or at a URL, in RGB.

    Raises:
        ValueError: there is none that can be read.
    """
    from diffusers.utils import load_image

    if not path.startswith(("http://", "https://")) and not Path(path).is_file():
        raise ValueError(f"no picture at {path}")
    try:
        return load_image(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not a readable picture: {error}") from error


def reported(command: str, work: Callable[[], None]) -> int:
    """Exit status of `work`; what the user can mend is printed as one line."""
    try:
        with naming(_FLAGS):
            work()
    except (ValueError, TypeError, OSError, LatticeRangeError, NonFiniteError) as error:
        print(f"inpo-fast {command}: {error}", file=sys.stderr)
        return 1
    return 0
