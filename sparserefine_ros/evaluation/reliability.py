"""Whether a network is as sure as it is right: temperature scaling and expected calibration error.

Softmax entropy means the same in two bundles only if both are calibrated: a decoder that ends in a normalisation may
never be sure, one trained for long is always. Dividing logits by one number fitted on labelled frames (Guo et al.,
2017) mends most of it and changes no prediction.

Shape shorthand: P sampled pixels, K classes, h, w low resolution.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sparserefine_ros.datasets.base import UNLABELLED, Sample
from sparserefine_ros.segmenter.preprocess import normalise, resize
from sparserefine_ros.segmenter.segmenter import Segmenter

PIXELS = 10_000  # sampled a frame
LIMIT = 20.0  # temperatures from 1 / LIMIT to LIMIT
BINS = 15


@torch.inference_mode()
def sample_logits(segmenter: Segmenter, samples: Iterable[Sample], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits [P, K] of the initial prediction at random labelled pixels, and their labels [P].

    Labels are read at low resolution, nearest. Raises ValueError when no sample has a label.
    """
    rng = np.random.default_rng(seed)
    logits, labels = [], []
    for sample in samples:
        if sample.label is None:
            continue
        size = segmenter.low_size(sample.label.shape)
        low = torch.from_numpy(resize(sample.image, size))[None].to(segmenter.device)
        scores = segmenter.dense(normalise(low))[0].float().flatten(1).T.cpu()  # [h w, K]
        rows = (np.arange(size[0]) + 0.5) * sample.label.shape[0] / size[0]
        columns = (np.arange(size[1]) + 0.5) * sample.label.shape[1] / size[1]
        label = sample.label[np.ix_(rows.astype(int), columns.astype(int))].ravel()
        known = np.nonzero(label != UNLABELLED)[0]
        chosen = torch.from_numpy(rng.choice(known, min(PIXELS, len(known)), replace=False))
        logits.append(scores[chosen])
        labels.append(torch.from_numpy(label)[chosen].long())
    if not sum(map(len, labels)):
        raise ValueError("no labelled pixel to calibrate on; give frames with labels")
    return torch.cat(logits), torch.cat(labels)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T that minimises the cross-entropy of ``logits`` / T [P, K].

    It is convex in b = 1 / T with derivative mean(expected logit - logit of the label), whose zero is bisected.
    """
    logits = logits.double()
    of_label = logits.gather(1, labels[:, None]).mean()
    low, high = 1 / LIMIT, LIMIT
    for _ in range(40):
        b = (low * high) ** 0.5
        slope = ((logits * b).softmax(1) * logits).sum(1).mean() - of_label
        low, high = (b, high) if slope < 0 else (low, b)
    return float(1 / (low * high) ** 0.5)


def calibration_error(logits: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Expected calibration error: mean gap of confidence and accuracy, over bins of equal confidence width."""
    confidence, predicted = logits.double().softmax(1).max(1)
    index = (confidence * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, confidence - (predicted == labels).double())
    return float(gap.abs().sum() / len(labels))


def reliability(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Expected calibration error and negative log-likelihood, in nats."""
    return {
        "ece": round(calibration_error(logits, labels), 4),
        "nll": round(float(F.cross_entropy(logits, labels)), 4),
    }


@dataclass(frozen=True)
class ReliabilityDiagram:
    """Accuracy over confidence of the final prediction, in bins of equal width; nan in an empty bin."""

    pixels: np.ndarray  # [BINS] labelled pixels
    confidence: np.ndarray  # [BINS] mean, in [0, 1]
    accuracy: np.ndarray  # [BINS] share of them whose class is right

    @property
    def ece(self) -> float:
        """Expected calibration error: mean gap of confidence and accuracy over all pixels."""
        gap = np.nan_to_num(np.abs(self.confidence - self.accuracy))
        return float((gap * self.pixels).sum() / self.pixels.sum())


def reliability_diagram(segmenter: Segmenter, samples: Iterable[Sample]) -> ReliabilityDiagram:
    """Of the final prediction, refined where ``segmenter`` refines, over all labelled pixels of ``samples``.

    Confidence is as published: a byte, 255 for certainty. Raises ValueError when no sample has a label.
    """
    known, right = np.zeros(256, np.int64), np.zeros(256, np.int64)  # by confidence
    for sample in samples:
        if sample.label is None:
            continue
        final = segmenter.segment([sample.image])[0]
        labelled = sample.label != UNLABELLED
        known += np.bincount(final.confidence[labelled], minlength=256)
        right += np.bincount(final.confidence[labelled & (final.mask == sample.label)], minlength=256)
    if not known.sum():
        raise ValueError("no labelled pixel to measure reliability on; give frames with labels")
    level = np.arange(256) / 255
    index = np.minimum((level * BINS).astype(int), BINS - 1)

    def binned(values: np.ndarray) -> np.ndarray:
        return np.bincount(index, values, minlength=BINS)

    pixels = binned(known)
    empty = np.full(BINS, np.nan)
    return ReliabilityDiagram(
        pixels=pixels.astype(np.int64),
        confidence=np.divide(binned(known * level), pixels, out=empty.copy(), where=pixels > 0),
        accuracy=np.divide(binned(right), pixels, out=empty.copy(), where=pixels > 0),
    )
