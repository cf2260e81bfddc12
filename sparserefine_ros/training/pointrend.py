"""Training PointRend's head on a frozen dense segmenter: points that lean to where the coarse prediction is uncertain.

Kirillov et al., 2020 (arXiv 1912.08193), section 3.3, but for the dense segmenter, which they train along: here it is
the same for every refiner that is compared.

Shape shorthand: B batch, K classes, H, W native crop, h, w the same crop at low resolution, P points of a crop.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparserefine_ros.datasets.base import UNLABELLED
from sparserefine_ros.evaluation.metrics import ConfusionMatrix
from sparserefine_ros.networks.pointrend import PointRend
from sparserefine_ros.networks.points import sample, training_points
from sparserefine_ros.networks.selectors import upsample_nearest
from sparserefine_ros.segmenter.dense import coarse_and_fine
from sparserefine_ros.segmenter.preprocess import low_resolution_size, normalise, resize
from sparserefine_ros.training.loop import mixed_precision
from sparserefine_ros.training.refiner import RefinerTask


class PointRendTask(RefinerTask):
    """As `RefinerTask`, with points instead of selected pixels."""

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Cross-entropy at random points, their labels those of the nearest pixels."""
        assert isinstance(module, PointRend)
        _, lows, labels = batch
        with torch.no_grad():
            maps = coarse_and_fine(self.dense, normalise(lows))
            count = max(1, round(module.train_points * labels[0].numel()))
            points = training_points(maps.coarse.float(), count)
        target = sample(labels[:, None].float(), points, mode="nearest").long().flatten()  # [B P]
        logits = module.at(maps, points).float().flatten(0, 1)  # [B P, K]
        if not bool((target != UNLABELLED).any()):
            return logits.sum() * 0.0
        return F.cross_entropy(logits, target, self.weights, ignore_index=UNLABELLED)

    def measure(self, module: nn.Module) -> tuple[dict[str, ConfusionMatrix], float]:
        """Over the validation frames, by subdivision: "miou_lr", "miou", and predicted points over all pixels."""
        assert isinstance(module, PointRend)
        matrices = {name: ConfusionMatrix(self.classes) for name in ("miou_lr", "miou")}
        densities = []
        for frame in self.val:
            assert frame.label is not None
            size = (frame.label.shape[0], frame.label.shape[1])
            low_size = low_resolution_size(size, self.scale)
            low = torch.from_numpy(resize(frame.image, low_size))[None].to(self.device)
            with mixed_precision(self.device):
                maps = coarse_and_fine(self.dense, normalise(low))
                logits, density = module.render(maps, size)
            coarse = F.interpolate(maps.coarse.float(), low_size, mode="bilinear", align_corners=False)
            initial = upsample_nearest(coarse.argmax(1), size)
            for name, mask in (("miou_lr", initial), ("miou", logits.argmax(1))):
                matrices[name].update(frame.label, mask[0].to(torch.uint8).cpu().numpy())
            densities.append(density)
        return matrices, float(np.mean(densities))
