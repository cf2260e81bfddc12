"""What a replay measured, from what it saw: pure logic, no ROS.

A replay is a set of stamps: each frame is known by its header stamp (ns), which the node copies onto everything it
publishes for that frame, so that masks, timings and ground truth are joined by it in whatever order they arrive.

Shape shorthand: H, W image height and width in pixels; K classes.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from sparserefine_ros.datasets.classes import ClassList
from sparserefine_ros.evaluation.bootstrap import class_mean
from sparserefine_ros.evaluation.boundary import boundary_counts, boundary_iou
from sparserefine_ros.evaluation.metrics import ConfusionMatrix

PERCENTILES = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0}


@dataclass
class ReplayLog:
    """Everything one replay saw. Times are seconds of this process's monotonic clock."""

    sent: dict[int, float] = field(default_factory=dict)  # stamp -> when it was published
    answered: dict[int, float] = field(default_factory=dict)  # stamp -> when its mask arrived
    stage_ms: dict[int, dict[str, float]] = field(default_factory=dict)  # stamp -> stage -> ms, by the node
    density: dict[int, float] = field(default_factory=dict)  # stamp -> selected pixels / all pixels
    counters: dict[str, int] | None = None  # the node's own counts, None where it told none
    timeouts: list[int] = field(default_factory=list)  # stamps that a lossless replay gave up waiting for
    lag_s: float = 0.0  # how far the replay fell behind the recording's timing at worst
    strangers: int = 0  # masks with a stamp that was never sent


class MaskStore(Protocol):
    """Masks by stamp; [H, W] uint8 class ids."""

    def get(self, stamp_ns: int) -> np.ndarray | None: ...


@dataclass(frozen=True)
class FrameCounts:
    """Pixels of one frame by class, to be summed over any set of frames."""

    confusion: np.ndarray  # [K, K + 1] as `ConfusionMatrix.counts`
    boundary: np.ndarray  # [K, 3] as `boundary.boundary_counts`


@dataclass(frozen=True)
class Score:
    """Accuracy over the frames that have both a mask and ground truth."""

    matrix: ConfusionMatrix
    labelled: int  # frames with ground truth
    frames: dict[int, FrameCounts]  # stamp -> counts, of those that have a mask
    without_image: int = 0  # labels with a stamp that no image has
    other_size: int = 0  # labels of another size than their masks

    @property
    def scored(self) -> int:
        """Frames with both."""
        return len(self.frames)

    @property
    def boundary_iou(self) -> dict[str, float]:
        """Boundary IoU by class name; nan for a class without a boundary in labels and masks."""
        names = self.matrix.classes.names
        total = sum((f.boundary for f in self.frames.values()), np.zeros((len(names), 3), np.int64))
        return dict(zip(names, boundary_iou(total).tolist(), strict=True))

    @property
    def mean_boundary_iou(self) -> float:
        """Mean over the classes that have a boundary; nan when none has."""
        return float(class_mean(np.array(list(self.boundary_iou.values()))))

    @property
    def absent(self) -> list[str]:
        """Classes found neither in the ground truth nor in the masks: they are left out of the mean."""
        return [name for name, value in self.matrix.iou().items() if math.isnan(value)]


def percentiles(values: Iterable[float]) -> dict[str, float | None]:
    """p50, p90, p95, p99 (linear interpolation between closest ranks, as numpy) and max; None each for no values."""
    data = np.asarray(list(values), dtype=np.float64)
    if data.size == 0:
        return {**dict.fromkeys(PERCENTILES), "max": None}
    result: dict[str, float | None] = {name: float(np.percentile(data, q)) for name, q in PERCENTILES.items()}
    result["max"] = float(data.max())
    return result


def latencies_ms(log: ReplayLog) -> list[float]:
    """Milliseconds from publishing a frame to receiving its mask, one for every answered frame, in sending order."""
    return [(log.answered[s] - sent) * 1e3 for s, sent in log.sent.items() if s in log.answered]


def stage_percentiles(log: ReplayLog) -> dict[str, dict[str, float | None]]:
    """Percentiles of every stage that the node timed, over the frames it timed."""
    stages: dict[str, list[float]] = {}
    for times in log.stage_ms.values():
        for stage, value in times.items():
            stages.setdefault(stage, []).append(value)
    return {stage: percentiles(values) for stage, values in stages.items()}


def mean_density(log: ReplayLog) -> float | None:
    """Mean over frames of selected pixels / all pixels; None where no frame told."""
    return float(np.mean(list(log.density.values()))) if log.density else None


def count_frames(log: ReplayLog) -> dict[str, int | None]:
    """How many frames were sent, received by the node, processed (a mask came back) and dropped (sent, no mask).

    ``received`` is the node's own count, None where it published none. ``dropped`` counts every loss: before the node,
    within it (a newer frame took the place), and of the mask on its way back.
    """
    processed = sum(1 for stamp in log.sent if stamp in log.answered)
    received = log.counters.get("received") if log.counters else None
    return {
        "sent": len(log.sent),
        "received": received,
        "processed": processed,
        "dropped": len(log.sent) - processed,
    }


def score(
    labels: Iterable[tuple[int, np.ndarray]],
    masks: MaskStore,
    classes: ClassList,
    images: Container[int] | None = None,
) -> Score:
    """One confusion matrix over all frames; masks and ground truth are joined by stamp. Frames without a mask, and
    labels of another size than theirs, are left out.

    ``labels``: (stamp in ns, [H, W] uint8, 255 = ignored); ``images``: the stamps of the images, all by default.
    """
    matrix = ConfusionMatrix(classes)
    labelled, without_image, other_size, frames = 0, 0, 0, {}
    for stamp, label in labels:
        if images is not None and stamp not in images:
            without_image += 1
            continue
        mask = masks.get(stamp)
        if mask is not None and mask.shape != label.shape:
            other_size += 1
            continue
        labelled += 1
        if mask is None:
            continue
        before = matrix.counts.copy()
        matrix.update(label, mask)
        counts = (matrix.counts - before).astype(np.int32)
        frames[stamp] = FrameCounts(counts, boundary_counts(label, mask, len(classes)).astype(np.int32))
    return Score(matrix, labelled, frames, without_image, other_size)


def evenly_spaced(stamps: Sequence[int], count: int) -> list[int]:
    """Up to ``count`` stamps from the first to the last, evenly spaced, without repeats."""
    if len(stamps) <= count:
        return list(stamps)
    return [stamps[i] for i in np.linspace(0, len(stamps) - 1, count).round().astype(int)]


def rates(log: ReplayLog) -> Mapping[str, float | None]:
    """Masks a second and their jitter: standard deviation, in ms, of the time between masks."""
    times = np.sort(np.asarray(list(log.answered.values())))
    if times.size < 3:
        return {"output_hz": None, "jitter_ms": None}
    gaps = np.diff(times)
    return {"output_hz": float(1.0 / gaps.mean()), "jitter_ms": float(gaps.std() * 1e3)}
