"""The frames a person should look at first, as pictures for a page.

Shape shorthand: H, W image height and width in pixels; K classes.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np

from sparserefine_ros.datasets.classes import ClassList
from sparserefine_ros.evaluation import picture
from sparserefine_ros.evaluation.bags import Bag
from sparserefine_ros.evaluation.mask_spool import MaskSpool
from sparserefine_ros.evaluation.offline import Decode
from sparserefine_ros.evaluation.replay_metrics import ReplayLog, Score, evenly_spaced
from sparserefine_ros.segmenter.segmenter import Segmenter

COUNT = 6
APART_NS = 1_000_000_000
TILE_WIDTH = 1024  # pixels: enough to zoom into, little enough for a page of six frames
JPEG_QUALITY = 88


@dataclass(frozen=True)
class Tile:
    """One view of a frame: its name and a data: URI."""

    name: str
    uri: str


@dataclass(frozen=True)
class ShownFrame:
    """One frame: seconds of the recording since the first one, why it is shown, and its views."""

    time_s: float
    reason: str
    tiles: list[Tile]


def choose(log: ReplayLog, score: Score | None) -> tuple[str, dict[int, str]]:
    """(What the choice is, {stamp: why}): the worst first, at least a second apart, since neighbours look alike.

    Worst is the largest share of wrong pixels; without a labelled pixel the largest share of uncertain ones; where
    nothing was refined either, frames are spread over the drive.
    """
    if score and score.frames:
        wrong = {}
        for stamp, counts in score.frames.items():
            total = int(counts.confusion.sum())
            if total:
                wrong[stamp] = 1 - int(np.diagonal(counts.confusion).sum()) / total
        if wrong:
            return "worst", {s: f"{100 * wrong[s]:.1f} % of labelled pixels wrong" for s in spread(wrong)}
    density = {stamp: value for stamp, value in log.density.items() if stamp in log.answered}
    if any(density.values()):
        return "uncertain", {s: f"{100 * density[s]:.1f} % of the pixels uncertain" for s in spread(density)}
    return "spread", dict.fromkeys(evenly_spaced(sorted(log.answered), COUNT), "")


def spread(badness: Mapping[int, float], count: int = COUNT, apart_ns: int = APART_NS) -> list[int]:
    """Up to ``count`` stamps by falling badness, none closer than ``apart_ns`` to a worse one."""
    chosen: list[int] = []
    for stamp in sorted(badness, key=lambda s: (-badness[s], s)):
        if len(chosen) < count and all(abs(stamp - other) >= apart_ns for other in chosen):
            chosen.append(stamp)
    return chosen


def collect(
    bag: Bag, spool: MaskSpool, segmenter: Segmenter, decode: Decode, reasons: Mapping[int, str]
) -> list[ShownFrame]:
    """The views of the frames with these stamps, in the order of ``reasons``; those without image or mask left out."""
    labels = {stamp: label for stamp, label in bag.labels() if stamp in reasons}
    first: int | None = None
    found: dict[int, ShownFrame] = {}
    for frame in bag.frames():
        stamp = frame.stamp_ns
        first = frame.time_ns if first is None else first
        mask = spool.get(stamp) if stamp in reasons else None
        if mask is None:
            continue
        tiles = _tiles(decode(bag.message(frame)), mask, labels.get(stamp), segmenter)
        found[stamp] = ShownFrame((frame.time_ns - first) / 1e9, reasons[stamp], tiles)
    return [found[stamp] for stamp in reasons if stamp in found]


def _tiles(image: np.ndarray, mask: np.ndarray, label: np.ndarray | None, segmenter: Segmenter) -> list[Tile]:
    classes: ClassList = segmenter.classes
    entropy = segmenter.segment([image])[0].entropy
    views = {"image": image, "mask": picture.overlay(image, mask, classes)}
    if label is not None and label.shape == mask.shape:
        views["ground truth"] = picture.overlay(image, label, classes)
        views["errors"] = picture.errors(image, mask, label)
    views["entropy"] = heat(entropy / math.log(len(classes)))
    if segmenter.refines:
        views["refined pixels"] = picture.highlight(image, entropy > segmenter.entropy_threshold)
    return [Tile(name, data_uri(view)) for name, view in views.items()]


def heat(values: np.ndarray) -> np.ndarray:
    """[H, W, 3] uint8 RGB of [H, W] in [0, 1]: black to white over red (inferno)."""
    levels = (np.clip(values, 0, 1) * 255).astype(np.uint8)
    return cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)


def data_uri(view: np.ndarray) -> str:
    """A JPEG of [H, W, 3] uint8 RGB, at most ``TILE_WIDTH`` wide."""
    small = picture.shrink(view, TILE_WIDTH)
    done, data = cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    if not done:
        raise ValueError(f"cannot encode a picture of shape {small.shape}; give [H, W, 3] uint8")
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode("ascii")
