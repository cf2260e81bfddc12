"""`sparserefine compare`: two evaluations of one bag, with confidence intervals of what differs."""

from __future__ import annotations

import argparse
from pathlib import Path

from sparserefine_ros.commands.arguments import parse_path

HELP = "compare two results of `evaluate --json` frame by frame, with confidence intervals"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("a", type=parse_path, metavar="A.json", help="result to compare with")
    parser.add_argument("b", type=parse_path, metavar="B.json", help="result that may be better; of the same bag")
    parser.add_argument("--html", type=parse_path, metavar="FILE", help="write a page to read there")
    parser.add_argument("--json", type=parse_path, metavar="FILE", help="write the numbers there")


def run(args: argparse.Namespace) -> int:
    """Prints and writes the comparison. Raises ResultError for results that cannot be compared."""
    import json

    from rich.console import Console

    from sparserefine_ros.errors import ParameterError
    from sparserefine_ros.evaluation import comparison_page, files, run_comparison

    places = [path.resolve() for path in (args.a, args.b, args.html, args.json) if path]
    for option, path in (("--html", args.html), ("--json", args.json)):
        if path and places.count(path.resolve()) > 1:
            raise ParameterError(f"{option} {path} would write over what is read or written beside it; give another")
    comparison = run_comparison.compare(run_comparison.load(args.a), run_comparison.load(args.b))
    names = short_names(args.a, args.b)
    console = Console()
    comparison_page.show(comparison, names, console)
    if args.html:
        comparison_page.write(comparison, names, args.html)
    if args.json:
        files.write_text(args.json, json.dumps(run_comparison.as_data(comparison), indent=1, allow_nan=False) + "\n")
    for path in filter(None, (args.html, args.json)):
        console.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)
    return 0


def short_names(a: Path, b: Path) -> tuple[str, str]:
    """The shortest ends of both paths, without suffix, that tell them apart: before/results and after/results."""
    parts = [path.with_suffix("").parts for path in (a, b)]
    for count in range(1, max(map(len, parts)) + 1):
        first, second = (str(Path(*p[-count:])) for p in parts)
        if first != second:
            return first, second
    return a.name, b.name
