"""The per-pixel ends of the pipeline: what the dense logits say of a pixel, and how the refiner's answer is blended in.

Shape shorthand: B images, K classes, C feature channels, H, W native size, h, w low resolution, N selected pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparserefine_ros.networks.entropy import entropy
from sparserefine_ros.networks.refiner import SparseRefiner
from sparserefine_ros.networks.selectors import nearest_index
from sparserefine_ros.sparse import SiteSet


@dataclass(frozen=True)
class Initial:
    """The dense segmenter's prediction at low resolution."""

    entropy: Tensor  # [B, h, w] float32, nats
    mask: Tensor  # [B, h, w] uint8
    confidence: Tensor  # [B, h, w] uint8, 255 times the largest probability
    finite: bool  # False where logits were NaN or infinite


class Head:
    """Plain torch: any device, any refiner."""

    def __init__(self, refiner: SparseRefiner | None) -> None:
        self.refiner = refiner

    def initial(self, logits: Tensor) -> Initial:
        """Entropy, class and confidence of ``logits`` [B, K, h, w], from one softmax that stays in cache."""
        rows = logits.permute(0, 2, 3, 1).reshape(-1, logits.shape[1])  # [B h w, K]; a view of channels-last logits
        result = _empty(logits)
        uncertainty, mask, confidence = (t.view(-1) for t in (result.entropy, result.mask, result.confidence))
        for part in _chunks(len(rows), logits.device):
            probabilities = rows[part].float().softmax(1)
            uncertainty[part] = entropy(probabilities)
            top = probabilities.max(1)
            mask[part] = top.indices.to(torch.uint8)
            confidence[part] = (top.values * 255).round().to(torch.uint8)
        return Initial(result.entropy, result.mask, result.confidence, bool(torch.isfinite(uncertainty).all()))

    def merge(self, features: Tensor, logits: Tensor, sites: SiteSet, mask: Tensor, confidence: Tensor) -> bool:
        """Writes class and confidence of the selected pixels into ``mask`` and ``confidence`` [B, H, W] uint8.

        ``features`` [N, C] are the refiner's, ``logits`` [B, K, h, w] the dense segmenter's. False where the result is
        not finite.
        """
        assert self.refiner is not None
        finite = True
        for part in _chunks(len(sites), features.device):
            refined = self.refiner.classifier(features[part])
            initial = gather_initial(logits, sites, part)
            top = self.refiner.ensembler(initial.float(), refined.float()).softmax(1).max(1)
            finite = finite and bool(torch.isfinite(top.values).all())
            mask.view(-1)[sites.flat[part]] = top.indices.to(torch.uint8)
            confidence.view(-1)[sites.flat[part]] = (top.values * 255).round().to(torch.uint8)
        return finite


def gather_initial(logits: Tensor, sites: SiteSet, part: slice = slice(None)) -> Tensor:
    """Initial logits [N, K] of ``part`` of the sites, from ``logits`` [B, K, h, w]."""
    batch, row, column = sites.sites[part].unbind(1)
    rows = nearest_index(logits.shape[2], sites.shape[1], logits.device)[row]
    columns = nearest_index(logits.shape[3], sites.shape[2], logits.device)[column]
    return logits.permute(0, 2, 3, 1)[batch, rows, columns]


def _empty(logits: Tensor) -> Initial:
    size = (len(logits), *logits.shape[2:])
    mask, confidence = (torch.empty(size, dtype=torch.uint8, device=logits.device) for _ in range(2))
    return Initial(torch.empty(size, device=logits.device), mask, confidence, True)


def _chunks(rows: int, device: torch.device) -> Iterator[slice]:
    """Slices of ``rows`` that a CPU core can hold in its cache; one slice on other devices."""
    step = 8192 if device.type == "cpu" else max(rows, 1)
    for start in range(0, rows, step):
        yield slice(start, start + step)
