"""`inpo-fast invert`: an image to its noise, with the picture that comes back and a report."""

from __future__ import annotations

import argparse

from ..files import write_picture
from ..solvers import SOLVERS
from ..writable import add_overwrite_argument, writable
from .inverting import invert
from .loading import (
    add_model_arguments,
    add_set_argument,
    load,
    picture,
    reported,
    settings,
    writable_picture,
)
from .plan import NULL_TEXT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("image", metavar="IMAGE", help="picture to invert")
    add_model_arguments(parser)
    parser.add_argument(
        "--prompt", default="", help="what the picture shows (default: nothing said)"
    )
    parser.add_argument("--negative-prompt", help="what it does not show")
    parser.add_argument(
        "--solver", default="bdia", choices=[*SOLVERS, NULL_TEXT], help="default: bdia"
    )
    add_set_argument(parser, "parameter of the solver or argument of the pipeline, e.g. gamma=0.94")
    parser.add_argument("--steps", type=int, default=50, help="default: 50")
    parser.add_argument("--guidance", type=float, help="default: 3, for Flux 3.5")
    parser.add_argument(
        "--strength", type=float, default=1.0, help="fraction of the steps to go (default: 1)"
    )
    parser.add_argument("--control-image", metavar="IMAGE", help="for a ControlNet pipeline")
    parser.add_argument(
        "--output", default="inversion.safetensors", help="file to write (default: %(default)s)"
    )
    parser.add_argument(
        "--reconstruction",
        metavar="PICTURE",
        help="picture to write (default: the output's name with -reconstruction.png)",
    )
    add_overwrite_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    return reported("invert", lambda: _invert(arguments))


def _invert(arguments: argparse.Namespace) -> None:
    overwrite = arguments.overwrite
    output = writable(arguments.output, overwrite=overwrite)
    reconstruction = writable_picture(
        arguments.reconstruction or str(output.with_name(f"{output.stem}-reconstruction.png")),
        overwrite=overwrite,
    )
    if reconstruction.resolve() == output.resolve():
        raise ValueError(f"--output and --reconstruction must differ, got {output} for both")
    options = settings(arguments)
    image = picture(arguments.image)
    if arguments.control_image is not None:
        options["control_image"] = picture(arguments.control_image)
    inversion = invert(
        load(arguments),
        image,
        arguments.prompt,
        negative_prompt=arguments.negative_prompt,
        solver=arguments.solver,
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance,
        strength=arguments.strength,
        **options,
    )
    back = inversion.reconstruct().images[0]
    # what cost the time first
    inversion.save(output)
    write_picture(reconstruction, back)
    print(inversion)
    print(f"wrote {output} and {reconstruction}")
