"""Table 8: what refinement changes, class by class."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from sparserefine_ros.evaluation.compare import HR, LR, REFINED, compare
from sparserefine_ros.studies.report import Report, Setting, percent


def study(setting: Setting) -> Report:
    result = compare(setting.bundle, setting.val, str(setting.device))["rows"]
    counts = np.zeros(256, np.int64)
    for sample in setting.val:
        assert sample.label is not None
        counts += np.bincount(sample.label.ravel(), minlength=256)
    names = setting.bundle.classes.names
    shares = counts[: len(names)] / counts[: len(names)].sum()
    rows = [
        {"class": name, "share": float(share), **{row: result[row]["iou"][name] for row in (LR, REFINED, HR)}}
        for name, share in zip(names, shares, strict=True)
    ]
    mean = {"class": "mean", "share": math.nan, **{row: result[row]["miou"] for row in (LR, REFINED, HR)}}
    cells = [
        (row["class"], percent(row["share"], 2), *(percent(row[key]) for key in (LR, REFINED, HR)), _gain(row))
        for row in [*rows, mean]
    ]
    note = "IoU in per cent; the gain is LR + SparseRefine minus LR dense, in points. Share: of all labelled pixels."
    return Report(
        "classes", "IoU by class (Table 8)", ("class", "share, %", LR, REFINED, HR, "gain"), cells, note,
        {"rows": [*rows, mean]}, lambda figure: _draw(figure, rows),
    )  # fmt: skip


def _gain(row: dict[str, Any]) -> str:
    gain = 100 * (row[REFINED] - row[LR])
    return f"{gain:+.1f}" if gain == gain else "–"


def _draw(figure: Any, rows: list[dict[str, Any]]) -> None:
    """Gains, rarest class first."""
    rows = sorted((row for row in rows if row[LR] == row[LR]), key=lambda row: row["share"])
    axis = figure.subplots()
    gains = [100 * (row[REFINED] - row[LR]) for row in rows]
    axis.bar(range(len(rows)), gains, color=["#2ca02c" if g >= 0 else "#d62728" for g in gains])
    labels = [f"{row['class']}\n{percent(row['share'], 2)} %" for row in rows]
    axis.set_xticks(range(len(rows)), labels, fontsize=7, rotation=45 if len(rows) > 12 else 0)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(ylabel="gain over LR dense, points of IoU", xlabel="class and its share of the pixels, rarest first")
    axis.grid(alpha=0.3, axis="y")
