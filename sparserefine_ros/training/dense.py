"""Training a dense segmenter: weighted cross-entropy on random views.

Shape shorthand: B batch, K classes, h, w crop.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparserefine_ros.datasets.base import UNLABELLED, Sample
from sparserefine_ros.datasets.classes import ClassList
from sparserefine_ros.errors import TrainingError
from sparserefine_ros.evaluation.metrics import ConfusionMatrix
from sparserefine_ros.segmenter.preprocess import low_resolution_size, normalise, resize
from sparserefine_ros.training.augment import random_view
from sparserefine_ros.training.recipe import StageRecipe


class DenseTask:
    """A dense network on frames held in memory."""

    def __init__(
        self,
        module: nn.Module,
        classes: ClassList,
        train: Sequence[Sample],
        val: Sequence[Sample],
        recipe: StageRecipe,
        scale: float,
        device: torch.device,
    ) -> None:
        self.module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.classes, self.train, self.val, self.recipe, self.scale = classes, train, val, recipe, scale
        self.samples = len(train)
        self.device = device
        self.weights = class_weights(train, len(classes), recipe.class_weight_power).to(device)

    def batch(self, rng: np.random.Generator) -> tuple[Tensor, ...]:
        views = []
        for index in rng.choice(len(self.train), self.recipe.batch, replace=len(self.train) < self.recipe.batch):
            sample = self.train[index]
            assert sample.label is not None
            views.append(random_view(sample.image, sample.label, self.recipe.crop, self.recipe.scale, rng))
        images = torch.from_numpy(np.stack([image for image, _ in views]))  # [B, h, w, 3] uint8
        labels = torch.from_numpy(np.stack([label for _, label in views]))  # [B, h, w] uint8
        return images, labels

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        images, labels = batch
        logits = module(normalise(images)).float()  # [B, K, h, w]
        if not bool((labels != UNLABELLED).any()):
            return logits.sum() * 0.0  # nothing labelled: no gradient, but still a graph
        if self.recipe.hardest < 1:
            return hardest_cross_entropy(logits, labels, self.weights, self.recipe.hardest)
        return F.cross_entropy(logits, labels.long(), self.weights, ignore_index=UNLABELLED)

    @torch.inference_mode()
    def validate(self, module: nn.Module) -> dict[str, float]:
        """mIoU of the network at the task's scale and at scale 1, both judged at native resolution."""
        figures = {}
        for name, scale in {f"miou_{self.scale:g}": self.scale, "miou_1": 1.0}.items():
            matrix = ConfusionMatrix(self.classes)
            for sample in self.val:
                assert sample.label is not None
                size = low_resolution_size(sample.label.shape, scale)
                image = torch.from_numpy(resize(sample.image, size))[None].to(self.device)
                logits = module(normalise(image))
                mask = F.interpolate(logits.argmax(1, keepdim=True).float(), sample.label.shape, mode="nearest")
                matrix.update(sample.label, mask[0, 0].to(torch.uint8).cpu().numpy())
            figures[name] = matrix.miou()
        return figures


def hardest_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor, share: float) -> Tensor:
    """Mean weighted cross-entropy over the ``share`` of labelled pixels whose loss is highest, of the whole batch."""
    losses = F.cross_entropy(logits, labels.long(), weights, ignore_index=UNLABELLED, reduction="none")  # [B, h, w]
    losses = losses[labels != UNLABELLED]
    return losses.topk(max(1, round(share * len(losses)))).values.mean() if len(losses) else logits.sum() * 0.0


def class_weights(samples: Sequence[Sample], num_classes: int, power: float) -> Tensor:
    """Weights [K]: (median frequency / frequency) ** power; rare classes count more, absent ones 1.

    Raises TrainingError where no pixel of ``samples`` is labelled: there is nothing to learn from.
    """
    counts = np.zeros(num_classes, np.float64)
    for sample in samples:
        assert sample.label is not None
        counts += np.bincount(sample.label.ravel(), minlength=256)[:num_classes]
    present = counts > 0
    if not present.any():
        raise TrainingError(f"not one pixel of the {len(samples)} training frames has a class; check the labels")
    weights = np.ones(num_classes, np.float32)
    weights[present] = (np.median(counts[present]) / counts[present]) ** power
    return torch.from_numpy(weights)
