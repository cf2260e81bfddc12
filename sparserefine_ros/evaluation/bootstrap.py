"""Confidence intervals by the bootstrap over blocks of frames (Kuensch, 1989): percentile intervals, paired where two
runs saw the same frames.

Frames of one drive resemble their neighbours; drawn one by one they would seem to say more than they do. So a resample
draws blocks of F^(1/3) neighbours (Hall et al., 1995), with replacement and around the end, until it has as many frames
as there are; a metric of pixel counts is then computed from the summed counts, as it is over the whole drive. In a
paired comparison both runs get the same frames of every resample, so that what makes a frame hard for both does not
widen the interval.

The interval tells what other frames *of this drive* would have given, and is narrower than that of another drive; where
frames resemble others further away than a block, it is still too narrow.

Shape shorthand: F frames, R resamples, K classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95
SEED = 0
CHUNK = 100  # resamples at a time: bounds the memory
MIN_FRAMES = 10
"""Fewer frames, or fewer in which a class occurs, give no interval: their resamples repeat each other."""
BEYOND = 5
"""As many frames must be expected beyond a quantile for its interval."""

METHOD = (
    f"{100 * CONFIDENCE:.0f} % percentile intervals of {RESAMPLES} bootstrap resamples over blocks of neighbouring "
    f"frames, seed {SEED}"
)


@dataclass(frozen=True)
class Interval:
    """A value and the interval that holds ``CONFIDENCE`` of its bootstrap distribution; nan where it has none."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the sign is settled at this confidence."""
        return self.low > 0 or self.high < 0


def weights(frames: int, resamples: int = RESAMPLES, seed: int = SEED) -> np.ndarray:
    """[R, F] uint16: how often each frame is drawn in each resample; every row sums to F. R = 0 below `MIN_FRAMES`."""
    drawn = np.empty((resamples if frames >= MIN_FRAMES else 0, frames), np.uint16)
    rng, block = np.random.default_rng(seed), max(1, round(frames ** (1 / 3)))
    for i in range(0, len(drawn), CHUNK):
        chunk = drawn[i : i + CHUNK]
        starts = rng.integers(frames, size=(len(chunk), -(-frames // block), 1))
        at = ((starts + np.arange(block)) % frames).reshape(len(chunk), -1)[:, :frames]
        rows = np.arange(len(chunk))[:, None] * frames
        chunk[:] = np.bincount((rows + at).ravel(), minlength=chunk.size).reshape(chunk.shape)
    return drawn


def resample_sums(counts: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """[R, ...]: ``counts`` [F, ...] summed over each resample's frames; ``drawn`` [R, F]."""
    flat = counts.reshape(len(counts), -1).astype(np.float64)
    sums = np.empty((len(drawn), flat.shape[1]))
    for i in range(0, len(drawn), CHUNK):
        sums[i : i + CHUNK] = drawn[i : i + CHUNK].astype(np.float64) @ flat
    return sums.reshape(len(drawn), *counts.shape[1:])


def interval(value: float, distribution: np.ndarray, enough: bool = True) -> Interval:
    """The percentile interval of ``distribution`` [R] around ``value``; nan entries are left out. None where there were
    not ``enough`` frames for one."""
    known = distribution[np.isfinite(distribution)]
    if not known.size or not enough:
        return Interval(value, float("nan"), float("nan"))
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(known, [tail, 100 - tail])
    return Interval(value, float(low), float(high))


def frames_with(counts: np.ndarray) -> np.ndarray:
    """[K]: in how many frames each class occurs, in label or mask; from confusion matrices ``counts`` [F, K, K + 1]."""
    result: np.ndarray = ((counts.sum(-1) + counts[..., :-1].sum(-2)) > 0).sum(0)
    return result


def resampled_quantiles(values: np.ndarray, drawn: np.ndarray, q: float) -> np.ndarray:
    """[R]: the q-quantile (0 to 1; linear between the closest ranks, as the value itself) of ``values`` [F] in each
    resample ``drawn``.
    """
    order = np.argsort(values)
    ordered = np.asarray(values, np.float64)[order]
    rank = q * (len(values) - 1)
    result = np.empty(len(drawn))
    for i in range(0, len(drawn), CHUNK):
        up_to = drawn[i : i + CHUNK, order].cumsum(1, dtype=np.int64)
        low, high = (ordered[(up_to > at).argmax(1)] for at in (math.floor(rank), math.ceil(rank)))
        result[i : i + CHUNK] = low + (high - low) * (rank - math.floor(rank))
    return result


def iou_by_class(counts: np.ndarray) -> np.ndarray:
    """[..., K] from confusion matrices [..., K, K + 1]; nan for a class that does not occur (`ConfusionMatrix.iou`)."""
    hits = np.diagonal(counts, axis1=-2, axis2=-1).astype(np.float64)
    union = counts.sum(-1) + counts[..., :-1].sum(-2) - hits
    return np.divide(hits, union, out=np.full(hits.shape, np.nan), where=union > 0)


def class_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis without nan; nan where all are."""
    known = np.isfinite(values)
    total, count = np.where(known, values, 0.0).sum(-1), known.sum(-1)
    result: np.ndarray = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return result


def accuracy(counts: np.ndarray) -> np.ndarray:
    """[...]: share of labelled pixels whose class is right, from confusion matrices [..., K, K + 1]."""
    total = counts.sum((-2, -1)).astype(np.float64)
    hits = np.diagonal(counts, axis1=-2, axis2=-1).sum(-1).astype(np.float64)
    result: np.ndarray = np.divide(hits, total, out=np.full(total.shape, np.nan), where=total > 0)
    return result
