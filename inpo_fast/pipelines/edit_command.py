"""`inpo-fast edit`: the noise of `inpo-fast invert` to a picture under another prompt."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..files import write_picture
from ..writable import add_overwrite_argument
from .inversion import Inversion
from .loading import (
    add_model_arguments,
    add_set_argument,
    load,
    reported,
    settings,
    writable_picture,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("inversion", metavar="FILE", help="what inpo-fast invert wrote")
    add_model_arguments(parser)
    parser.add_argument("--prompt", required=True, help="what the picture is to show")
    parser.add_argument("--negative-prompt", help="default: that of the inversion")
    parser.add_argument("--guidance", type=float, help="default: that of the inversion")
    add_set_argument(parser, "argument of the pipeline, e.g. true_cfg_scale=3 for Flux")
    parser.add_argument(
        "--output", default="edited.png", help="picture to write (default: %(default)s)"
    )
    add_overwrite_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    return reported("edit", lambda: _edit(arguments))


def _edit(arguments: argparse.Namespace) -> None:
    output = writable_picture(arguments.output, overwrite=arguments.overwrite)
    options = settings(arguments)
    if not Path(arguments.inversion).is_file():
        # before a large model is loaded
        raise FileNotFoundError(f"no file at {arguments.inversion}")
    inversion = Inversion.load(arguments.inversion, load(arguments))
    edited = inversion.edit(
        arguments.prompt,
        negative_prompt=arguments.negative_prompt,
        guidance_scale=arguments.guidance,
        **options,
    )
    write_picture(output, edited.images[0])
    print(f"wrote {output}")
