"""Frames to distil from: a recording or a folder of pictures; nobody has to have labelled them.

Shape shorthand: H, W image height and width in pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from sparserefine_ros.datasets.base import UNLABELLED, Sample
from sparserefine_ros.datasets.classes import ClassList
from sparserefine_ros.datasets.folder import PICTURES, Folder
from sparserefine_ros.datasets.pictures import read_rgb
from sparserefine_ros.errors import DatasetError, FrameError
from sparserefine_ros.evaluation.bags import Bag

Decode = Callable[[Any], np.ndarray]
"""A sensor_msgs Image or CompressedImage to RGB [H, W, 3] uint8; raises FrameError."""

logger = logging.getLogger(__name__)


def read_frames(
    path: Path, classes: ClassList, decode: Decode, limit: int, image_topic: str | None = None
) -> list[Sample]:
    """At most ``limit`` frames of ``path``, evenly spaced, in the order of their recording.

    ``path`` is a bag (folder with metadata.yaml, .mcap or .db3), a folder of pictures, or one that has them in
    ``image/``. Labels come along where the source has them with a class list whose names are those of ``classes``: a
    bag's ground truth, a `Folder`'s.
    Raises DatasetError or BagError where there is nothing to read.
    """
    if not path.exists():
        raise DatasetError(f"there are no frames at {path}; give a bag or a folder of {', '.join(PICTURES)} files")
    if path.is_file() or (path / "metadata.yaml").is_file():
        with Bag(path, image_topic) as bag:
            return _bag(bag, classes, decode, limit)
    if (path / "classes.yaml").is_file() and (folder := Folder(path)).classes.names == classes.names:
        return _readable(folder.__getitem__, evenly_spaced(len(folder), limit), path)
    files = sorted(f for f in (path / "image" if (path / "image").is_dir() else path).iterdir() if _is_picture(f))
    if not files:
        raise DatasetError(f"no {', '.join(PICTURES)} files in {path} or {path / 'image'}, and it is no bag")
    chosen = [files[i] for i in evenly_spaced(len(files), limit)]
    return _readable(lambda i: _picture(chosen[i], i), range(len(chosen)), path)


def evenly_spaced(count: int, limit: int) -> list[int]:
    """At most ``limit`` of ``range(count)``, the first among them."""
    kept = min(count, limit)
    return [i * count // kept for i in range(kept)]


def split_blocks(count: int, blocks: int = 20, every: int = 5) -> tuple[list[int], list[int]]:
    """Positions of ``count`` frames to train on and to hold out: one of ``every`` blocks of neighbours.

    Neighbours in a recording look alike; single frames held out would only test what was learnt by heart.
    """
    blocks = min(blocks, count)
    parts: tuple[list[int], list[int]] = ([], [])
    for i in range(count):
        parts[(i * blocks // count) % every == every // 2].append(i)
    return parts


def _bag(bag: Bag, classes: ClassList, decode: Decode, limit: int) -> list[Sample]:
    count = sum(1 for _ in bag.frames())
    if not count:
        raise DatasetError(f"{bag.path} holds no message on {bag.image_topic}; record some frames")
    wanted = set(evenly_spaced(count, limit))
    images: dict[int, np.ndarray] = {}
    for i, (stamp, message) in enumerate(track(bag.image_messages(), description="reading the bag", total=count)):
        if i in wanted:
            try:
                images[stamp] = np.array(decode(message))  # a copy: rgb8 would share the message's memory
            except FrameError as error:
                logger.warning("frame at stamp %d ns left out: %s", stamp, error)
    if not images:
        raise DatasetError(f"{bag.path}: not one message on {bag.image_topic} could be decoded")
    labelled = bag.classes is not None and bag.classes.names == classes.names
    labels = {}
    for stamp, label in bag.labels() if labelled else ():
        if stamp in images:
            known = label[label != UNLABELLED]
            if label.shape == images[stamp].shape[:2] and (not known.size or known.max() < len(classes)):
                labels[stamp] = label
            else:
                logger.warning("label at stamp %d ns left out: it has another size, or ids of no class", stamp)
    return [Sample(image, labels.get(stamp), str(stamp), stamp) for stamp, image in images.items()]


def _readable(read: Callable[[int], Sample], numbers: Sequence[int], path: Path) -> list[Sample]:
    """The frames of those numbers that can be read."""
    frames, why = [], ""
    for number in track(numbers, description="reading frames"):
        try:
            frames.append(read(number))
        except DatasetError as error:
            why = str(error)
            logger.warning("frame left out: %s", why)
    if not frames:
        raise DatasetError(f"not one picture of {path} can be used: {why}")
    return frames


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in PICTURES


def _picture(file: Path, index: int) -> Sample:
    return Sample(read_rgb(file), None, file.stem, index)
