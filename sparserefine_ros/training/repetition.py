"""Training a network to be repeated at selected sites (`networks.repetition`), by what it says of whole images.

The student starts as its teacher, the dense segmenter at native resolution, and sees less: beyond the selected sites,
what low resolution gave. It learns to make the same of that. Its targets are the teacher's probabilities on the very
view it is shown (Hinton et al., 2015; "function matching" in Beyer et al., 2022), so that no view is ever seen twice.

Shape shorthand: B batch, K classes, H, W native crop, h, w the same crop at low resolution, N selected pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparserefine_ros.datasets.base import UNLABELLED
from sparserefine_ros.networks.repeater import RepeatRefiner, check_repeatable
from sparserefine_ros.networks.repetition_recording import record
from sparserefine_ros.networks.repetition_tables import Grid
from sparserefine_ros.networks.selectors import EntropySelector, Prediction, upsample_nearest
from sparserefine_ros.segmenter.preprocess import normalise, normalise_pixels
from sparserefine_ros.sparse import SiteSet
from sparserefine_ros.training.refiner import RefinerTask

SPREAD = 2.0  # thresholds from this part of the bundle's to this multiple of it: a latency budget moves it later


class RepetitionTask(RefinerTask):
    """A `RepeatRefiner` with a network of its own, and the teacher; all else is what `RefinerTask` takes."""

    def __init__(self, refiner: RepeatRefiner, teacher: nn.Module, *args: Any) -> None:
        super().__init__(refiner, *args)
        self.teacher = teacher.to(self.device).eval().requires_grad_(False)
        self.recorded = check_repeatable(self.dense, self.teacher, self.device)

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Kullback-Leibler divergence of the student's probabilities from the teacher's, mean over selected pixels."""
        images, lows, labels = batch
        threshold = self.selector.threshold * SPREAD ** float(2 * torch.rand(()) - 1)
        logits, sites, _ = self._repeat(module, images, lows, threshold, labels != UNLABELLED)
        if len(sites) == 0:
            return sum(p.sum() * 0.0 for p in module.parameters())  # type: ignore[return-value]  # a graph without slope
        with torch.no_grad():
            whole = self.teacher(normalise(images)).float()  # [B, K, H, W]
            target = sites.gather(whole).log_softmax(1)  # [N, K]
        return F.kl_div(logits.float().log_softmax(1), target, reduction="batchmean", log_target=True)

    def _repeat(
        self, module: nn.Module, images: Tensor, lows: Tensor, threshold: float, wanted: Tensor | None = None
    ) -> tuple[Tensor, SiteSet, Tensor]:
        """Logits [N, K] at the selected pixels, these, and the initial logits [B, K, h, w].

        wanted: [B, H, W] bool; of the others none is selected.
        """
        pixels, size = images.view(-1, 3), (images.shape[1], images.shape[2])
        with torch.no_grad():
            initial, kept = record(self.dense, normalise(lows), self.recorded)
            selected = EntropySelector(threshold)(Prediction(initial.float(), size))
        grid = Grid(selected if wanted is None else selected & wanted)
        logits = module(None, grid, lambda flat: normalise_pixels(pixels[flat]), kept)
        return logits, grid.sites, initial

    def _refine(
        self, module: nn.Module, images: Tensor, lows: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
        """As `RefinerTask`; refined and ensembled logits are the same."""
        refined, sites, initial = self._repeat(module, images, lows, self.selector.threshold)
        mask = upsample_nearest(initial.argmax(1).to(torch.uint8), (labels.shape[1], labels.shape[2]))
        return refined, refined, labels.view(-1)[sites.flat].long(), (mask, sites.flat)
