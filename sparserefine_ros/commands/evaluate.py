"""`sparserefine evaluate`: a bag through the live node, or through the segmenter alone, measured."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from sparserefine_ros.commands.arguments import parse_path
from sparserefine_ros.node.parameters import BY_NAME

if TYPE_CHECKING:
    from sparserefine_ros.commands.evaluation_session import Options

SEGMENTER_PARAMETERS = (
    "decoder", "model", "refine", "entropy_threshold", "scale", "device", "precision", "sparse_backend", "runtime",
    "provider", "threads",
)  # fmt: skip
"""The node's parameters that decide its masks: live and offline evaluation take the same."""

HELP = "replay a bag through the live node and measure accuracy, latency and drops"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("bag", type=parse_path, metavar="BAG", help="rosbag2 folder, or a single .mcap or .db3 file")
    parser.add_argument("--offline", action="store_true", help="run the segmenter alone, without ROS")
    parser.add_argument(
        "--wait",
        action="store_true",
        help="lossless: send each frame only after the mask of the one before, whatever the recording's timing",
    )
    parser.add_argument(
        "--rate", type=float, default=1.0, help="1: the recording's timing; 2: twice as fast; 0: as --wait (default: 1)"
    )
    group = parser.add_argument_group("segmenter: the node's parameters")
    for name in SEGMENTER_PARAMETERS:
        parameter = BY_NAME[name]
        # argparse reads % as its own
        text = f"{parameter.description} ({parameter.values}; default: {parameter.default})".replace("%", "%%")
        group.add_argument(f"--{name.replace('_', '-')}", dest=name, metavar="VALUE", help=text)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--report", type=parse_path, metavar="FILE", help="write a page to read (HTML) there; a folder gets report.html"
    )
    output.add_argument(
        "--json", type=parse_path, metavar="FILE", help="write the numbers there, for `sparserefine compare`"
    )
    output.add_argument(
        "--output", type=parse_path, metavar="DIR", help="write evaluation.png and the node's log there"
    )
    output.add_argument("--save-masks", action="store_true", help="with --output: every mask as PNG, in DIR/masks")
    replay = parser.add_argument_group("replay")
    replay.add_argument("--image-topic", metavar="TOPIC", help="where the bag has several image topics")
    replay.add_argument("--label-topic", metavar="TOPIC", help="ground truth (default: /camera/label)")
    replay.add_argument(
        "--answer-timeout", type=float, default=60.0, metavar="S", help="how long to wait for a mask (default: 60)"
    )
    replay.add_argument("--domain-id", type=int, metavar="N", help="ROS domain of the replay (default: a free one)")


def run(args: argparse.Namespace) -> int:
    """Evaluates and prints the report; 1 if not one mask came back. Raises SparseRefineError for bad input."""
    from rich.console import Console

    from sparserefine_ros.commands.evaluation_session import evaluate
    from sparserefine_ros.evaluation import report

    console = Console()
    result = evaluate(options(args), console)
    report.show(result, console)
    for path in (args.report and html_file(args.report), args.json, args.output and args.output / "evaluation.png"):
        if path and path.exists():
            console.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)
    return 0 if result["frames"]["processed"] else 1


def html_file(path: Path) -> Path:
    """Where the page goes: ``path`` itself, or report.html where it is a folder or has no ending."""
    return path / "report.html" if path.is_dir() or not path.suffix else path


def options(args: argparse.Namespace) -> Options:
    """The arguments, checked but for the node's parameters. Raises ParameterError for a value outside its range."""
    from sparserefine_ros.commands.evaluation_session import Options
    from sparserefine_ros.errors import ParameterError

    if not 0 <= args.rate < math.inf:
        raise ParameterError(f"--rate is {args.rate}; give 0 (lossless) or a factor above 0")
    if not args.answer_timeout > 0:
        raise ParameterError(f"--answer-timeout is {args.answer_timeout}; give seconds above 0")
    if args.domain_id is not None and not 0 <= args.domain_id <= 101:
        raise ParameterError(f"--domain-id is {args.domain_id}; give 0 to 101")
    if args.save_masks and args.output is None:
        raise ParameterError("--save-masks needs --output DIR, the folder to save them in")
    if args.json and args.report and args.json.resolve() == html_file(args.report).resolve():
        raise ParameterError(f"--json and --report are both {args.json}; give two files")
    return Options(
        bag=args.bag,
        parameters={n: getattr(args, n) for n in SEGMENTER_PARAMETERS if getattr(args, n) is not None},
        offline=args.offline,
        rate=0.0 if args.wait else args.rate,
        report=args.report and html_file(args.report),
        json=args.json,
        output=args.output,
        save_masks=args.save_masks,
        image_topic=args.image_topic,
        label_topic=args.label_topic,
        answer_timeout_s=args.answer_timeout,
        domain_id=args.domain_id,
    )
