"""Table 5d: how wide the refiner is, and whether it sees neighbours."""

from __future__ import annotations

from typing import Any

from sparserefine_ros.studies.report import Report, Setting
from sparserefine_ros.studies.trainings import base_args, trained_report
from sparserefine_ros.studies.variants import Variant


def variants(base: dict[str, Any]) -> list[Variant]:
    """Half, once and twice the widths of the bundle's refiner; a perceptron on every pixel by itself."""
    rows = []
    for name, factor in (("half", 0.5), ("the bundle's", 1), ("twice", 2)):
        widths = [max(1, round(width * factor)) for width in base["channels"]]
        rows.append(Variant(f"U-Net {', '.join(map(str, widths))} ({name})", {**base, "channels": widths}))
    return [*rows, Variant("PointNet: a perceptron, no neighbours", base, pointnet=True)]


def study(setting: Setting) -> Report:
    note = "PointNet is its shared perceptron on the colours of each pixel, without neighbours and without pooling."
    return trained_report(
        "channels", "Width of the refiner, and PointNet (Table 5d)", variants(base_args(setting.bundle)), setting, note
    )
