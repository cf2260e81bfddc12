"""Table 5b: the entropy threshold trades accuracy for time."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
from rich.progress import track

from sparserefine_ros.datasets.base import UNLABELLED
from sparserefine_ros.evaluation.compare import WARM_UP, dense_macs_of
from sparserefine_ros.evaluation.metrics import ConfusionMatrix
from sparserefine_ros.networks.macs import counting_refiner_macs
from sparserefine_ros.segmenter.segmenter import Segmentation, Segmenter
from sparserefine_ros.studies.report import Report, Setting, percent

THRESHOLDS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0, 1.3)  # nats; the bundle's own in place of its neighbour


class _Tally:
    """What one threshold did over all frames."""

    def __init__(self, setting: Setting) -> None:
        self.matrix = ConfusionMatrix(setting.bundle.classes)
        self.density: list[float] = []
        self.ms: list[float] = []
        self.macs: list[float] = []  # of the refiner, over density, in counted frames
        self.found = self.wrong = 0

    def row(self, threshold: float | None, macs_lr: float) -> dict[str, Any]:
        density = statistics.fmean(self.density)
        refiner = statistics.fmean(self.macs) * density if self.macs else 0.0
        return {
            "threshold": threshold, "density": density, "recall": self.found / max(self.wrong, 1),
            "miou": self.matrix.miou(), "macs_g": (macs_lr + refiner) / 1e9,
            "ms": statistics.median(self.ms) if self.ms else math.nan,
        }  # fmt: skip


def study(setting: Setting) -> Report:
    segmenter = Segmenter(setting.bundle, str(setting.device), refine=True)
    own, limit = segmenter.entropy_threshold, math.log(len(setting.bundle.classes))
    others = (t for t in THRESHOLDS if t < limit and abs(t - own) > 0.05)
    thresholds: list[float | None] = [None, *sorted({own, *others}, reverse=True)]
    tallies = {threshold: _Tally(setting) for threshold in thresholds}  # None: no refinement
    for index, sample in enumerate(track(setting.val, description=f"thresholds on {len(setting.val)} frames")):
        assert sample.label is not None
        for threshold, tally in tallies.items():
            segmenter.entropy_threshold = own if threshold is None else threshold
            result = _run(segmenter, sample.image, threshold is not None, index < WARM_UP, tally)
            tally.matrix.update(sample.label, result.mask)
            if threshold is None:
                wrong = (sample.label != UNLABELLED) & (result.mask != sample.label)
            else:
                tally.wrong += int(wrong.sum())
                tally.found += int((wrong & (result.entropy > threshold)).sum())
    macs_lr = dense_macs_of(segmenter, setting.val[0].image.shape[:2])
    rows = [tally.row(threshold, macs_lr) for threshold, tally in tallies.items()]
    cells = [_cells(row, own, rows[0]["ms"]) for row in rows]
    note = (
        f"Recall: wrong pixels of LR dense that are selected, of all wrong ones. Multiply-adds and time are of the "
        f"whole pipeline, from camera pixels to mask, a frame; time is the median of one interleaved run. "
        f"{own:.4f} nats is the bundle's threshold, at which its refiner was trained."
    )
    return Report(
        "threshold", "Entropy threshold (Table 5b)",
        ("threshold, nats", "density, %", "recall, %", "mIoU", "GMAC", "ms", "time / LR dense"), cells, note,
        {"rows": rows}, lambda figure: _draw(figure, rows, own),
    )  # fmt: skip


def _run(segmenter: Segmenter, image: np.ndarray, refine: bool, warm_up: bool, tally: _Tally) -> Segmentation:
    """One frame; where ``warm_up`` it is not timed, but the refiner's multiply-adds are counted."""
    if warm_up and refine:
        assert segmenter.refiner is not None
        with counting_refiner_macs(segmenter.refiner) as counts:
            result = segmenter.segment([image])[0]
        if result.density:
            tally.macs.append(sum(counts) / result.density)
    else:
        result = segmenter.segment([image], refine=refine)[0]
    if not warm_up:
        tally.ms.append(sum(result.stage_ms.values()))
    tally.density.append(result.density)
    return result


def _cells(row: dict[str, Any], own: float, ms_lr: float) -> tuple[str, ...]:
    threshold = row["threshold"]
    name = "none: LR dense" if threshold is None else f"{threshold:g}" + (" (the bundle's)" if threshold == own else "")
    return (
        name, percent(row["density"]), percent(row["recall"]), percent(row["miou"], 2), f"{row['macs_g']:.2f}",
        f"{row['ms']:.0f}", f"{row['ms'] / ms_lr:.2f}",
    )  # fmt: skip


def _draw(figure: Any, rows: list[dict[str, Any]], own: float) -> None:
    left, right = figure.subplots(1, 2)
    for axis, key, label in ((left, "density", "density, % of pixels"), (right, "ms", "ms a frame")):
        xs = [100 * row[key] if key == "density" else row[key] for row in rows]
        axis.plot(xs, [100 * row["miou"] for row in rows], "o-", color="#1f77b4")
        for x, row in zip(xs, rows, strict=True):
            name = "LR dense" if row["threshold"] is None else f"{row['threshold']:g}"
            place, weight = ((-6, 8), "bold") if row["threshold"] == own else ((4, -11), "normal")
            axis.annotate(
                name, (x, 100 * row["miou"]), place, textcoords="offset points", fontsize=8, weight=weight
            )  # fmt: skip
        axis.margins(y=0.1)
        axis.set(xlabel=label, ylabel="mIoU, %")
        axis.grid(alpha=0.3)
