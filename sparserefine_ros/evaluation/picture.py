"""One picture of an evaluation: frames, masks, ground truth, errors, and where the refiner worked.

Shape shorthand: H, W image height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from sparserefine_ros.datasets.base import UNLABELLED
from sparserefine_ros.datasets.classes import ClassList
from sparserefine_ros.evaluation import files

WRONG = (255, 40, 40)
SELECTED = (255, 225, 0)
OPACITY = 0.6
TILE_WIDTH = 640  # pixels in the picture; a drive's frames are wider than a page
TILE_INCHES = 4.0


@dataclass(frozen=True)
class Panel:
    """One frame of the picture; what is None in every panel gets no column."""

    title: str
    image: np.ndarray  # [H, W, 3] uint8 RGB
    mask: np.ndarray  # [H, W] uint8 class ids
    label: np.ndarray | None = None  # [H, W] uint8 class ids, 255 = ignored
    selected: np.ndarray | None = None  # [H, W] bool: pixels that the refiner worked on


def overlay(image: np.ndarray, mask: np.ndarray, classes: ClassList) -> np.ndarray:
    """[H, W, 3] uint8: the mask's colours over the image; pixels without a class stay as they are."""
    colours = classes.lut()[mask].astype(np.float32)
    blend = (OPACITY * colours + (1 - OPACITY) * image + 0.5).astype(np.uint8)
    return np.where((mask == UNLABELLED)[..., None], image, blend)


def errors(image: np.ndarray, mask: np.ndarray, label: np.ndarray) -> np.ndarray:
    """[H, W, 3] uint8: the image in grey, wrong pixels in red, pixels without ground truth black."""
    picture = _grey(image)
    picture[label == UNLABELLED] = 0
    picture[wrong_pixels(mask, label)] = WRONG
    return picture


def highlight(image: np.ndarray, selected: np.ndarray) -> np.ndarray:
    """[H, W, 3] uint8: the image in grey, the pixels of ``selected`` [H, W] bool in yellow."""
    picture = _grey(image)
    picture[selected] = SELECTED
    return picture


def wrong_pixels(mask: np.ndarray, label: np.ndarray) -> np.ndarray:
    """[H, W] bool: pixels with ground truth whose class differs from it."""
    return (label != UNLABELLED) & (mask != label)


def draw(panels: Sequence[Panel], classes: ClassList, path: Path, title: str) -> None:
    """Writes a PNG: one row a frame; columns image, mask, ground truth, errors, selected pixels; below, the classes."""
    if not panels:
        raise ValueError("no frames to draw; give at least one panel")
    with_label = any(p.label is not None for p in panels)
    with_selected = any(p.selected is not None for p in panels)
    columns = 2 + 2 * with_label + with_selected
    height, width = panels[0].image.shape[:2]
    tile_height = TILE_INCHES * height / width
    figure = Figure(figsize=(TILE_INCHES * columns, (tile_height + 0.25) * len(panels) + 1.1))
    axes = figure.subplots(len(panels), columns, squeeze=False)
    for row, panel in zip(axes, panels, strict=True):
        for axis, (name, tile) in zip(row, _tiles(panel, classes, with_label, with_selected), strict=True):
            axis.set_axis_off()
            axis.set_title(name, fontsize=9, pad=3)
            if tile is not None:
                axis.imshow(shrink(tile, TILE_WIDTH))
    present = sorted({int(i) for p in panels for m in (p.mask, p.label) if m is not None for i in np.unique(m)})
    patches = [
        Patch(facecolor=np.array(classes.palette[i]) / 255, edgecolor="black", linewidth=0.4, label=classes.names[i])
        for i in present
        if i < len(classes)
    ]
    inches = figure.get_figheight()
    figure.suptitle(title, fontsize=11, y=1 - 0.08 / inches, va="top")
    figure.legend(handles=patches, loc="lower center", ncols=max(1, len(patches)), fontsize=8, frameon=False,
                  columnspacing=1.2, handlelength=1.4)  # fmt: skip
    figure.subplots_adjust(
        left=0.005, right=0.995, top=1 - 0.55 / inches, bottom=0.4 / inches, wspace=0.02, hspace=0.3 / tile_height
    )
    files.write_figure(path, figure)


def _tiles(
    panel: Panel, classes: ClassList, with_label: bool, with_selected: bool
) -> list[tuple[str, np.ndarray | None]]:
    tiles: list[tuple[str, np.ndarray | None]] = [
        (panel.title, panel.image),
        ("mask", overlay(panel.image, panel.mask, classes)),
    ]
    if with_label and panel.label is not None:
        wrong = wrong_pixels(panel.mask, panel.label).sum() / max(1, int((panel.label != UNLABELLED).sum()))
        tiles += [
            ("ground truth", overlay(panel.image, panel.label, classes)),
            (f"errors: {100 * wrong:.1f} % of labelled pixels", errors(panel.image, panel.mask, panel.label)),
        ]
    elif with_label:
        tiles += [("no ground truth", None), ("", None)]
    if with_selected and panel.selected is not None:
        name = f"selected for refinement: {100 * panel.selected.mean():.1f} %"
        tiles.append((name, highlight(panel.image, panel.selected)))
    elif with_selected:
        tiles.append(("", None))
    return tiles


def _grey(image: np.ndarray) -> np.ndarray:
    """Grey and darkened, so that a highlight stands out."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return cv2.cvtColor((grey * 0.6).astype(np.uint8), cv2.COLOR_GRAY2RGB)


def shrink(picture: np.ndarray, limit: int) -> np.ndarray:
    """``picture`` at most ``limit`` pixels wide."""
    height, width = picture.shape[:2]
    if width <= limit:
        return picture
    size = (limit, max(1, round(height * limit / width)))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
