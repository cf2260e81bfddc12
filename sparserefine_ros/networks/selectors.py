"""Which pixels to refine: the entropy selector and those the paper compares it with (SparseRefine, Table 5a).

Every selector looks at the initial, low-resolution prediction and answers with a mask at native resolution.

Shape shorthand: B images, K classes, C feature channels, h, w low resolution, H, W native resolution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparserefine_ros.networks.entropy import entropy

UNLABELLED = 255


@dataclass
class Prediction:
    """The initial prediction and what a selector may look at beside it."""

    logits: Tensor  # [B, K, h, w]
    size: tuple[int, int]  # (H, W)
    images: Tensor | None = None  # [B, 3, H, W], normalised: learnable selector
    features: Tensor | None = None  # [B, C, h', w'], the classifier's input: magnitude selector
    labels: Tensor | None = None  # [B, H, W], class ids: oracle selector


def nearest_index(low: int, native: int, device: torch.device | None = None) -> Tensor:
    """For each of ``native`` rows (or columns) the one of ``low`` that nearest upsampling copies.

    floor(i low / native) in integer arithmetic, hence exact for every ratio; for a ratio of 2 the blocks are 2x2.
    """
    return torch.arange(native, device=device) * low // native


def upsample_nearest(x: Tensor, size: tuple[int, int]) -> Tensor:
    """[..., h, w] to [..., H, W] by nearest neighbour."""
    rows = nearest_index(x.shape[-2], size[0], x.device)
    columns = nearest_index(x.shape[-1], size[1], x.device)
    return x.index_select(-1, columns).index_select(-2, rows)  # in this order: whole rows are copied fast


class EntropySelector(nn.Module):
    """Pixels whose entropy exceeds a threshold, in nats (section 3.2).

    Entropy is computed at low resolution and only the mask is upsampled: under nearest upsampling that is the same
    mask as the paper's, at a quarter of the arithmetic for a scale of 0.5.
    """

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, prediction: Prediction) -> Tensor:  # -> bool [B, H, W]
        low = entropy(prediction.logits.softmax(1), 1) > self.threshold
        return upsample_nearest(low, prediction.size)


class RandomSelector(nn.Module):
    """Each pixel with the same probability: the floor that any criterion has to beat."""

    def __init__(self, density: float, seed: int = 0) -> None:
        super().__init__()
        self.density, self.seed = density, seed

    def forward(self, prediction: Prediction) -> Tensor:  # -> bool [B, H, W]
        generator = torch.Generator().manual_seed(self.seed)
        draw = torch.rand(len(prediction.logits), *prediction.size, generator=generator)
        return (draw < self.density).to(prediction.logits.device)


class MagnitudeSelector(nn.Module):
    """The pixels with the largest L2 norm of the features before the classifier, as token pruning ranks its tokens."""

    def __init__(self, density: float) -> None:
        super().__init__()
        self.density = density

    def forward(self, prediction: Prediction) -> Tensor:  # -> bool [B, H, W]
        if prediction.features is None:
            raise ValueError("the magnitude selector needs the features before the classifier, but got None")
        norm = prediction.features.float().norm(dim=1)  # [B, h', w']
        keep = round(norm[0].numel() * self.density)
        low = torch.zeros_like(norm, dtype=torch.bool)
        top = norm.flatten(1).topk(keep, dim=1).indices  # [B, keep]
        low.view(len(norm), -1).scatter_(1, top, True)
        return upsample_nearest(low, prediction.size)


class LearnableSelector(nn.Module):
    """A small network that is trained to tell wrong pixels from right ones (section 4.3).

    Two dense convolutions on the image; their output, the logits and the entropy go through an MLP; a pixel is selected
    where the sigmoid exceeds ``threshold``. Train ``scores`` with binary cross-entropy against "argmax is wrong".
    """

    def __init__(self, num_classes: int, threshold: float = 0.5, channels: int = 16, hidden: int = 32) -> None:
        super().__init__()
        self.threshold = threshold
        self.convs = nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(),
        )  # fmt: skip
        self.mlp = nn.Sequential(
            nn.Linear(channels + num_classes + 1, hidden), nn.ReLU(),
            nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1),
        )  # fmt: skip

    def scores(self, prediction: Prediction) -> Tensor:
        """Logits of "this pixel is wrong", [B, H, W]."""
        if prediction.images is None:
            raise ValueError("the learnable selector needs the native-resolution images, but got None")
        uncertainty = entropy(prediction.logits.softmax(1), 1)[:, None]
        initial = upsample_nearest(torch.cat([prediction.logits, uncertainty], 1), prediction.size)
        features = torch.cat([self.convs(prediction.images), initial], 1)  # [B, channels + K + 1, H, W]
        scores: Tensor = self.mlp(features.permute(0, 2, 3, 1)).squeeze(-1)
        return scores

    def forward(self, prediction: Prediction) -> Tensor:  # -> bool [B, H, W]
        return self.scores(prediction).sigmoid() > self.threshold


class OracleSelector(nn.Module):
    """Exactly the labelled pixels that the initial prediction gets wrong: the bound for every selector."""

    def forward(self, prediction: Prediction) -> Tensor:  # -> bool [B, H, W]
        if prediction.labels is None:
            raise ValueError("the oracle selector needs the labels, but got None")
        initial = upsample_nearest(prediction.logits.argmax(1), prediction.size)
        return (initial != prediction.labels) & (prediction.labels != UNLABELLED)
