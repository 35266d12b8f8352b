"""Encode a source once for all later runs: `inpo-fast cache`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from . import options
from .cache import DTYPES, CacheWriter
from .encoders import ModelFiles
from .pairs import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_data_arguments(parser, resolution=None)
    parser.add_argument(
        "--model",
        "--pretrained_model_name_or_path",
        required=True,
        metavar="PATH",
        help="folder or name of the pipeline",
    )
    parser.add_argument("--revision", help="of a pipeline that is named")
    parser.add_argument("--variant", help="of the weight files, as fp16")
    parser.add_argument(
        "--vae",
        "--pretrained_vae_model_name_or_path",
        metavar="PATH",
        help="folder or name of another autoencoder",
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="new folder, or one to go on with"
    )
    parser.add_argument(
        "--no_hflip",
        action="store_true",
        help="do not mirror pairs; otherwise both ways are stored, twice the size",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float16",
        help="of what is stored (default: %(default)s)",
    )
    parser.add_argument(
        "--compute_dtype",
        choices=DTYPES,
        default="float32",
        help="of the encoders (default: %(default)s)",
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, or auto: a GPU if there is one (default)"
    )
    parser.add_argument(
        "--shard_size",
        type=int,
        default=256,
        help="pairs of a file, which is what an interruption can lose (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the cache; 0, or 1 with the reason on stderr."""
    try:
        device = _device(arguments.device)
        files = ModelFiles.find(
            arguments.model,
            vae=arguments.vae,
            revision=arguments.revision,
            variant=arguments.variant,
        )
        resolution = arguments.resolution
        if resolution is None and arguments.aspect_ratio_buckets is None:
            # as training does
            resolution = files.resolution(arguments.model, arguments.revision)
        writer = CacheWriter(
            arguments.output,
            options.opened(arguments),
            options.rules(arguments, resolution=resolution, no_hflip=arguments.no_hflip),
            files,
            dtype=DTYPES[arguments.dtype],
            compute_dtype=DTYPES[arguments.compute_dtype],
        )
        report = writer.write(
            device=device, shard_size=arguments.shard_size, num_workers=arguments.num_workers
        )
    except DataError as error:
        print(f"inpo-fast cache: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"inpo-fast cache: {error}: free disk space if there is none, and run this again, "
            "which goes on after the last whole shard",
            file=sys.stderr,
        )
        return 1
    print(report.text())
    print(f"\nThe cache is in {arguments.output}")
    return 0


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"--device {name} is not available: {reason}") from error
    return name
