"""`inpo-fast invert`: an image to its noise, with the picture that comes back and a report."""

from __future__ import annotations

import argparse
from typing import Any

from ..solvers import SOLVERS
from .inverting import invert
from .loading import add_model_arguments, load, number, reported, writable
from .plan import NULL_TEXT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("image", metavar="IMAGE", help="picture to invert")
    add_model_arguments(parser)
    parser.add_argument("--prompt", default="", help="what the picture shows")
    parser.add_argument("--negative-prompt", help="what it does not show")
    parser.add_argument(
        "--solver", default="bdia", choices=[*SOLVERS, NULL_TEXT], help="default: bdia"
    )
    parser.add_argument(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="parameter of the solver or argument of the pipeline, e.g. gamma=0.94; repeatable",
    )
    parser.add_argument("--steps", type=int, default=50, help="default: 50")
    parser.add_argument("--guidance", type=float, help="default: 3, for Flux 3.5")
    parser.add_argument("--strength", type=float, default=1.0, help="fraction of the steps to go")
    parser.add_argument("--control-image", metavar="IMAGE", help="for a ControlNet pipeline")
    parser.add_argument("--output", default="inversion.safetensors", help="file to write")
    parser.add_argument(
        "--reconstruction",
        metavar="PICTURE",
        help="picture to write (default: the output's name with -reconstruction.png)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    return reported("invert", lambda: _invert(arguments))


def _invert(arguments: argparse.Namespace) -> None:
    from diffusers.utils import load_image

    output = writable(arguments.output)
    picture = writable(
        arguments.reconstruction or str(output.with_name(f"{output.stem}-reconstruction.png"))
    )
    options: dict[str, Any] = {}
    for setting in arguments.set:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set must be NAME=VALUE, got {setting!r}")
        options[name] = number(value)
    image = load_image(arguments.image)
    if arguments.control_image is not None:
        options["control_image"] = load_image(arguments.control_image)
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
    inversion.reconstruct().images[0].save(picture)
    inversion.save(output)
    print(inversion)
    print(f"wrote {output} and {picture}")
