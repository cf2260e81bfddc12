"""Points on feature maps: sampling, uncertainty, and which points PointRend trains on and renders.

Kirillov et al., 2020, "PointRend: Image Segmentation as Rendering" (arXiv 1912.08193), section 3.

Shape shorthand: B images, K classes, C channels, h, w a map's height and width, P points of an image. A point is
(x, y) in [0, 1] of the image's width and height, so that it means the same on maps of every size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class CoarseFine(NamedTuple):
    """What a dense segmenter shows a point head; see `CompactSegmenter.coarse_and_fine`."""

    coarse: Tensor  # [B, K, h', w'] logits before they are enlarged to the size of the input
    fine: tuple[Tensor, ...]  # feature maps [B, C_i, h_i, w_i]


def sample(maps: Tensor, points: Tensor, mode: str = "bilinear") -> Tensor:
    """Values [B, P, C] of ``maps`` [B, C, h, w] at ``points`` [B, P, 2]; beyond the outer pixels' centres, theirs."""
    exact = torch.promote_types(maps.dtype, torch.float32)  # half precision cannot tell the pixels of a wide map apart
    grid = 2 * points[:, :, None].to(exact) - 1  # [B, P, 1, 2]
    values = F.grid_sample(maps.to(exact), grid, mode=mode, padding_mode="border", align_corners=False)
    return values[..., 0].transpose(1, 2).to(maps.dtype)


def uncertainty(logits: Tensor, dim: int = 1) -> Tensor:
    """Second largest minus largest logit over ``dim``: at most 0, and 0 where two classes are level."""
    first, second = logits.topk(2, dim).values.unbind(dim)
    return second - first


def centres(flat: Tensor, size: tuple[int, int]) -> Tensor:
    """[..., 2]: centres of the pixels at positions ``flat`` [...] int64 of a grid of ``size`` (h, w)."""
    height, width = size
    return torch.stack([(flat % width + 0.5) / width, (flat // width + 0.5) / height], -1)


def most_uncertain(logits: Tensor, count: int) -> Tensor:
    """[B, P] int64: flat positions of the ``count`` most uncertain pixels of ``logits`` [B, K, h, w]; all if fewer."""
    scores = uncertainty(logits).flatten(1)
    return scores.topk(min(count, scores.shape[1]), 1, sorted=False).indices


def training_points(coarse: Tensor, count: int, oversample: float = 3.0, important: float = 0.75) -> Tensor:
    """[B, P, 2] random points that lean to where ``coarse`` [B, K, h, w] is uncertain (section 3.1, k and beta).

    Of ``oversample`` times ``count`` uniform points the ``important`` share of ``count`` that is most uncertain; the
    others of ``count`` are uniform.
    """
    batch = len(coarse)
    candidates = torch.rand(batch, int(oversample * count), 2, device=coarse.device)
    top = int(important * count)
    best = uncertainty(sample(coarse, candidates), 2).topk(top, 1).indices  # [B, top]
    chosen = candidates.gather(1, best[..., None].expand(-1, -1, 2))
    return torch.cat([chosen, torch.rand(batch, count - top, 2, device=coarse.device)], 1)


def subdivisions(start: tuple[int, int], end: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Sizes that double from ``start`` until they would pass ``end``, in either direction; then ``end``."""
    height, width = start
    while 2 * height < end[0] and 2 * width < end[1]:
        height, width = 2 * height, 2 * width
        yield height, width
    yield end
