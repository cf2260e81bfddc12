"""Two evaluations of one bag, frame by frame: what differs, and whether by more than chance.

Method: `bootstrap`, paired by header stamp. Accuracy is taken over the frames that were scored in both runs, latency
and density over those that both answered or timed. Latency is of these two runs: what else the machine did at the time
is in all frames of a run alike, and no resampling of frames can tell it from the change that is looked for.

Shape shorthand: F frames in both runs, R resamples, K classes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparserefine_ros.errors import ResultError
from sparserefine_ros.evaluation import bootstrap
from sparserefine_ros.evaluation.boundary import boundary_iou
from sparserefine_ros.evaluation.per_frame import numbers, unpack

LATENCIES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
SETTINGS = (
    "model", "mode", "rate", "bag", "commit", "hardware", "versions", "weights_sha256", "parameters", "decoder",
    "entropy_threshold", "scale", "device", "precision", "sparse_backend", "runtime", "threads",
)  # fmt: skip
"""What may explain a difference: where these differ, the comparison says so."""


@dataclass(frozen=True)
class Row:
    """One metric of both runs. ``unit`` is "%" for fractions, else "ms"; the interval is that of ``b - a``."""

    name: str
    unit: str
    a: float
    b: float
    difference: bootstrap.Interval
    higher_is_better: bool | None = True  # None: neither, or nothing that the difference could be put down to

    @property
    def verdict(self) -> str:
        """better, worse or, of what may be either, changed: the interval excludes zero; open: no such interval."""
        if not self.difference.excludes_zero:
            return "open"
        if self.higher_is_better is None:
            return "changed"
        return "better" if (self.difference.low > 0) == self.higher_is_better else "worse"


@dataclass(frozen=True)
class Comparison:
    """Run ``b`` against run ``a``."""

    a: Mapping[str, Any]
    b: Mapping[str, Any]
    rows: list[Row]  # over all classes
    classes: list[Row]  # IoU by class
    scored: int  # frames behind accuracy
    answered: int  # frames behind latency
    settings: list[tuple[str, Any, Any]]  # what differs: name, in a, in b


def load(path: Path) -> dict[str, Any]:
    """The result that `sparserefine evaluate --json` wrote. Raises ResultError for anything else."""
    try:
        result = json.loads(path.read_text("utf-8"), parse_constant=_no_number)
    except (OSError, ValueError, RecursionError) as error:
        raise ResultError(f"cannot read {path} as a result: {error}; give the file of evaluate's --json") from error
    wanted = {"per_frame": dict, "classes": dict, "bag": dict, "model": str, "mode": str}
    for key, kind in wanted.items():
        if not isinstance(result, dict) or not isinstance(result.get(key), kind):
            raise ResultError(f"{path} has no {key!r}: it is no result of this version's evaluate; evaluate again")
    return result


def _no_number(name: str) -> None:
    raise ValueError(f"it holds {name}, which evaluate does not write")


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> Comparison:
    """Raises ResultError where the runs are of different bags or classes, have no frame in common, or are damaged."""
    try:
        _check_comparable(a, b)
        rows, classes, scored = _accuracy(a, b)
        timing, answered = _timing(a, b)
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ResultError(f"a result file is damaged ({reason}); write both again with evaluate --json") from error
    if not scored and not answered:
        raise ResultError("the runs have no frame in common that both scored or answered; nothing can be compared")
    return Comparison(a, b, rows + timing, classes, scored, answered, _differing_settings(a, b))


def as_data(comparison: Comparison) -> dict[str, Any]:
    """For --json: rows with a, b, difference, its interval and the verdict."""

    def row(r: Row) -> dict[str, Any]:
        values = {
            "a": r.a,
            "b": r.b,
            "difference": r.difference.value,
            "low": r.difference.low,
            "high": r.difference.high,
        }
        known = {name: v if math.isfinite(v) else None for name, v in values.items()}
        return {"name": r.name, "unit": r.unit, **known, "verdict": r.verdict}

    return {
        "method": bootstrap.METHOD + ", paired by stamp",
        "frames_scored": comparison.scored,
        "frames_answered": comparison.answered,
        "rows": [row(r) for r in comparison.rows],
        "classes": [row(r) for r in comparison.classes],
        "settings": [{"name": name, "a": a, "b": b} for name, a, b in comparison.settings],
    }


def _check_comparable(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    if a["bag"]["sha256"] != b["bag"]["sha256"]:
        raise ResultError(
            f"the runs are of different bags ({a['bag']['name']}, sha256 {a['bag']['sha256'][:12]}, and "
            f"{b['bag']['name']}, {b['bag']['sha256'][:12]}); frames can be paired within one bag only"
        )
    if not all(isinstance(name, str) for run in (a, b) for name in run["classes"]["names"]):
        raise TypeError("classes whose names are no text")
    if a["classes"]["names"] != b["classes"]["names"]:
        raise ResultError(f"the runs have different classes: {a['classes']['names']} and {b['classes']['names']}")


def _common(a: Sequence[int], b: Sequence[int]) -> tuple[list[int], list[int]]:
    """Places in ``a`` and in ``b`` of the stamps in both, in the order of ``a``."""
    place = {stamp: i for i, stamp in enumerate(b)}
    pairs = [(i, place[stamp]) for i, stamp in enumerate(a) if stamp in place]
    return [i for i, _ in pairs], [j for _, j in pairs]


def _accuracy(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[list[Row], list[Row], int]:
    frames_a, frames_b = a["per_frame"], b["per_frame"]
    in_a, in_b = _common(frames_a["scored"], frames_b["scored"])
    if not in_a:
        return [], [], 0
    drawn = bootstrap.weights(len(in_a))
    confusion = [unpack(f["confusion"])[i] for f, i in ((frames_a, in_a), (frames_b, in_b))]  # [F, K, K + 1]
    bands = [unpack(f["boundary"])[i] for f, i in ((frames_a, in_a), (frames_b, in_b))]  # [F, K, 3]
    iou = [_both(c, drawn, bootstrap.iou_by_class) for c in confusion]
    boundary = [_both(c, drawn, boundary_iou) for c in bands]
    right = [_both(c, drawn, bootstrap.accuracy) for c in confusion]

    def mean(pair: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return bootstrap.class_mean(pair[0]), bootstrap.class_mean(pair[1])

    rows = [
        _row("mIoU", "%", mean(iou[0]), mean(iou[1])),
        _row("boundary IoU", "%", mean(boundary[0]), mean(boundary[1])),
        _row("right pixels", "%", right[0], right[1]),
    ]
    frames = bootstrap.frames_with(confusion[0] + confusion[1])
    classes = [
        _row(
            name,
            "%",
            (iou[0][0][k], iou[0][1][:, k]),
            (iou[1][0][k], iou[1][1][:, k]),
            enough=frames[k] >= bootstrap.MIN_FRAMES,
        )
        for k, name in enumerate(a["classes"]["names"])
    ]
    return rows, classes, len(in_a)


def _both(
    counts: np.ndarray, drawn: np.ndarray, metric: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The metric over all frames of ``counts`` [F, ...], and [R, ...] over each resample."""
    return metric(counts.sum(0)), metric(bootstrap.resample_sums(counts, drawn))


