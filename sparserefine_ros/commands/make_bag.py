"""`sparserefine make-bag`: frames and their ground truth to rosbag2."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from sparserefine_ros.commands.arguments import TOLD_EVERY_S, parse_path, parse_size

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from sparserefine_ros.datasets.base import FrameSource

SLOWEST_HZ, FASTEST_HZ = 1e-3, 1e6  # stamps fit into 32 bits of seconds, and differ
HELP = "write frames and ground truth to a rosbag2 recording"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("out", type=parse_path, metavar="OUT", help="folder of the new bag")
    parser.add_argument(
        "--source",
        choices=("street", "camvid", "folder"),
        default="street",
        help="street: the procedural street, 19 Cityscapes classes; camvid: a copy of CamVid; "
        "folder: image/ and label/ beside a classes file (default: %(default)s)",
    )
    parser.add_argument("--root", type=parse_path, metavar="DIR", help="folder of the frames, for camvid and folder")
    parser.add_argument("--split", default="val", help="split of the data set (default: %(default)s)")
    parser.add_argument("--frames", type=int, metavar="N", help="at most N frames (default: all; street: 100)")
    parser.add_argument("--seed", type=int, help="seed of the street (default: the first of those never trained on)")
    parser.add_argument(
        "--size", type=parse_size, metavar="HxW", help="resize the frames (default: their own; street: 1024x2048)"
    )
    parser.add_argument("--rate", type=float, metavar="HZ", help="frames a second (default: the source's own)")
    parser.add_argument("--storage", choices=("mcap", "sqlite3"), default="mcap", help="(default: %(default)s)")
    parser.add_argument(
        "--encoding",
        choices=("rgb8", "bgr8", "jpeg", "png"),
        default="rgb8",
        help="rgb8 and bgr8: sensor_msgs/Image on /camera/image_raw; jpeg and png: sensor_msgs/CompressedImage on "
        "/camera/image_raw/compressed; ground truth is always mono8 on /camera/label (default: %(default)s)",
    )
    parser.add_argument("--force", action="store_true", help="replace a bag that lies at OUT")


def run(args: argparse.Namespace) -> int:
    """Writes the bag; raises SparseRefineError for arguments or frames that cannot be used."""
    from rich.console import Console
    from rich.markup import escape

    from sparserefine_ros.datasets.classes import CITYSCAPES
    from sparserefine_ros.errors import ParameterError

    if args.frames is not None and args.frames < 1:
        raise ParameterError(f"--frames is {args.frames}; a bag needs at least 1")
    if args.rate is not None and not SLOWEST_HZ <= args.rate <= FASTEST_HZ:
        raise ParameterError(f"--rate is {args.rate}; give {SLOWEST_HZ:g} to {FASTEST_HZ:g} frames a second")
    source = open_source(args.source, args.root, args.split, args.frames, args.seed, args.size, args.rate)
    console = Console()
    count = write_bag(
        source, args.out, args.frames, args.size, args.rate, args.storage, args.encoding, args.force, console
    )
    kinds = f"{len(source.classes)} classes ({source.classes.name})"
    console.print(f"[bold]{escape(str(args.out))}[/]: {count} frames, {escape(kinds)}")
    model = " --model street" if source.classes.names == CITYSCAPES.names else ""
    hint = f"next: sparserefine evaluate {shlex.quote(str(args.out))}{model}"
    console.print(hint, highlight=False, markup=False, soft_wrap=True)  # on one line, to be copied
    return 0


def open_source(
    kind: str,
    root: Path | None = None,
    split: str = "val",
    frames: int | None = None,
    seed: int | None = None,
    size: tuple[int, int] | None = None,
    rate: float | None = None,
) -> FrameSource:
    """The frames; ``size`` is (H, W) in pixels, ``rate`` the street camera's frames a second (default 10).

    ``seed`` None: the street's first drive that no bundle was trained on.
    """
    from sparserefine_ros.errors import DatasetError

    if kind == "street":
        from sparserefine_ros.datasets.splits import STREET_VAL_SEED
        from sparserefine_ros.datasets.street import Street

        seed = STREET_VAL_SEED if seed is None else seed
        return Street(frames=frames or 100, seed=seed, size=size or (1024, 2048), fps=rate or 10.0)
    if root is None:
        raise DatasetError(f"--source {kind} needs --root DIR, the folder that holds the frames")
    if kind == "camvid":
        from sparserefine_ros.datasets.camvid import CamVid

        return CamVid(root, split)
    from sparserefine_ros.datasets.folder import Folder

    return Folder(root, split)


def write_bag(
    source: FrameSource,
    out: Path,
    frames: int | None,
    size: tuple[int, int] | None,
    rate: float | None,
    storage: str,
    encoding: str,
    force: bool,
    console: Console,
) -> int:
    """Writes up to ``frames`` samples of ``source``, resized to ``size`` (H, W), and returns how many.

    Stamps are the samples' own, or ``1 / rate`` seconds apart, counted from a fixed date.
    """
    from rich.progress import Progress

    from sparserefine_ros.evaluation.bag_writer import START_NS, BagWriter
    from sparserefine_ros.node.logs import Throttle

    count = len(source) if frames is None else min(frames, len(source))
    with (
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
        BagWriter(out, source.classes, storage, encoding, force) as bag,
    ):
        task, due = progress.add_task("writing frames", total=count), Throttle(TOLD_EVERY_S)
        due("frames")  # not at once
        for i in range(count):
            sample = source[i]
            stamp = sample.stamp_ns if rate is None else round(i * 1e9 / rate)
            bag.write(
                _resized(sample.image, size, smooth=True),
                None if sample.label is None else _resized(sample.label, size, smooth=False),
                START_NS + stamp,
            )
            progress.advance(task)
            if not console.is_terminal and due("frames"):
                console.print(f"{i + 1} of {count} frames", highlight=False)
    return count


def _resized(array: np.ndarray, size: tuple[int, int] | None, smooth: bool) -> np.ndarray:
    """``array`` [H, W, ...] at ``size`` (h, w); class ids are never mixed (``smooth`` False: nearest pixel)."""
    import cv2

    if size is None or array.shape[:2] == size:
        return array
    if not smooth:
        interpolation = cv2.INTER_NEAREST_EXACT
    else:
        interpolation = cv2.INTER_AREA if size[0] <= array.shape[0] else cv2.INTER_LINEAR
    return cv2.resize(array, size[::-1], interpolation=interpolation)
