"""The main job on the shipped model: `inpo-fast demo`.

Images go to noise and back, are edited through their prompt, and the model is aligned by InPO. The
numbers go to `report.json`, an account for people to `report.md`, and pictures beside them.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path

from . import align, edit, roundtrip
from .pipeline import DemoError, choose_device, deterministic, load
from .results import Results
from .text import summary

SHIPPED = Path(__file__).parent.parent / "shipped"


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers; the defaults fit 6 minutes on 2 CPU cores.

    Attributes:
        scenes: held-out scenes of the round trip.
        round_trips: settings of its rows.
        edits, edit_steps, edit_guidance: of the edits.
        align: of the alignment.
        seed: of everything.
    """

    scenes: int = 2
    round_trips: tuple[roundtrip.Setting, ...] = (roundtrip.Setting(),)
    edits: int = 32
    edit_steps: int = 25
    edit_guidance: float = 3.0
    align: align.Settings = field(default_factory=align.Settings)
    seed: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo-output"),
        metavar="DIR",
        help="folder for report.md, report.json and the pictures (default: %(default)s)",
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="round trips also at other guidance, steps and model dtypes; takes far longer",
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, or auto: a GPU if there is one (default)"
    )
    parser.add_argument(
        "--seed", type=_seed, default=0, help="of everything (default: %(default)s)"
    )


def _seed(text: str) -> int:
    """A seed of which every part of the demo can take its own."""
    number = int(text)
    if not 0 <= number < 2**31:
        raise argparse.ArgumentTypeError(f"must be in [0, 2^31), got {text}")
    return number


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; 0, or 1 with one line on stderr where the user has to mend something."""
    settings = Settings(seed=arguments.seed)
    if arguments.full:
        settings = replace(settings, round_trips=(*settings.round_trips, *roundtrip.FULL))
    # A missing package must show before the work, not after it.
    for package in ("diffusers", "transformers", "pyarrow", "PIL", "matplotlib"):
        import_module(package)
    from . import report

    try:
        report.prepare(arguments.output)
        results = measure(settings, device=arguments.device, shipped=SHIPPED)
        report.write(arguments.output, results)
    except DemoError as error:
        print(f"inpo-fast demo: {error}", file=sys.stderr)
        return 1
    print(summary(results))
    print(f"\nThe full account is in {arguments.output / 'report.md'}")
    return 0


def measure(settings: Settings, *, device: str, shipped: Path) -> Results:
    """Run the three parts.

    Args:
        device: `auto` or a torch device.
        shipped: folder with `model/` and `preferences.parquet`.

    Raises:
        DemoError: the model or the pairs cannot be read, or there is no such device.
    """
    began = time.perf_counter()
    seed = settings.seed
    # the seeds of the parts are apart, so that no part sees the scenes of another
    seeds = {"seed": seed, "roundtrip": seed, "edit": seed + 1, "align": seed + 2}
    with deterministic():
        pipeline = load(shipped / "model", choose_device(device))
        round_trips = roundtrip.run(
            pipeline,
            count=settings.scenes,
            settings=settings.round_trips,
            seed=seeds["roundtrip"],
        )
        edits = edit.run(
            pipeline,
            count=settings.edits,
            steps=settings.edit_steps,
            guidance=settings.edit_guidance,
            seed=seeds["edit"],
        )
        aligned = align.run(
            pipeline, shipped / "preferences.parquet", settings.align, seed=seeds["align"]
        )
    return Results(
        roundtrip=round_trips,
        edit=edits,
        align=aligned,
        settings=settings,
        seeds=seeds,
        device=str(pipeline.device),
        seconds=time.perf_counter() - began,
    )
