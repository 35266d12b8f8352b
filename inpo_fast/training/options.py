"""Options that the commands on preference pairs share."""

from __future__ import annotations

import argparse
from typing import get_args

from .examine import Rules
from .images import Preprocess
from .pairs import DataError, TieMode, Ties
from .sources import Source, open_source


def add_data_arguments(parser: argparse.ArgumentParser, *, resolution: int | None) -> None:
    """Add them.

    Args:
        resolution: the default; None where the command takes that of a model.
    """
    shown = "that of the model, so 1024 for SDXL" if resolution is None else "%(default)s"
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a .parquet or .arrow file, a folder of them, a folder with w/ and l/ or win/ and "
        "lose/ and captions, or the name of a data set",
    )
    parser.add_argument("--split", help="of a folder or name that has several")
    parser.add_argument(
        "--streaming", action="store_true", help="read a named data set as a stream"
    )
    parser.add_argument("--max_train_samples", type=int, metavar="N", help="only the first N rows")
    parser.add_argument(
        "--resolution",
        type=int,
        default=resolution,
        help=f"height and width of the images (default: {shown})",
    )
    parser.add_argument(
        "--aspect_ratio_buckets",
        metavar="H,W;H,W",
        help="sizes instead of --resolution; a pair gets the nearest in aspect",
    )
    parser.add_argument(
        "--ties",
        choices=get_args(TieMode),
        default="drop",
        help="pairs with label 0.5: leave them out (default), let chance name the winner, keep "
        "them with p = 0.5, or refuse them",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of --ties random (default: %(default)s)"
    )
    parser.add_argument(
        "--num_workers",
        type=_count,
        default=0,
        help="processes that read and decode (default: %(default)s, in this one)",
    )


def _count(text: str) -> int:
    """An int that is at least 0.

    Raises:
        ArgumentTypeError: less than that.
    """
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return number


def opened(arguments: argparse.Namespace) -> Source:
    """The source that the arguments name.

    Raises:
        DataError: see `open_source`.
    """
    return open_source(
        arguments.source,
        split=arguments.split,
        streaming=arguments.streaming,
        max_samples=arguments.max_train_samples,
    )


def rules(arguments: argparse.Namespace, *, resolution: int | None, no_hflip: bool) -> Rules:
    """How the arguments make pairs of rows.

    Args:
        resolution: theirs, or that of the model.
        no_hflip: never mirror a pair.

    Raises:
        DataError: an argument that cannot be.
    """
    try:
        preprocess = Preprocess.of_flags(
            resolution=resolution,
            aspect_ratio_buckets=arguments.aspect_ratio_buckets,
            no_hflip=no_hflip,
        )
        return Rules(preprocess, Ties(arguments.ties, arguments.seed))
    except ValueError as error:
        raise DataError(str(error)) from error
