"""What commands write: checked before the work, and never over what is there unasked."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_overwrite_argument(parser: argparse.ArgumentParser) -> None:
    """`--overwrite`."""
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")


def writable(path: str | Path, *, overwrite: bool) -> Path:
    """A path of a file whose folder exists.

    Raises:
        ValueError: it does not, the path is a folder itself, or there is such a file and it may not
            be overwritten.
    """
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder; name a file to write")
    if not Path(path).parent.is_dir():
        raise ValueError(f"no folder {Path(path).parent} to write {Path(path).name} to")
    if not overwrite and Path(path).exists():
        raise ValueError(f"{path} exists; name another file, or give --overwrite to replace it")
    return Path(path)


def writable_folder(path: str | Path, *, overwrite: bool) -> Path:
    """A path of a folder that is not there yet, or empty.

    Raises:
        ValueError: it is a file, or it has something in it and that may not be overwritten.
    """
    if Path(path).exists() and not Path(path).is_dir():
        raise ValueError(f"{path} is a file; name a folder to write to")
    if not overwrite and Path(path).is_dir() and any(Path(path).iterdir()):
        raise ValueError(
            f"{path} is not empty; name another folder, or give --overwrite to replace its files"
        )
    return Path(path)
