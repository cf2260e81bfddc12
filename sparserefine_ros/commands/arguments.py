"""Types of arguments that several commands have."""

from __future__ import annotations

import argparse


def add_size(parser: argparse.ArgumentParser, default: str, what: str) -> None:
    """``--size HxW``, read as (height, width)."""
    parser.add_argument("--size", type=parse_size, default=default, metavar="HxW", help=f"{what} (default: {default})")


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) in pixels of a text like 1024x2048."""
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give HEIGHTxWIDTH in pixels, as in 1024x2048")
    return int(height), int(width)
