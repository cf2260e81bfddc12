"""`sparserefine distill`: a refiner for a bundle from recorded frames, without labels."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from sparserefine_ros.commands.arguments import check_threads, parse_path

HELP = "train a refiner for a model on your own frames, without labels: its full-resolution prediction teaches"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="bundle to refine: a folder or a name under models/")
    parser.add_argument(
        "--frames", required=True, type=parse_path, metavar="BAG|DIR", help="a bag, or a folder of pictures"
    )
    parser.add_argument("--image-topic", metavar="TOPIC", help="where the bag has several image topics")
    parser.add_argument(
        "--limit", type=int, default=1000, help="most frames used, evenly spaced, 4 bytes a pixel (default: 1000)"
    )
    parser.add_argument("--scale", type=float, help="low resolution over native resolution (default: the bundle's)")
    parser.add_argument(
        "--recall",
        type=float,
        default=0.9,
        help="share to select of the pixels where low and full resolution disagree, a bound on the gain (default: 0.9)",
    )
    parser.add_argument(
        "--refiner",
        choices=("sparserefine", "repeat"),
        default="sparserefine",
        help="sparserefine: a small network of its own (default); repeat: the model's own layers at the uncertain "
        "pixels of full resolution: closer to that, slower, and not for every network",
    )
    parser.add_argument("--epochs", type=int, help="passes over the frames (default: 24, of repeat 3)")
    parser.add_argument(
        "--training-free",
        action="store_true",
        help="no training: edge-aware smoothing of the uncertain pixels, or repeat with the weights as they are",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=parse_path, help="folder of the new bundle (default: models/NAME-distilled)")
    parser.add_argument("--runs", type=parse_path, default=Path("runs"), help="checkpoints and logs (default: runs)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")
    parser.add_argument("--threads", type=int, help="CPU threads for torch (default: all cores)")


def run(args: argparse.Namespace) -> int:
    import cv2
    import torch

    from sparserefine_ros.errors import ParameterError
    from sparserefine_ros.evaluation import files
    from sparserefine_ros.evaluation.compare import compare
    from sparserefine_ros.node.conversion import to_rgb
    from sparserefine_ros.segmenter.bundle import Bundle
    from sparserefine_ros.segmenter.segmenter import pick_device
    from sparserefine_ros.training.distill import RECIPE, REPEAT, distill, summary, why_not_repeat
    from sparserefine_ros.training.frames import read_frames

    for name in ("recall", "scale"):
        value = getattr(args, name)
        if value is not None and not 0 < value <= 1:
            raise ParameterError(f"--{name} {value} is out of range; give a number above 0 and at most 1")
    for name in ("epochs", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ParameterError(f"--{name} is {getattr(args, name)}; give 1 or more")
    if args.seed < 0:
        raise ParameterError(f"--seed is {args.seed}; give 0 or more")
    check_threads(args.threads)
    device = pick_device(args.device)
    cv2.setNumThreads(1)  # batches are drawn in a pool of threads already
    if args.threads:
        torch.set_num_threads(args.threads)
    bundle = Bundle.load(args.model)
    if args.scale:
        bundle = replace(bundle, scale=args.scale)
    output = args.output or Path("models") / f"{bundle.name}-distilled"
    files.check_folder(output)
    if args.refiner == "repeat" and (reason := why_not_repeat(bundle, device)):
        raise ParameterError(f"--refiner repeat is not for model {args.model!r}: {reason}; leave it out")
    frames = read_frames(args.frames, bundle.classes, to_rgb, args.limit, args.image_topic)
    recipe, free = (REPEAT, "repeat") if args.refiner == "repeat" else (RECIPE, "bilateral")
    if args.epochs:
        recipe = replace(recipe, epochs=args.epochs)
    bundle, held_out = distill(
        bundle, frames, output, args.runs / output.name, device, free if args.training_free else recipe, args.recall,
        args.seed
    )  # fmt: skip
    print(summary(compare(bundle, held_out, str(device))))
    print(f"wrote {bundle.path}; try it: sparserefine segment IMAGE --model {bundle.path}")
    return 0
