"""Types of arguments that several commands have."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from sparserefine_ros.errors import ParameterError
from sparserefine_ros.evaluation import files

TOLD_EVERY_S = 10.0  # how far long work is, where there is no terminal to show it on


def add_size(parser: argparse.ArgumentParser, default: str, what: str) -> None:
    """``--size HxW``, read as (height, width)."""
    parser.add_argument("--size", type=parse_size, default=default, metavar="HxW", help=f"{what} (default: {default})")


def check_threads(threads: int | None) -> None:
    """ParameterError unless ``threads`` is None, for all cores, or a number that torch takes."""
    if threads is not None and threads < 1:
        raise ParameterError(f"--threads is {threads}; give 1 or more, or leave it out for all cores")


def check_output(option: str, file: Path | None) -> None:
    """Makes the folder of ``file``; an error where nothing could be saved there, before minutes are spent."""
    if file is None:
        return
    files.check(file)
    if option == "--plot":
        from matplotlib.figure import Figure  # imported late: slow

        known = Figure().canvas.get_supported_filetypes()
        if file.suffix[1:].lower() not in known:
            raise ParameterError(f"{option} {file} is no picture; give a name that ends in {', '.join(sorted(known))}")


def parse_path(text: str) -> Path:
    """A path; ~ is the home folder also where the shell leaves it, as after --output=."""
    return Path(os.path.expanduser(text))


def parse_threshold(text: str) -> float | None:
    """Nats, or None for "auto", as the node's parameter takes it."""
    if text == "auto":
        return None
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number of nats") from None


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) in pixels of a text like 1024x2048."""
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give HEIGHTxWIDTH in pixels, as in 1024x2048")
    return int(height), int(width)