def _timing(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[list[Row], int]:
    frames_a, frames_b = a["per_frame"], b["per_frame"]
    in_a, in_b = _common(frames_a["stamps"], frames_b["stamps"])
    rows: list[Row] = []
    density = numbers(frames_a["density"])[in_a], numbers(frames_b["density"])[in_b]
    known = np.isfinite(density[0]) & np.isfinite(density[1])
    if known.any():
        drawn = bootstrap.weights(int(known.sum()))
        means = [(d[known].mean(), bootstrap.resample_sums(d[known], drawn) / known.sum()) for d in density]
        rows.append(_row("refined pixels", "%", means[0], means[1], higher_is_better=None))
    latency = numbers(frames_a["latency_ms"])[in_a], numbers(frames_b["latency_ms"])[in_b]
    known = np.isfinite(latency[0]) & np.isfinite(latency[1])
    if known.any():
        drawn = bootstrap.weights(int(known.sum()))
        for name, q in LATENCIES.items():
            ends = [
                (np.percentile(v[known], 100 * q), bootstrap.resampled_quantiles(v[known], drawn, q)) for v in latency
            ]
            enough = known.sum() * (1 - q) >= bootstrap.BEYOND * (1 - 1e-9)
            rows.append(_row(f"latency {name}", "ms", ends[0], ends[1], higher_is_better=None, enough=bool(enough)))
    return rows, int(known.sum())


def _row(
    name: str,
    unit: str,
    a: tuple[np.ndarray, np.ndarray],
    b: tuple[np.ndarray, np.ndarray],
    higher_is_better: bool | None = True,
    enough: bool = True,
) -> Row:
    difference = bootstrap.interval(float(b[0] - a[0]), b[1] - a[1], enough)
    return Row(name, unit, float(a[0]), float(b[0]), difference, higher_is_better)


def _differing_settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    rows = []
    for key in SETTINGS:
        left, right = a.get(key), b.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            names = list(dict.fromkeys([*left, *right]))
            rows += [(f"{key}: {n}", left.get(n), right.get(n)) for n in names if left.get(n) != right.get(n)]
        elif left != right:
            rows.append((key, left, right))
    return rows
