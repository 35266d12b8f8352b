"""`inpo-fast eval`: compare a trained model with another."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..environment import available_device, machine, versions
from ..files import write_json, write_picture
from ..naming import naming
from ..writable import add_overwrite_argument, writable, writable_folder
from .compare import Settings, as_json, compare
from .models import Parts
from .scorers import SCORERS, ScorerError, make_scorer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "candidate", help="what a training wrote into its output_dir, or a pipeline's folder"
    )
    parser.add_argument(
        "--pretrained_model_name_or_path", required=True, help="the base of both models"
    )
    parser.add_argument("--baseline", help="as the candidate; by default the base itself")
    parser.add_argument(
        "--prompts",
        type=Path,
        required=True,
        help="text file with a prompt on every line that is not empty",
    )
    parser.add_argument(
        "--scorer",
        nargs="+",
        choices=list(SCORERS),
        required=True,
        help="what decides which image is better",
    )
    parser.add_argument("--json", type=Path, required=True, help="file of the result")
    parser.add_argument("--images", type=Path, help="folder for the images, side by side as PNG")
    parser.add_argument(
        "--num_seeds", type=int, default=1, help="images of a prompt (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="first of the seeds (default: %(default)s)"
    )
    parser.add_argument(
        "--num_inference_steps", type=int, default=50, help="sampling steps (default: %(default)s)"
    )
    parser.add_argument(
        "--guidance_scale", type=float, default=7.5, help="guidance (default: %(default)s)"
    )
    parser.add_argument("--resolution", type=int, help="height and width, by default the model's")
    parser.add_argument(
        "--batch_size", type=int, default=8, help="images of a call (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype", choices=list(_DTYPES), default="float32", help="of the models (%(default)s)"
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="%(default)s"
    )
    add_overwrite_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    try:
        evaluate(arguments)
    except (OSError, ValueError, ScorerError) as error:
        print(f"inpo-fast eval: {error}", file=sys.stderr)
        return 1
    return 0


def evaluate(arguments: argparse.Namespace) -> None:
    """Compare, print a line for each scorer, and write the JSON."""
    base, dtype = arguments.pretrained_model_name_or_path, _DTYPES[arguments.dtype]
    prompts = _prompts(arguments.prompts)
    flags = {
        "seeds": "--num_seeds",
        "steps": "--num_inference_steps",
        "batch_size": "--batch_size",
    }
    with naming(flags):
        settings = Settings(
            prompts,
            tuple(range(arguments.seed, arguments.seed + arguments.num_seeds)),
            arguments.num_inference_steps,
            arguments.guidance_scale,
            arguments.resolution,
            arguments.resolution,
            arguments.batch_size,
        )
    # before anything is drawn: a missing package or folder should not cost an hour
    available_device(arguments.device)
    writable(arguments.json, overwrite=arguments.overwrite)
    if arguments.images is not None:
        writable_folder(arguments.images, overwrite=arguments.overwrite)
    results = {"candidate": arguments.candidate, "baseline": arguments.baseline}
    parts = {name: Parts.find(base, result) for name, result in results.items()}
    scorers = {name: make_scorer(name, arguments.device) for name in arguments.scorer}
    hashes = {}

    def load(name: str) -> Any:
        pipeline = parts[name].load(dtype=dtype, device=arguments.device)
        # a model on the hub has files here only when it has been loaded
        hashes[name] = parts[name].fingerprint()
        return pipeline

    shown = _SideBySide(arguments.images) if arguments.images is not None else None
    compared, schedulers = compare(
        lambda: load("candidate"),
        lambda: load("baseline"),
        settings,
        scorers,
        keep=shown,
    )
    for comparison in compared:
        print(comparison.text())
    models = {
        name: {
            "base": base,
            "result": result,
            "sha256": hashes[name],
            "scheduler": schedulers[name],
        }
        for name, result in results.items()
    }
    write_json(
        arguments.json,
        {
            **as_json(settings, compared),
            "models": models,
            "dtype": arguments.dtype,
            "device": arguments.device,
            "versions": versions(),
            "machine": machine(),
        },
    )


def _prompts(path: Path) -> tuple[str, ...]:
    """The lines of a file that are not empty.

    Raises:
        ValueError: naming a file that cannot be read or has none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the prompts {path} cannot be read: {error}") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ValueError(f"the prompts {path} must have a line that is not empty")
    return prompts


class _SideBySide:
    """Writes `<prompt>-<seed>.png` with the candidate on the left and the baseline on the right."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def __call__(self, name: str, prompt: int, seed: int, image: Tensor) -> None:
        from PIL import Image

        path = self.folder / f"{prompt:05d}-{seed}.png"
        pixels = (image.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        picture = Image.fromarray(pixels)
        if name == "baseline":
            with Image.open(path) as left:
                both = Image.new("RGB", (left.width + picture.width, picture.height))
                both.paste(left, (0, 0))
            both.paste(picture, (both.width - picture.width, 0))
            picture = both
        write_picture(path, picture)
