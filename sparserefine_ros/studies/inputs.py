"""Table 5c: what the refiner reads."""

from __future__ import annotations

from typing import Any

from sparserefine_ros.studies.report import Report, Setting
from sparserefine_ros.studies.trainings import base_args, trained_report
from sparserefine_ros.studies.variants import Variant


def variants(base: dict[str, Any]) -> list[Variant]:
    """Colours alone, with the initial softmax (``context``), with the dense segmenter's features."""
    return [
        Variant("RGB", base),
        Variant("RGB, logits", {**base, "context": True}),
        Variant("RGB, features", base, features=True),
    ]


def study(setting: Setting) -> Report:
    note = "Logits are given as their softmax, features as what the dense segmenter's classifier reads."
    return trained_report(
        "inputs", "Input of the refiner (Table 5c)", variants(base_args(setting.bundle)), setting, note
    )
