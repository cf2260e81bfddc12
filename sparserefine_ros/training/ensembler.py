"""Training an ensembler alone, on a sparse branch that is finished (SparseRefine, section 3.2).

The branch is trained with rare classes weighted, so that it looks for them. An ensembler trained beside it learns to
prefer them once more, and leans on a branch that was worse than the one it ends up with. Trained anew, with less or
no weight, it learns how far each of the two predictions can be believed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sparserefine_ros.networks.ensemblers import build_ensembler
from sparserefine_ros.networks.refiner import SparseRefiner
from sparserefine_ros.training.refiner import RefinerTask


class EnsemblerTask(RefinerTask):
    """A new ensembler, the recipe's network, as the module that learns; all else of ``refiner`` stays as it is.

    Takes what `RefinerTask` takes.
    """

    def __init__(self, refiner: nn.Module, *args: Any) -> None:
        assert isinstance(refiner, SparseRefiner)
        super().__init__(refiner, *args)
        self.module = build_ensembler(self.recipe.network, len(self.classes))
        self.refiner = refiner.to(self.device).eval()
        for part in (refiner.unet, refiner.classifier):
            part.requires_grad_(False)

    def loss(self, module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Cross-entropy of the ensembled logits, selected pixels only."""
        _, ensembled, target, _ = self._refine(module, *batch)
        return self._cross_entropy(target, ensembled)

    def _refine(
        self, module: nn.Module, images: Tensor, lows: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
        self.refiner.ensembler = module  # the one that learns, or its running average
        return super()._refine(self.refiner, images, lows, labels)
