"""Training the refiner on the selected pixels of a frozen dense segmenter (SparseRefine, section 4.1).

Shape shorthand: B batch, K classes, H, W native crop, h, w the same crop at low resolution, N selected pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparserefine_ros.datasets.base import UNLABELLED, Sample
from sparserefine_ros.datasets.classes import ClassList
from sparserefine_ros.evaluation.metrics import ConfusionMatrix
from sparserefine_ros.networks.refiner import SparseRefiner
from sparserefine_ros.networks.selectors import EntropySelector, Prediction, upsample_nearest
from sparserefine_ros.segmenter.head import gather_initial
from sparserefine_ros.segmenter.preprocess import low_resolution_size, normalise, normalise_pixels, resize
from sparserefine_ros.sparse import SiteSet
from sparserefine_ros.training.augment import random_view
from sparserefine_ros.training.dense import class_weights
from sparserefine_ros.training.loop import mixed_precision
from sparserefine_ros.training.recipe import StageRecipe


class RefinerTask:
    """A refiner, the frozen dense segmenter it corrects, and frames held in memory."""

    def __init__(
        self,
        module: nn.Module,
        dense: nn.Module,
        classes: ClassList,
        train: Sequence[Sample],
        val: Sequence[Sample],
        recipe: StageRecipe,
        scale: float,
        threshold: float,
        device: torch.device,
    ) -> None:
        self.module = module
        self.dense = dense.to(device).eval().requires_grad_(False)
        self.classes, self.train, self.val, self.recipe, self.scale = classes, train, val, recipe, scale
        self.samples = len(train)
        self.selector = EntropySelector(threshold)
        self.device = device
        self.weights = class_weights(train, len(classes), recipe.class_weight_power).to(device)

    def batch(self, rng: np.random.Generator) -> tuple[Tensor, ...]:
        views, lows = [], []
        for index in rng.choice(len(self.train), self.recipe.batch, replace=len(self.train) < self.recipe.batch):
            sample = self.train[index]
            assert sample.label is not None
            view = random_view(sample.image, sample.label, self.recipe.crop, self.recipe.scale, rng)
            views.append(view)
            lows.append(resize(view[0], low_resolution_size(view[1].shape, self.scale)))
        images = torch.from_numpy(np.stack([image for image, _ in views]))  # [B, H, W, 3] uint8
        labels = torch.from_numpy(np.stack([label for _, label in views]))  # [B, H, W] uint8
        return images, torch.from_numpy(np.stack(lows)), labels

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Cross-entropy of the refined and of the ensembled logits, selected pixels only, weight 1 each."""
        refined, ensembled, target, _ = self._refine(module, *batch)
        return self._cross_entropy(target, refined) + self._cross_entropy(target, ensembled)

    def _cross_entropy(self, target: Tensor, logits: Tensor) -> Tensor:
        """Of ``logits`` [N, K] and labels [N]; 0 where there are none: no gradient, but still a graph."""
        if not bool((target != UNLABELLED).any()):
            return logits.sum() * 0.0
        return F.cross_entropy(logits.float(), target, self.weights, ignore_index=UNLABELLED)

    def _refine(
        self, module: nn.Module, images: Tensor, lows: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Refined and ensembled logits [N, K], labels [N], and (initial mask [B, H, W], flat positions [N])."""
        assert isinstance(module, SparseRefiner)
        size = (labels.shape[1], labels.shape[2])
        with torch.no_grad():
            logits = self.dense(normalise(lows)).float()  # [B, K, h, w]
            sites = (pyramid := module.pyramid(self.selector(Prediction(logits, size)))).levels[0]
        refined, ensembled = module(self.inputs(images, sites), gather_initial(logits, sites), pyramid)
        initial = upsample_nearest(logits.argmax(1).to(torch.uint8), size)
        return refined, ensembled, labels.view(-1)[sites.flat].long(), (initial, sites.flat)

    def inputs(self, images: Tensor, sites: SiteSet) -> Tensor:
        """What the refiner reads at ``sites`` of ``images`` [B, H, W, 3] uint8: colours [N, 3], normalised."""
        return normalise_pixels(images.view(-1, 3)[sites.flat])

    @torch.inference_mode()
    def validate(self, module: nn.Module) -> dict[str, float]:
        """mIoU before refinement and after; the sparse branch's alone, where there is one; and the mean density."""
        matrices, density = self.measure(module)
        return {**{name: matrix.miou() for name, matrix in matrices.items()}, "density": density}

    def measure(self, module: nn.Module) -> tuple[dict[str, ConfusionMatrix], float]:
        """Over the validation frames: confusion by stage, called as the figures of ``validate``, and mean density."""
        matrices = {name: ConfusionMatrix(self.classes) for name in ("miou_lr", "miou_refined", "miou")}
        densities = []
        for sample in self.val:
            assert sample.label is not None
            low = resize(sample.image, low_resolution_size(sample.label.shape, self.scale))
            batch = [torch.from_numpy(a)[None].to(self.device) for a in (sample.image, low, sample.label)]
            with mixed_precision(self.device):
                refined, ensembled, target, (initial, flat) = self._refine(module, *batch)
            densities.append(len(target) / sample.label.size)
            for name, logits in (("miou_lr", None), ("miou_refined", refined), ("miou", ensembled)):
                mask = initial.clone()
                if logits is not None:
                    mask.view(-1)[flat] = logits.argmax(1).to(torch.uint8)
                matrices[name].update(sample.label, mask[0].cpu().numpy())
        return matrices, float(np.mean(densities))
