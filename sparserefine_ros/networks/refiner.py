"""SparseRefine's trainable part: sparse U-Net, linear head, ensembler (SparseRefine, Fig. 2).

Shape shorthand: B images, K classes, H, W native size, N selected pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparserefine_ros.networks.ensemblers import build_ensembler
from sparserefine_ros.networks.fused_unet import FusedUNet
from sparserefine_ros.networks.limits import check_flags, check_whole
from sparserefine_ros.networks.unet import SparseUNet
from sparserefine_ros.sparse import Pyramid
from sparserefine_ros.sparse.backends import Backend
from sparserefine_ros.sparse.pyramid import check_pyramid

MAX_LEVELS = 16  # halvings of the largest image end there in one site


class Refinement(NamedTuple):
    """What the refiner says of the selected pixels."""

    refined: Tensor  # [N, K] logits of the sparse branch alone
    ensembled: Tensor  # [N, K] logits after the ensembler: the final prediction


class SparseRefiner(nn.Module):
    """Refines the logits of selected pixels from their full-resolution colours.

    The paper's refiner sees colours only, and a small one then has to recognise objects by their edges. With
    ``context`` ours also sees what the dense segmenter thinks of every pixel, and only has to move borders.

    Args:
        num_classes: K.
        channels: widths of the U-Net, one a level.
        stride: "dilate" as in the official code, or "floor" (a third fewer multiply-adds); see ``sparse``.
        blocks: residual blocks a stage and direction.
        ensembler: gated, direct, entropy, oracle or residual.
        context: the U-Net reads the initial softmax beside the colours (ours); False is the paper's refiner.

    Raises ValueError for no channels or more than MAX_LEVELS, no blocks, or a stride, an ensembler or a context that is
    none of these.
    """

    def __init__(
        self,
        num_classes: int,
        channels: Sequence[int] = (32, 64, 128, 256, 512, 1024),
        stride: str = "dilate",
        blocks: int = 2,
        ensembler: str = "gated",
        context: bool = False,
    ) -> None:
        super().__init__()
        check_pyramid(len(channels), stride)
        if len(channels) > MAX_LEVELS:
            raise ValueError(f"channels are of {len(channels)} levels; give 1 to {MAX_LEVELS}")
        check_whole(blocks=blocks)
        check_flags(context=context)
        self.levels, self.stride, self.context = len(channels), stride, context
        self.fused: FusedUNet | None = None
        self.unet = SparseUNet(3 + num_classes * context, channels, blocks)
        self.classifier = nn.Linear(channels[0], num_classes)
        self.ensembler = build_ensembler(ensembler, num_classes)

    def fuse(self, backend: Backend, dtype: torch.dtype = torch.float32) -> None:
        """From here on the U-Net runs for inference alone, on ``backend``, with the weights it has now."""
        self.fused = FusedUNet(self.unet, backend, dtype)

    def pyramid(self, mask: Tensor) -> Pyramid:
        """Sites and neighbour maps of a selection, bool [B, H, W]: built once a frame, used by every layer."""
        if self.fused is not None:
            return self.fused.backend.pyramid(mask, self.levels, self.stride)
        return Pyramid.build(mask, self.levels, self.stride)

    def features(self, x: Tensor, pyramid: Pyramid) -> Tensor:
        """What the classifier reads, [N, C_0], of colours [N, 3]; with context, and the initial softmax [N, 3 + K]."""
        features: Tensor = (self.unet if self.fused is None else self.fused)(x, pyramid)
        return features

    def forward(self, pixels: Tensor, initial: Tensor, pyramid: Pyramid, labels: Tensor | None = None) -> Refinement:
        """Normalised colours [N, 3] and initial logits [N, K], rows as in ``pyramid.levels[0].sites``."""
        x = torch.cat([pixels, initial.softmax(1)], 1) if self.context else pixels
        refined = self.classifier(self.features(x, pyramid))
        return Refinement(refined, self.ensembler(initial, refined, labels))
