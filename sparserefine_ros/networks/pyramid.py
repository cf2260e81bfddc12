"""A dense segmenter on any encoder of `backbones`, among them timm's: a feature pyramid and a per-pixel classifier.

Lin et al., 2017 (Feature Pyramid Networks): from the coarsest level down, what is known so far is upsampled and added
to the next level, and a 3x3 convolution fuses the sum.

Shape shorthand: B images, K classes, C channels, H, W the images' size, h, w a level's.
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from sparserefine_ros.networks.backbones import build_backbone, extend
from sparserefine_ros.networks.compact import ConvBnRelu
from sparserefine_ros.networks.limits import check_whole


class PyramidSegmenter(nn.Module):
    """Images to logits at the images' own size.

    Args:
        num_classes: K.
        backbone: a name of `backbones`.
        width: C of all levels.
        stride: of the finest level that is used; pixels are classified there.
    """

    def __init__(self, num_classes: int, backbone: str = "compact", width: int = 128, stride: int = 4) -> None:
        super().__init__()
        check_whole(width=width, stride=stride)
        self.encoder = build_backbone(backbone)
        self.used = [i for i, s in enumerate(self.encoder.strides) if s >= stride]
        if not self.used:
            raise ValueError(
                f"stride {stride} is coarser than all of backbone {backbone!r}; its strides are "
                f"{', '.join(map(str, self.encoder.strides))}"
            )
        self.multiple = math.lcm(*self.encoder.strides)
        self.laterals = nn.ModuleList(nn.Conv2d(self.encoder.channels[i], width, 1) for i in self.used)
        self.fuse = nn.ModuleList(ConvBnRelu(width, width) for _ in self.used)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] to logits [B, K, H, W]."""
        extended = extend(images, self.multiple)
        features = self.encoder(extended)
        levels = [lateral(features[i]) for i, lateral in zip(self.used, self.laterals, strict=True)]  # [B, C, h, w]
        y = self.fuse[-1](levels[-1])
        for level, fuse in zip(levels[-2::-1], list(self.fuse)[-2::-1], strict=True):
            y = fuse(level + _resized(y, level))
        logits: Tensor = _resized(self.classifier(y), extended)
        return logits[..., : images.shape[2], : images.shape[3]]


def _resized(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)
