"""What refinement changes by the size of things: connected regions of one class in the ground truth.

Shape shorthand: H, W native size, S size bins.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from rich.progress import track

from sparserefine_ros.datasets.base import UNLABELLED
from sparserefine_ros.evaluation.compare import HR, LR, REFINED
from sparserefine_ros.segmenter.segmenter import Segmenter
from sparserefine_ros.studies.report import Report, Setting, percent

EDGES = (64, 256, 1024, 4096, 16384, 65536)  # pixels; a region belongs to the first bin whose edge it is below
ORDER = (LR, REFINED, HR)


def region_sizes(label: np.ndarray) -> np.ndarray:
    """For every pixel of ``label`` [H, W] uint8 how many its region has, int64; 0 where unlabelled.

    A region is connected, corners included, and of one class.
    """
    sizes = np.zeros(label.shape, np.int64)
    for class_id in np.unique(label[label != UNLABELLED]):
        inside = label == class_id
        _, regions, stats, _ = cv2.connectedComponentsWithStats(inside.astype(np.uint8), connectivity=8)
        sizes[inside] = stats[regions[inside], cv2.CC_STAT_AREA]
    return sizes


def count_by_size(label: np.ndarray, masks: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By bin of region size, [S]: number of ``regions``, of their ``pixels``, and of the pixels right in each mask."""
    sizes = region_sizes(label)
    known = sizes > 0
    bins = np.digitize(sizes[known], EDGES)
    count = len(EDGES) + 1
    result = {
        "regions": np.rint(np.bincount(bins, 1 / sizes[known], count)).astype(np.int64),
        "pixels": np.bincount(bins, minlength=count),
    }
    for name, mask in masks.items():
        result[name] = np.bincount(bins[mask[known] == label[known]], minlength=count)
    return result


def study(setting: Setting) -> Report:
    bundle, device = setting.bundle, str(setting.device)
    low = Segmenter(bundle, device, refine=True)
    high = Segmenter(bundle, device, refine=False, scale=1.0)
    totals: dict[str, np.ndarray] = {}
    for sample in track(setting.val, description=f"regions in {len(setting.val)} frames"):
        assert sample.label is not None
        masks = {
            LR: low.segment([sample.image], refine=False)[0].mask,
            REFINED: low.segment([sample.image])[0].mask,
            HR: high.segment([sample.image])[0].mask,
        }
        for name, counts in count_by_size(sample.label, masks).items():
            totals[name] = totals.get(name, 0) + counts
    rows = _rows(totals)
    cells = [
        (
            row["size"], str(row["regions"]), percent(row["share"], 2), *(percent(row[name]) for name in ORDER),
            f"{100 * (row[REFINED] - row[LR]):+.1f}",
        )
        for row in rows
    ]  # fmt: skip
    note = (
        "Share of the pixels of a region that get its class, pooled over all regions of a size, in per cent; the gain "
        "is LR + SparseRefine minus LR dense, in points. Regions are connected pixels of one class in the ground "
        "truth, whatever the class: a car behind a pole is two. What is wrongly given to a class shows only where it "
        "is missed; IoU by class knows both."
    )
    return Report(
        "objects", "Right pixels by object size", ("pixels of the region", "regions", "share of pixels, %", *ORDER,
        "gain"), cells, note, {"rows": rows}, lambda figure: _draw(figure, rows),
    )  # fmt: skip


def _rows(totals: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """One row for every bin that holds a region, smallest first."""
    names = [f"below {EDGES[0]}", *(f"{a} to {b - 1}" for a, b in zip(EDGES, EDGES[1:], strict=False))]
    names.append(f"from {EDGES[-1]}")
    pixels = totals["pixels"]
    return [
        {
            "size": names[i], "regions": int(totals["regions"][i]), "share": float(pixels[i] / pixels.sum()),
            **{name: float(totals[name][i] / pixels[i]) for name in ORDER},
        }
        for i in np.nonzero(pixels)[0]
    ]  # fmt: skip


def _draw(figure: Any, rows: list[dict[str, Any]]) -> None:
    left, right = figure.subplots(1, 2)
    places, names = range(len(rows)), [row["size"].replace(" ", "\n", 1) for row in rows]
    for name, colour in zip(ORDER, ("#7f7f7f", "#1f77b4", "#2ca02c"), strict=True):
        left.plot(places, [100 * row[name] for row in rows], "o-", label=name, color=colour)
    left.set(ylabel="right pixels, %")
    left.legend()
    gains = [100 * (row[REFINED] - row[LR]) for row in rows]
    right.bar(places, gains, color=["#2ca02c" if g >= 0 else "#d62728" for g in gains])
    right.axhline(0, color="black", linewidth=0.8)
    right.set(ylabel="gain over LR dense, points")
    for axis in (left, right):
        axis.set_xticks(places, names, fontsize=8)
        axis.set(xlabel="pixels of the region")
        axis.grid(alpha=0.3)
