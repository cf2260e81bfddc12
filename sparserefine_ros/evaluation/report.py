"""The report of an evaluation: a dictionary for --json, and the same as tables for people."""

from __future__ import annotations

import json
import math
import os
import platform
import textwrap
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from sparserefine_ros.evaluation import bootstrap, boundary, files, per_frame, provenance, replay_metrics
from sparserefine_ros.evaluation.replay_metrics import ReplayLog, Score
from sparserefine_ros.untrusted import printable

LAG_MS = 50.0
"""A replay that is later than this, at worst, is remarked on."""
PACKAGES = ("sparserefine_ros", "torch", "numpy", "opencv-python-headless", "rosbags", "onnxruntime")


def build(log: ReplayLog, score: Score | None, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The report. ``score`` is None where the bag has no ground truth; ``facts`` (bag, model, ...) are added as given.

    ``miou`` and ``iou`` are fractions (None: no ground truth, or the class is absent), ``density`` the mean over
    frames, ``frames`` as in `replay_metrics.count_frames`, ``latency_ms`` from publishing a frame to receiving its
    mask (offline: the time of one call), ``stages_ms`` percentiles by stage. ``density`` and ``stages_ms`` cover the
    frames that the node timed, ``frames_timed`` tells how many. ``intervals`` are [low, high] by `bootstrap` over
    frames, None for fewer than `bootstrap.MIN_FRAMES`. ``confusion`` [K][K + 1] is in pixels, rows the truth, the last
    column unlabelled; ``per_frame`` as `per_frame.table`.
    """
    iou = {name: _number(value) for name, value in score.matrix.iou().items()} if score else None
    return {
        "miou": _number(score.matrix.miou()) if score else None,
        "iou": iou,
        "absent_classes": score.absent if score else None,
        "pixel_accuracy": _number(score.matrix.accuracy()) if score else None,
        "boundary_iou": _number(score.mean_boundary_iou) if score else None,
        "boundary_iou_by_class": {n: _number(v) for n, v in score.boundary_iou.items()} if score else None,
        "boundary_distance": boundary.DISTANCE,
        "intervals": intervals(score) if score else None,
        "confusion": score.matrix.counts.tolist() if score else None,
        "frames_labelled": score.labelled if score else 0,
        "frames_scored": score.scored if score else 0,
        "labels_without_image": score.without_image if score else 0,
        "labels_of_other_size": score.other_size if score else 0,
        "density": replay_metrics.mean_density(log),
        "frames": replay_metrics.count_frames(log),
        "node_counters": log.counters,
        "timeouts": len(log.timeouts),
        "lag_ms": log.lag_s * 1e3,
        "latency_ms": replay_metrics.percentiles(replay_metrics.latencies_ms(log)),
        "stages_ms": replay_metrics.stage_percentiles(log),
        "frames_timed": len(log.stage_ms),
        **replay_metrics.rates(log),
        **facts,
        "hardware": hardware(),
        "versions": {**versions(), **facts.get("versions", {})},
        "commit": provenance.commit(),
        "per_frame": per_frame.table(log, score),
    }


def intervals(score: Score) -> dict[str, Any] | None:
    """What other frames of the drive would have given: [low, high] of mIoU, boundary IoU, accuracy, IoU by class."""
    if score.scored < bootstrap.MIN_FRAMES:
        return None
    drawn = bootstrap.weights(score.scored)
    confusion = bootstrap.resample_sums(np.stack([f.confusion for f in score.frames.values()]), drawn)
    bands = bootstrap.resample_sums(np.stack([f.boundary for f in score.frames.values()]), drawn)
    iou = bootstrap.iou_by_class(confusion)
    frames = bootstrap.frames_with(np.stack([f.confusion for f in score.frames.values()]))

    def ends(distribution: np.ndarray, enough: bool = True) -> list[float | None]:
        found = bootstrap.interval(math.nan, distribution, enough)
        return [_number(found.low), _number(found.high)]

    return {
        "method": bootstrap.METHOD,
        "miou": ends(bootstrap.class_mean(iou)),
        "boundary_iou": ends(bootstrap.class_mean(boundary.boundary_iou(bands))),
        "pixel_accuracy": ends(bootstrap.accuracy(confusion)),
        "iou": {
            name: ends(iou[:, i], frames[i] >= bootstrap.MIN_FRAMES)
            for i, name in enumerate(score.matrix.classes.names)
        },
    }


def write_json(report: Mapping[str, Any], path: Path) -> None:
    """Strict JSON (no NaN), keys in the report's order; what is long and not for reading takes a line each.

    Raises ResultError where it cannot be written.
    """
    lines = []
    for key, value in report.items():
        indent = None if key in ("per_frame", "confusion", "curves") else 2
        lines.append(f"{json.dumps(key)}: {json.dumps(value, indent=indent, allow_nan=False)}")
    files.write_text(path, "{\n" + textwrap.indent(",\n".join(lines), "  ") + "\n}\n")


def hardware() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {"cpu": _cpu_name(), "cores": len(os.sched_getaffinity(0)), "machine": platform.machine(), "gpu": _gpu()}


def versions() -> dict[str, str | None]:
    """Versions of what the numbers depend on; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def show(report: Mapping[str, Any], console: Console) -> None:
    """Prints the report as tables and, below, what a reader could mistake."""
    console.print(Group(_summary(report), _timing(report)))
    if report["iou"] is not None:
        console.print(_classes(report))
    for line in remarks(report):
        console.print(f"[yellow]note:[/] {_text(line)}", highlight=False)


def remarks(report: Mapping[str, Any]) -> list[str]:
    """What the numbers do not cover, in sentences."""
    lines: list[str] = []
    frames = report["frames"]
    if report["iou"] is None:
        lines.append("the bag has no ground truth, so no mIoU; only latency, density and counts are measured")
    elif not any(report[name] for name in ("frames_labelled", "labels_without_image", "labels_of_other_size")):
        lines.append("the bag's ground-truth topic holds no message, so there is no mIoU")
    elif report["frames_scored"] < report["frames_labelled"]:
        lines.append(
            f"mIoU covers {report['frames_scored']} of {report['frames_labelled']} labelled frames: the others got no "
            "mask (--wait sends each frame only after the mask of the one before)"
        )
    if count := report["labels_without_image"]:
        lines.append(
            f"{count} labels are left out: no image has their stamp; a label must bear the header.stamp of its image"
        )
    if count := report["labels_of_other_size"]:
        lines.append(f"{count} labels are left out: they are of another size than their images")
    if report["absent_classes"] and report["frames_scored"]:
        lines.append(f"left out of mIoU, neither labelled nor predicted: {', '.join(report['absent_classes'])}")
    if frames["processed"] == 0 and frames["sent"]:
        lines.append("not one mask came back")
    received = frames["received"]
    if received is None:
        lines.append("the node published no counters on /diagnostics, so `received` is unknown")
    elif received < frames["sent"]:
        lines.append(
            f"{frames['sent'] - received} of {frames['sent']} frames never reached the node: lost in transport "
            "(is the Fast DDS profile loaded on both sides?) or replaced by newer ones before it took them"
        )
    for counter, what in (("malformed", "could not be decoded"), ("failed", "failed in the segmenter")):
        if count := (report["node_counters"] or {}).get(counter, 0):
            lines.append(f"{count} frames {what}; the log says why")
    if unrefined := (report["node_counters"] or {}).get("unrefined", 0):
        lines.append(f"{unrefined} masks were not refined for lack of memory")
    if report["lag_ms"] > LAG_MS:
        lines.append(f"the replay fell up to {report['lag_ms']:.0f} ms behind the recording's timing: machine too busy")
    if report["timeouts"]:
        lines.append(f"{report['timeouts']} frames got no mask in time; --answer-timeout sets how long to wait")
    return lines


def _summary(report: Mapping[str, Any]) -> Table:
    title = _text(f"{report['model']} on {report['bag']['name']} ({report['mode']})")
    table = Table(title=title, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    frames = report["frames"]
    if report["iou"] is not None:
        interval = report["intervals"]
        ends = "" if interval is None else f" ({' to '.join(_percent(v) for v in interval['miou'])})"
        table.add_row("mIoU", f"{_percent(report['miou'])}{ends} over {report['frames_scored']} frames")
        table.add_row("boundary IoU", _percent(report["boundary_iou"]))
    table.add_row("density", f"{_percent(report['density'])} of the pixels selected")
    table.add_row("entropy threshold", f"{_milli(report['entropy_threshold'], 3)} nats")
    table.add_row("frames", ", ".join(f"{_count(v)} {k}" for k, v in frames.items()))
    if report["output_hz"] is not None:
        table.add_row("masks", f"{report['output_hz']:.2f} Hz, jitter {report['jitter_ms']:.1f} ms")
    table.add_row("bag", f"{report['bag']['duration_s']:.1f} s, sha256 {report['bag']['sha256'][:12]}")
    table.add_row("hardware", f"{report['hardware']['cpu']}, {report['hardware']['cores']} cores")
    return table


def _timing(report: Mapping[str, Any]) -> Table:
    table = Table(title="milliseconds")
    columns = (*replay_metrics.PERCENTILES, "max")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    what = "frame to mask" if report["mode"] == "live" else "segmenter call"
    table.add_row(f"[bold]{what}[/]", *(_milli(report["latency_ms"][c]) for c in columns))
    for stage, values in report["stages_ms"].items():
        table.add_row(_text(stage), *(_milli(values[c]) for c in columns))
    return table


def _classes(report: Mapping[str, Any]) -> Table:
    table = Table(title="IoU by class, %")
    table.add_column("class")
    table.add_column("IoU", justify="right")
    for name, value in report["iou"].items():
        table.add_row(_text(name), "-" if value is None else f"{100 * value:.2f}")
    return table


def _text(name: str) -> str:
    """A name of somebody else's, neither markup nor an order to the terminal."""
    return escape(printable(name))


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _milli(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _count(value: int | None) -> str:
    return "?" if value is None else str(value)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _gpu() -> str | None:
    try:
        import torch
    except ImportError:
        return None
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
