"""Counts of a source before any GPU is rented: `inpo-fast validate-data`."""

from __future__ import annotations

import argparse
import json
import sys

from . import options
from .examine import Catalogue
from .pairs import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_data_arguments(parser, resolution=512)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the counts; 0, or 1 where there is nothing to train on."""
    try:
        # mirrored or not, the counts are the same
        rules = options.rules(arguments, resolution=arguments.resolution, no_hflip=True)
        source = options.opened(arguments)
        report = Catalogue.of(source, rules, num_workers=arguments.num_workers).report
    except DataError as error:
        print(f"inpo-fast validate-data: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps({"source": arguments.source, **report.to_json()}, indent=2))
    else:
        print(report.text())
    if report.pairs == 0:
        print("inpo-fast validate-data: no pair can be used", file=sys.stderr)
        return 1
    return 0
