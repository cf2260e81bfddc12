"""The charts of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparserefine_ros.evaluation.per_frame import numbers
from sparserefine_ros.evaluation.svg import Chart

COLUMNS = 500  # a longer drive is drawn as that many columns, each the slowest of its frames
HISTOGRAM_BINS = 40
SUMS = ("segment", "total", "latency")
"""Stages that others make up: stacked upon them, they would count the same time again."""
COLOURS = 10
"""Colours of stages in the style sheet."""


def reliability_chart(data: Mapping[str, Any]) -> str:
    """Accuracy over confidence; the diagonal is a network that is as sure as it is right."""
    chart = Chart("reliability diagram", (0, 100), (0, 100), "confidence, %", "accuracy, %")
    pixels = np.array(data["pixels"], np.float64)
    share = pixels / pixels.sum()
    edges = np.linspace(0, 100, len(pixels) + 1)
    boxes = [(edges[i] + 0.4, edges[i + 1] - 0.4, 0.0, 100 * share[i]) for i in range(len(share)) if share[i]]
    chart.bars(boxes, "share")
    chart.line([0, 100], [0, 100], "ideal")
    known = [(100 * c, 100 * a, s) for c, a, s in zip(data["confidence"], data["accuracy"], share, strict=True)
             if c is not None]  # fmt: skip
    chart.line([c for c, _, _ in known], [a for _, a, _ in known], "curve")
    for confidence, accuracy, part in known:
        note = f"confidence {confidence:.1f} %, accuracy {accuracy:.1f} %, {100 * part:.2f} % of the pixels"
        chart.point(confidence, accuracy, "dot", note)
    return chart.text()


def density_recall_chart(curves: Mapping[str, Any]) -> str:
    """Share of the errors that are selected, over the share of the pixels that are; the dot is the threshold in use."""
    data, here = curves["density_recall"], curves["at_threshold"]
    density, recall = ([100 * v for v in data[name]] for name in ("density", "recall"))
    chart = Chart(
        "density and recall of the selector", (0, 100), (0, 100), "density, % of pixels", "recall, % of errors"
    )
    chart.line([0, 100], [0, 100], "ideal")
    chart.line(density, recall, "curve")
    note = ", ".join(f"{name} {100 * here[name]:.1f} %" for name in ("density", "recall", "precision"))
    chart.point(100 * here["density"], 100 * here["recall"], "dot here", note, radius=6)
    return chart.text()


def latency_charts(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """``timeline`` and ``histogram``, ``stages`` (names in the timeline's order), ``frames_a_column``; None: no mask.

    The timeline stacks the stages that the node timed, without their sums; the line is the latency from sending a frame
    to having its mask.
    """
    frames = result["per_frame"]
    latency, sent = numbers(frames["latency_ms"]), numbers(frames["sent_s"])
    if not np.isfinite(latency).any():
        return None
    stages = {name: numbers(column) for name, column in frames["stages_ms"].items() if name not in SUMS}
    groups = np.array_split(np.arange(len(sent)), min(COLUMNS, len(sent)))
    slowest = [_slowest(latency, group) for group in groups]
    starts = [float(sent[group[0]]) for group in groups]
    ends = [*starts[1:], starts[-1] + (starts[-1] - starts[0]) / max(1, len(starts) - 1)]
    if ends[-1] <= starts[-1]:  # a single frame
        ends[-1] = starts[-1] + 1
    top = max(float(np.nanmax(latency)), max((sum(_at(s, i) for s in stages.values()) for i in slowest), default=0.0))
    chart = Chart(
        "latency of every frame", (0, ends[-1]), (0, 1.05 * top), "seconds since the first frame", "ms", (1000, 300)
    )
    base = np.zeros(len(groups))
    gap = 0.12 if len(groups) <= 200 else 0.0
    for index, times in enumerate(stages.values()):
        heights = np.array([_at(times, i) for i in slowest])
        boxes = [
            (start, end - gap * (end - start), float(low), float(low + height))
            for start, end, low, height in zip(starts, ends, base, heights, strict=True)
            if height
        ]
        chart.bars(boxes, f"stage stage-{index % COLOURS}")
        base += heights
    values = [float(latency[i]) if np.isfinite(latency[i]) else None for i in slowest]
    chart.line([(a + b) / 2 for a, b in zip(starts, ends, strict=True)], values, "curve")
    lost = [bool(np.isnan(latency[group]).any()) for group in groups]
    marks = [(a, b, 0.0, 0.03 * top) for a, b, gone in zip(starts, ends, lost, strict=True) if gone]
    chart.bars(marks, "lost")
    for start, end, i in zip(starts, ends, slowest, strict=True):
        chart.spot(start, end, _note(float(sent[i]), float(latency[i]), stages, i))
    return {
        "timeline": chart.text(),
        "histogram": _histogram(latency[np.isfinite(latency)], result["mode"] == "live"),
        "stages": list(stages),
        "frames_a_column": max(len(group) for group in groups),
        "lost": any(lost),
    }


def _histogram(values: np.ndarray, live: bool) -> str:
    counts, edges = np.histogram(values, bins=HISTOGRAM_BINS, range=(0, float(values.max()) * 1.02))
    chart = Chart(
        "histogram of latencies",
        (0, float(edges[-1])),
        (0, float(counts.max()) * 1.05),
        "ms from frame to mask" if live else "ms of a segmenter call",
        "frames",
    )
    chart.bars([(a, b, 0.0, float(n)) for a, b, n in zip(edges, edges[1:], counts, strict=False) if n], "bar")
    for name, q in (("p50", 50), ("p95", 95), ("p99", 99)):
        x = float(np.percentile(values, q))
        chart.line([x, x], [0, float(counts.max()) * 1.05], f"mark {name}")
        chart.point(x, float(counts.max()) * 1.05, "mark-dot", f"{name}: {x:.1f} ms", radius=3)
    return chart.text()


def _slowest(latency: np.ndarray, group: np.ndarray) -> int:
    known = group[np.isfinite(latency[group])]
    return int(known[latency[known].argmax()]) if len(known) else int(group[0])


def _at(times: np.ndarray, index: int) -> float:
    return float(times[index]) if np.isfinite(times[index]) else 0.0


def _note(sent: float, latency: float, stages: Mapping[str, np.ndarray], index: int) -> str:
    if np.isnan(latency):
        return f"{sent:.2f} s: no mask"
    parts = [f"{name} {_at(times, index):.1f}" for name, times in stages.items()]
    return f"{sent:.2f} s: {latency:.1f} ms" + (f" ({', '.join(parts)})" if parts else "")


def interval_chart(rows: Sequence[tuple[str, float, float, float]], label: str) -> str:
    """Rows of (name, value, low, high): dots with their intervals around zero, the first row on top."""
    reach = max((max(abs(low), abs(high), abs(value)) for _, value, low, high in rows), default=1.0) * 1.08
    size = (760, 60 + 24 * len(rows))
    chart = Chart(label, (-reach, reach), (0, len(rows)), label, "", size, names=[row[0] for row in rows][::-1])
    chart.line([0, 0], [0, len(rows)], "ideal")
    for i, (name, value, low, high) in enumerate(rows):
        y = len(rows) - i - 0.5
        style = "better" if low > 0 else "worse" if high < 0 else "open"
        chart.line([low, high], [y, y], f"range {style}")
        chart.point(value, y, f"dot {style}", f"{name}: {value:+.2f} ({low:+.2f} to {high:+.2f})")
    return chart.text()
