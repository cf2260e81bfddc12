"""What a study leaves behind: a table with how it was made, the same as data, a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sparserefine_ros.datasets.base import Sample
from sparserefine_ros.datasets.splits import load_split
from sparserefine_ros.evaluation import files
from sparserefine_ros.evaluation.compare import save_json
from sparserefine_ros.segmenter.bundle import Bundle


@dataclass
class Setting:
    """What a study runs on."""

    bundle: Bundle
    val: Sequence[Sample]  # labelled frames
    data: Path | None  # folder of the data set, where it needs one
    runs: Path  # where trainings are kept
    device: torch.device
    epochs: int  # of each training
    command: str  # that runs it again

    @cached_property
    def train(self) -> list[Sample]:
        """Frames to train refiners on; read when the first study asks for them."""
        return load_split(self.bundle.provenance.get("dataset", {}), "refiner", self.data)[1]


@dataclass(frozen=True)
class Report:
    """The outcome of one study."""

    name: str  # of its files
    title: str
    header: tuple[str, ...]
    cells: Sequence[tuple[str, ...]]  # one line a row
    note: str  # how it was measured, for who reads the table
    data: dict[str, Any]  # plain data, unrounded
    draw: Callable[[Any], None]  # on a matplotlib figure


def write(report: Report, setting: Setting, out: Path) -> Path:
    """Writes NAME.md, NAME.json and NAME.png into ``out``; returns the first."""
    from matplotlib.figure import Figure  # imported late: slow, and only drawing needs it

    height, width = setting.val[0].image.shape[:2]
    facts = {
        "study": report.name, "command": setting.command, "bundle": setting.bundle.name, "frames": len(setting.val),
        "size": [height, width], "threshold": setting.bundle.entropy_threshold, "device": str(setting.device),
        "threads": torch.get_num_threads(), "torch": str(torch.__version__),
    }  # fmt: skip
    save_json({**facts, **report.data}, out / f"{report.name}.json")
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    report.draw(figure)
    figure.suptitle(f"{setting.bundle.name}: {report.title}")
    files.write_figure(out / f"{report.name}.png", figure)
    lines = [
        f"# {report.title}", "", f"    {setting.command}", "",
        f"Bundle {setting.bundle.name}, {len(setting.val)} validation frames of {width}x{height}, threshold "
        f"{setting.bundle.entropy_threshold:.4f} nats, {setting.device}, {torch.get_num_threads()} threads, fp32, "
        f"torch {torch.__version__}.", "",
        *table(report.header, report.cells), "", report.note, "", f"![{report.title}]({report.name}.png)",
    ]  # fmt: skip
    file = out / f"{report.name}.md"
    files.write_text(file, "\n".join(lines) + "\n")
    return file


def table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    rows = [header, ["---"] * len(header), *cells]
    return ["| " + " | ".join(row) + " |" for row in rows]


def percent(value: float, digits: int = 1) -> str:
    """A fraction as a table shows it; a dash for nan."""
    return f"{100 * value:.{digits}f}" if value == value else "–"


def bar_gains(axis: Any, gains: Mapping[str, float], miou_lr: float) -> None:
    """Horizontal bars of ``gains`` in mIoU over LR dense, fractions, the first on top."""
    points = [100 * gain for gain in gains.values()]
    bars = axis.barh(range(len(points)), points, color=["#2ca02c" if p >= 0 else "#d62728" for p in points])
    axis.bar_label(bars, [f"{p:+.2f}" for p in points], padding=3, fontsize=8)
    axis.set_yticks(range(len(points)), list(gains))
    axis.invert_yaxis()
    axis.axvline(0, color="black", linewidth=0.8)
    axis.margins(x=0.15)
    axis.grid(alpha=0.3, axis="x")
    axis.set(xlabel=f"gain over LR dense ({100 * miou_lr:.2f} mIoU), points")
