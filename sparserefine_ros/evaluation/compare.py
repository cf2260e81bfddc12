"""A bundle's table: dense at native resolution (HR), dense at low resolution (LR), LR with the refiner if it has one.

They run in turn on every frame of one pass, so that their times share whatever the machine is doing.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from sparserefine_ros.datasets.base import UNLABELLED, Sample
from sparserefine_ros.evaluation import files
from sparserefine_ros.evaluation.metrics import ConfusionMatrix
from sparserefine_ros.networks.macs import counting_refiner_macs, dense_macs
from sparserefine_ros.segmenter.bundle import Bundle
from sparserefine_ros.segmenter.onnx_dense import OnnxDense
from sparserefine_ros.segmenter.segmenter import Segmenter

HR, LR, REFINED = "HR dense", "LR dense", "LR + SparseRefine"
WARM_UP = 3  # frames that are scored but not timed


def compare(
    bundle: Bundle,
    samples: Sequence[Sample],
    device: str = "auto",
    precision: str = "fp32",
    threshold: float | None = None,
) -> dict[str, Any]:
    """Accuracy, density, recall, multiply-adds and time of each, as plain data.

    Keys: ``rows`` {name: miou, iou, agreement, macs_g, ms (median), density, recall}, ``ratios`` over HR dense, and the
    setting. Agreement is the share of all pixels whose class is HR dense's; it needs no labels.
    Latency is from camera pixels to mask, without message handling. Absent classes are left out of a mean.
    """
    segmenters = {
        HR: Segmenter(bundle, device, precision, refine=False, scale=1.0),
        LR: Segmenter(bundle, device, precision, threshold, refine=False),
    }
    refined = refined_name(bundle)
    if bundle.refiner:
        segmenters[refined] = Segmenter(bundle, device, precision, threshold, refine=True)
    return compare_segmenters(segmenters, samples)


def compare_segmenters(segmenters: dict[str, Segmenter], samples: Sequence[Sample]) -> dict[str, Any]:
    """As `compare`, for any ``segmenters`` by name, HR and LR among them; the others are LR with some refiner."""
    low = segmenters[LR]
    bundle = low.bundle
    matrices = {name: ConfusionMatrix(bundle.classes) for name in segmenters}
    times: dict[str, list[float]] = {name: [] for name in segmenters}
    densities: dict[str, list[float]] = {name: [] for name in segmenters}
    counted: dict[str, list[tuple[float, float]]] = {name: [] for name in segmenters}  # multiply-adds, density
    wrong, found = 0, 0
    agreements: dict[str, list[float]] = {name: [] for name in segmenters}
    for index, sample in enumerate(track(samples, description=f"comparing on {len(samples)} frames")):
        masks: dict[str, np.ndarray] = {}
        for name, segmenter in segmenters.items():
            # At least one frame with something to refine: without it nothing is known of a pixel's cost.
            refiner = segmenter.refiner
            if refiner is not None and (index < WARM_UP or not any(density for _, density in counted[name])):
                with counting_refiner_macs(refiner) as counts:
                    result = segmenter.segment([sample.image])[0]
                counted[name].append((sum(counts), result.density))
            else:
                result = segmenter.segment([sample.image])[0]
            masks[name] = result.mask
            agreements[name].append(float((result.mask == masks[HR]).mean()))
            if index >= WARM_UP:
                times[name].append(sum(result.stage_ms.values()))
            if sample.label is not None:
                matrices[name].update(sample.label, result.mask)
                if name == LR:
                    missed = (result.mask != sample.label) & (sample.label != UNLABELLED)
                    wrong += int(missed.sum())
                    found += int((missed & (result.entropy > low.entropy_threshold)).sum())
            if segmenter.refiner is not None:
                densities[name].append(result.density)
    size = samples[0].image.shape[:2]
    macs: dict[str, float] = {HR: dense_macs_of(segmenters[HR], size), LR: dense_macs_of(low, size)}
    for name in segmenters:
        if densities[name]:  # a refiner's work grows with the pixels it works on
            work, worked_on = (sum(column) for column in zip(*counted[name], strict=True))
            a_frame = work / worked_on if worked_on else math.nan
            macs[name] = macs[LR] + a_frame * statistics.fmean(densities[name])
    rows: dict[str, dict[str, Any]] = {
        name: {
            "miou": matrices[name].miou(), "iou": matrices[name].iou(), "macs_g": macs[name] / 1e9,
            "agreement": statistics.fmean(agreements[name]),
            "ms": statistics.median(times[name]) if times[name] else math.nan,
        }
        for name in segmenters
    }  # fmt: skip
    for name in segmenters:
        if densities[name]:
            rows[name]["density"] = statistics.fmean(densities[name])
    if (refined := refined_name(bundle)) in rows:
        rows[refined]["recall"] = found / max(wrong, 1)
    ratios = {
        name: {"macs": macs[name] / macs[HR], "time": _median_ratio(times[name], times[HR])}
        for name in segmenters
        if name != HR
    }
    return {
        "bundle": bundle.name, "frames": len(samples), "size": list(size), "threshold": low.entropy_threshold,
        "device": str(low.device), "threads": torch.get_num_threads(), "precision": low.precision,
        "machine": platform.processor() or platform.machine(), "torch": str(torch.__version__),
        "rows": rows, "ratios": ratios,
    }  # fmt: skip


def refined_name(bundle: Bundle) -> str:
    """What the row with the bundle's refiner is called."""
    network = bundle.refiner.network if bundle.refiner else "nothing"
    return REFINED if network == "sparserefine" else f"LR + {network}"


