"""`sparserefine segment`: pictures in, masks and overlays out, without ROS."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sparserefine_ros.commands.arguments import parse_path, parse_threshold

HELP = "segment image files: writes NAME_mask.png (class ids), NAME_overlay.png and, where there are, superpixels"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", type=parse_path, help="image files")
    parser.add_argument("--model", default="camvid", help="bundle: a folder or a name under models/ (default: camvid)")
    parser.add_argument(
        "--output", type=parse_path, default=Path("masks"), help="folder for the results (default: masks)"
    )
    parser.add_argument("--entropy-threshold", type=parse_threshold, help="nats (default: auto, the bundle's)")
    parser.add_argument("--scale", type=float, help="low resolution over the image's (default: the bundle's)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "fp16", "bf16"))


def run(args: argparse.Namespace) -> int:
    import cv2
    import numpy as np

    from sparserefine_ros.datasets.pictures import encode_png, read_rgb
    from sparserefine_ros.errors import DatasetError, FrameError, ParameterError
    from sparserefine_ros.evaluation import files
    from sparserefine_ros.networks.boundaries import YELLOW, draw_boundaries
    from sparserefine_ros.segmenter.bundle import Bundle
    from sparserefine_ros.segmenter.segmenter import Segmenter

    stems = [file.stem for file in args.images]
    if same := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise ParameterError(
            f"several images are called {', '.join(same)} but for folder or ending, and each would overwrite the mask "
            "of the one before; segment them into different folders with --output"
        )

    def write(kind: str, picture: np.ndarray) -> Path:
        target: Path = args.output / f"{file.stem}_{kind}.png"
        files.write(target, encode_png(picture))
        return target

    if missing := [str(file) for file in args.images if not file.exists()]:
        raise ParameterError(f"there is no {', '.join(missing)}; give image files")
    bundle = Bundle.load(args.model)
    segmenter = Segmenter(bundle, args.device, args.precision, args.entropy_threshold, scale=args.scale)
    files.check_folder(args.output)
    failed = 0
    for file in args.images:
        try:
            image = read_rgb(file)
            result = segmenter.segment([image])[0]
        except (DatasetError, FrameError) as error:  # costs itself alone
            what = str(error) if str(file) in str(error) else f"{file}: {error}"
            print(f"error: {what}", file=sys.stderr)
            failed = 2
            continue
        written = write("mask", result.mask)
        write("overlay", cv2.addWeighted(image, 0.5, segmenter.classes.lut()[result.mask], 0.5, 0))
        if segmenter.has_superpixels:
            write("superpixels", draw_boundaries(image, segmenter.superpixels(image), YELLOW))
        total = sum(result.stage_ms.values())
        print(f"{file}: refined {result.density:.1%} of the pixels, {total:.0f} ms -> {written}")
    return failed
