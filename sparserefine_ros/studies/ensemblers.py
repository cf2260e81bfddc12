"""Table 5e: how the initial and the refined prediction become one."""

from __future__ import annotations

from typing import Any

from sparserefine_ros.studies.report import Report, Setting
from sparserefine_ros.studies.trainings import base_args, trained_report
from sparserefine_ros.studies.variants import Variant


def variants(base: dict[str, Any]) -> list[Variant]:
    """Each trained with its ensembler; the gated one twice, from two seeds, to tell gains from noise."""
    rows = {
        "direct: refined in place of initial": "direct", "entropy: the one of lower entropy": "entropy",
        "residual: sum, as the mean but for training": "residual", "gated (paper, Eq. 1)": "gated",
    }  # fmt: skip
    return [
        *(Variant(label, {**base, "ensembler": name}) for label, name in rows.items()),
        Variant("gated, another seed", base, seed=1),
    ]


def study(setting: Setting) -> Report:
    note = "The two gated rows differ in nothing but the seed: differences as small as theirs mean nothing."
    return trained_report("ensemblers", "Ensembler (Table 5e)", variants(base_args(setting.bundle)), setting, note)
