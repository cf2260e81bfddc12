"""Accuracy from one confusion matrix over a whole data set."""

from __future__ import annotations

import numpy as np

from sparserefine_ros.datasets.base import UNLABELLED
from sparserefine_ros.datasets.classes import ClassList


class ConfusionMatrix:
    """Counts pixels by (true class, predicted class); pixels labelled 255 are left out.

    A predicted 255 counts as a miss of the true class and as a false positive of none.
    """

    def __init__(self, classes: ClassList) -> None:
        self.classes = classes
        self.counts = np.zeros((len(classes), len(classes) + 1), np.int64)  # the last column: predicted unlabelled

    def update(self, label: np.ndarray, prediction: np.ndarray) -> None:
        """Adds one frame: ``label`` and ``prediction`` are [H, W] uint8 class ids.

        Raises ValueError when the shapes differ or an id is neither a class nor 255.
        """
        if label.shape != prediction.shape:
            raise ValueError(f"label {label.shape} and prediction {prediction.shape} differ in shape; resize one first")
        num_classes = len(self.classes)
        known = label != UNLABELLED
        true, guess = label[known].astype(np.int64), prediction[known].astype(np.int64)
        guess[guess == UNLABELLED] = num_classes
        for what, ids, limit in (("label", true, num_classes - 1), ("prediction", guess, num_classes)):
            if ids.size and ids.max() > limit:
                raise ValueError(
                    f"{what} holds class id {ids.max()}, but {self.classes.name!r} has {num_classes} classes"
                )
        pairs = np.bincount(true * (num_classes + 1) + guess, minlength=self.counts.size)
        self.counts += pairs.reshape(self.counts.shape)

    def iou(self) -> dict[str, float]:
        """Intersection over union by class name; nan for a class that was neither labelled nor predicted."""
        return dict(zip(self.classes.names, self._iou().tolist(), strict=True))

    def miou(self) -> float:
        """Mean over the classes that occur (labelled or predicted); nan when none does. A fraction, not per cent."""
        values = self._iou()
        return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")

    def _iou(self) -> np.ndarray:
        """[K]"""
        hits = np.diagonal(self.counts).astype(np.float64)
        union = self.counts.sum(1) + self.counts[:, :-1].sum(0) - hits
        return np.divide(hits, union, out=np.full(len(hits), np.nan), where=union > 0)

    def accuracy(self) -> float:
        """Share of labelled pixels whose class is right."""
        total = self.counts.sum()
        return float(np.diagonal(self.counts).sum() / total) if total else float("nan")