def markdown(table: dict[str, Any]) -> str:
    """The table as Markdown: totals first, then one line a class."""
    rows = table["rows"]
    lines = [
        "| | mIoU | as HR | density | recall | GMAC | MACs / HR | time / HR | ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        ratio = table["ratios"].get(name, {"macs": 1.0, "time": 1.0})
        extra = [f"{row[key]:.1%}" if key in row else "–" for key in ("density", "recall")]
        lines.append(
            f"| {name} | {figure(100 * row['miou'])} | {row['agreement']:.1%} | {extra[0]} | {extra[1]} "
            f"| {figure(row['macs_g'])} | {figure(ratio['macs'])} | {figure(ratio['time'])} | {figure(row['ms'], 0)} |"
        )
    lines += ["", "| IoU | " + " | ".join(rows) + " |", "|---|" + "---|" * len(rows)]
    for name in rows[HR]["iou"]:
        values = [row["iou"][name] for row in rows.values()]
        lines.append(f"| {name} | " + " | ".join(figure(100 * v, 1) for v in values) + " |")
    height, width = table["size"]
    lines += [
        "",
        '"as HR": share of the pixels with the class that HR dense gives. '
        f"{frames(table['frames'])} of {width}x{height}, threshold {table['threshold']:.4f} nats, {table['device']} "
        f"with {table['threads']} threads, {table['precision']}, torch {table['torch']}. Times are medians of one "
        f"interleaved run after {WARM_UP} frames, from camera pixels to mask; a ratio is the median of each "
        "frame's own ratio.",
    ]
    return "\n".join(lines)


def figure(value: float, digits: int = 2) -> str:
    """A number for a table; a dash for nan, as where no frame was left to be timed, or none had labels."""
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def frames(count: int, kind: str = "frame") -> str:
    """So many of them, in words."""
    return f"{count} {kind}" + "s" * (count != 1)


def save_json(table: dict[str, Any], file: Path) -> None:
    """Writes ``table`` as JSON; absent classes, and whatever else is no finite number, become null."""
    files.write_text(file, json.dumps(_null_nan(table), indent=1, allow_nan=False) + "\n")


def _null_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _null_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_null_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def dense_macs_of(segmenter: Segmenter, size: Sequence[int]) -> float:
    """Multiply-adds of the dense segmenter on a frame of ``size`` (H, W)."""
    if isinstance(segmenter.dense, OnnxDense):
        return math.nan  # counted in torch's operations
    low = segmenter.low_size(tuple(size))
    image = torch.zeros(1, 3, *low, device=segmenter.device)
    with torch.no_grad():
        return dense_macs(lambda: segmenter.dense(image))


def _median_ratio(times: Sequence[float], base: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, base, strict=True)) if base else math.nan
