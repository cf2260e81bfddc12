"""Pictures and mask files of a finished evaluation.

Shape shorthand: H, W image height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sparserefine_ros.datasets.classes import ClassList
from sparserefine_ros.datasets.pictures import encode_png
from sparserefine_ros.evaluation import files
from sparserefine_ros.evaluation.bags import Bag
from sparserefine_ros.evaluation.mask_spool import MaskSpool
from sparserefine_ros.evaluation.offline import Decode
from sparserefine_ros.evaluation.picture import Panel, draw


def draw_evaluation(
    bag: Bag,
    spool: MaskSpool,
    classes: ClassList,
    decode: Decode,
    stamps: list[int],
    selected: Mapping[int, np.ndarray],
    path: Path,
    title: str,
) -> None:
    """Draws the frames with these stamps; ``selected`` maps a stamp to [H, W] bool, where known."""
    wanted = set(stamps)
    images: dict[int, np.ndarray] = {}
    for stamp, message in bag.image_messages():
        if stamp in wanted:
            images[stamp] = decode(message)
        if len(images) == len(wanted):
            break
    labels = {stamp: label for stamp, label in bag.labels() if stamp in wanted}
    first = min(stamps)
    panels = []
    for stamp in sorted(wanted):
        mask = spool.get(stamp)
        if mask is None or stamp not in images:
            continue
        name = f"image at {(stamp - first) / 1e9:.2f} s"
        panels.append(Panel(name, images[stamp], mask, labels.get(stamp), selected.get(stamp)))
    draw(panels, classes, path, title)


def save_masks(spool: MaskSpool, classes: ClassList, folder: Path) -> int:
    """Two files a mask: ``STAMP.png`` (class ids, 255 = unlabelled) and ``STAMP_color.png``. Returns how many masks.

    Masks of an earlier evaluation in ``folder`` are removed, so that what lies there belongs together.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        if old.stem.removesuffix("_color").isdecimal():
            old.unlink()
    lut = classes.lut()
    for stamp in spool.stamps():
        mask = spool.get(stamp)
        assert mask is not None
        files.write(folder / f"{stamp}.png", encode_png(mask))
        files.write(folder / f"{stamp}_color.png", encode_png(lut[mask]))
    return len(spool)
