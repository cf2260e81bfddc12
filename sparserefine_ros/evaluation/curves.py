"""What only the segmenter itself can tell of a bag: how sure it is, where, and whether rightly.

The node publishes entropy and confidence, but to record them during a replay would load the transport whose latency is
being measured. The segmenter gives the same values again afterwards, on a few frames.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sparserefine_ros.datasets.base import UNLABELLED, Sample
from sparserefine_ros.evaluation.calibration import density_recall
from sparserefine_ros.evaluation.reliability import reliability_diagram
from sparserefine_ros.segmenter.segmenter import Segmenter

FRAMES = 24
PIXELS = 2**26
"""Of all these frames together: they are held in memory, 24 of a 2-megapixel camera, two of an 8K one."""
POINTS = 100  # of the density-recall curve, evenly spaced in recall


def measure(segmenter: Segmenter, samples: Sequence[Sample]) -> dict[str, Any] | None:
    """Reliability of the final prediction and density-recall of the initial one, as plain data.

    None where not a pixel of ``samples`` is labelled. ``at_threshold`` is the segmenter's threshold on the curve.
    """
    if not any(sample.label is not None and (sample.label != UNLABELLED).any() for sample in samples):
        return None
    diagram, curve = reliability_diagram(segmenter, samples), density_recall(segmenter, samples)
    wanted = np.linspace(0, 1, POINTS)
    last = len(curve.recall) - 1
    picked = np.unique(np.minimum([0, *np.searchsorted(-curve.recall, -wanted), last], last))  # recall falls
    return {
        "frames": sum(sample.label is not None for sample in samples),
        "reliability": {
            "ece": diagram.ece,
            "pixels": diagram.pixels.tolist(),
            "confidence": _plain(diagram.confidence),
            "accuracy": _plain(diagram.accuracy),
        },
        "density_recall": {
            name: _plain(getattr(curve, name)[picked]) for name in ("thresholds", "density", "recall", "precision")
        },
        "at_threshold": curve.at(segmenter.entropy_threshold),
    }


def _plain(values: np.ndarray) -> list[float | None]:
    return [round(v, 6) if math.isfinite(v) else None for v in values.tolist()]
