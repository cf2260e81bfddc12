"""`sparserefine demo`: the whole way once. A street bag is made, the node started, the bag replayed and evaluated."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from sparserefine_ros.commands.arguments import add_size, parse_path

HELP = "make a short street bag, replay it through the live node, evaluate it"

CAMERA_HZ = 2.0
"""Few frames shall show much of the street."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "--output",
        type=parse_path,
        default=Path("demo_output"),
        metavar="DIR",
        help="folder to fill (default: %(default)s)",
    )
    parser.add_argument("--model", default="street", help="bundle with Cityscapes classes (default: %(default)s)")
    parser.add_argument(
        "--frames", type=int, default=12, metavar="N", help="frames of the drive (default: %(default)s)"
    )
    add_size(parser, "1024x2048", "of the camera")
    parser.add_argument("--seed", type=int, help="of the street (default: the first of those never trained on)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default: auto)")
    parser.add_argument(
        "--rate",
        type=float,
        default=0.0,
        metavar="X",
        help="0: every frame gets its mask; 1: the camera's timing, where the newest frame wins (default: 0)",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the demonstration; leaves its files in ``--output``; 1 if not one mask came back."""
    import time

    from rich.console import Console

    from sparserefine_ros.commands import make_bag
    from sparserefine_ros.commands.evaluation_session import Options, check_ros, evaluate, parameter_values
    from sparserefine_ros.datasets.classes import CITYSCAPES
    from sparserefine_ros.errors import ParameterError
    from sparserefine_ros.evaluation import report
    from sparserefine_ros.node.model import load_segmenter

    if args.frames < 1:
        raise ParameterError(f"--frames is {args.frames}; give 1 or more")
    if not 0 <= args.rate < math.inf:
        raise ParameterError(f"--rate is {args.rate}; give 0 (lossless) or a factor above 0")
    console = Console(highlight=False)
    start = time.monotonic()
    bag = args.output / "bag"
    options = Options(
        bag=bag,
        rate=args.rate,
        parameters={"model": args.model, "device": args.device},
        json=args.output / "results.json",
        output=args.output,
        save_masks=True,
    )
    check_ros()  # what is missing is said before the bag is made
    classes = load_segmenter(parameter_values(options.parameters)).classes
    if classes.names != CITYSCAPES.names:
        raise ParameterError(f"--model {args.model} has the classes of {classes.name}, the street those of Cityscapes")

    height, width = args.size
    console.print(f"[bold]1[/] a drive of {args.frames} frames at {height}x{width}, as a ROS 2 bag with ground truth")
    source = make_bag.open_source("street", frames=args.frames, seed=args.seed, size=args.size, rate=CAMERA_HZ)
    make_bag.write_bag(source, bag, args.frames, None, None, "mcap", "rgb8", True, console)

    console.print("[bold]2[/] the node starts as its own process; the bag is replayed to it over DDS")
    result = evaluate(options, console)

    console.print("[bold]3[/] what it measured")
    report.show(result, console)
    console.print(f"\ndone in {time.monotonic() - start:.0f} s. Look at:")
    for name, what in (
        ("evaluation.png", "frames, masks, ground truth, errors, and the pixels that were refined"),
        ("masks", "every mask: class ids, and the same in colour"),
        ("results.json", "the numbers"),
        ("bag", "the recording; play it with `ros2 bag play`"),
    ):
        console.print(f"  {args.output / name}: {what}", markup=False, soft_wrap=True)
    return 0 if result["frames"]["processed"] else 1
