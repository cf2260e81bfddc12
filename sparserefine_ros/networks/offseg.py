"""OffSeg: an efficient encoder, frequency-aware fusion and a classifier with offsets.

Zhang et al., 2025 (arXiv 2508.08811). What the paper leaves open is as in the published code, whose weights
`sparserefine import` reads: classes meet pixels at stride 4, and normalisations in the head are by groups.

Shape shorthand: B images, K classes, H, W input height and width, C channels.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from sparserefine_ros.networks.efficientformer import EfficientFormerV2
from sparserefine_ros.networks.freqfusion import FreqFusion, interleave
from sparserefine_ros.networks.limits import check_whole
from sparserefine_ros.networks.offset import OffsetClassifier

VARIANTS = {
    "T": ("S1", (32, 32, 64, 128)),
    "B": ("S2", (32, 64, 128, 256)),
    "L": ("L", (32, 64, 128, 256)),
}
"""Variant to the size of its encoder and the widths that its stages are projected to."""
HEAD_WIDTH = 256


class ConvNormRelu(nn.Sequential):
    """1x1 convolution, normalisation by 32 groups, ReLU."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__(nn.Conv2d(cin, cout, 1, bias=False), nn.GroupNorm(32, cout), nn.ReLU())


class OffSeg(nn.Module):
    """Images, of 9 pixels a side and more, to logits at the images' own size.

    Args:
        num_classes: K.
        variant: T, B or L.
        resolution: side of the images that the encoder's position biases are for (see `EfficientFormerV2`).

    Raises:
        ValueError: another variant, or a resolution that is no whole number from 1.
    """

    def __init__(self, num_classes: int, variant: str = "T", resolution: int = 512) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"unknown OffSeg variant {variant!r}; known are {', '.join(VARIANTS)}")
        check_whole(resolution=resolution)
        size, widths = VARIANTS[variant]
        self.encoder = EfficientFormerV2(size, resolution)
        self.project = nn.ModuleList(
            ConvNormRelu(cin, cout) for cin, cout in zip(self.encoder.widths, widths, strict=True)
        )
        self.fuse = nn.ModuleList(FreqFusion(widths[i], sum(widths[i + 1 :])) for i in range(3))
        self.align = ConvNormRelu(sum(widths), HEAD_WIDTH)
        self.classifier = OffsetClassifier(HEAD_WIDTH, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] to logits [B, K, H, W]."""
        features = [project(x) for project, x in zip(self.project, self.encoder(images), strict=True)]
        y = features[3]
        for i in (2, 1, 0):
            y = interleave(*self.fuse[i](features[i], y))
        logits = self.classifier(self.align(y))  # [B, K, H/4, W/4]
        return F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)
