"""Training curves from the log that a run leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparserefine_ros.evaluation import files


def draw_curves(log: Path, file: Path) -> None:
    """Draws loss and validation figures of ``log`` (one JSON object an epoch) into ``file`` (PNG)."""
    from matplotlib.figure import Figure  # imported late: slow, and only drawing needs it

    entries: list[dict[str, Any]] = [json.loads(line) for line in log.read_text().splitlines()]
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([e["epoch"] for e in entries], [e["loss"] for e in entries], color="#1f77b4")
    left.set(xlabel="epoch", ylabel="training loss", yscale="log")
    for name in sorted({key for e in entries for key in e if key.startswith(("miou", "agreement"))}):
        points = [(e["epoch"], 100 * e[name]) for e in entries if name in e]
        right.plot(*zip(*points, strict=True), marker=".", label=name)
    right.set(xlabel="epoch", ylabel="validation, %")
    right.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.suptitle(log.stem)
    files.write_figure(file, figure)
