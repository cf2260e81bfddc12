"""SegFormer with the decoder of mmsegmentation, plain or with offset learning.

Xie et al., 2021, "SegFormer: Simple and Efficient Design for Semantic Segmentation with Transformers". The encoder is
the one of the package transformers, built from its configuration; nothing is downloaded, but a bundle's weights carry
that package's names (since 5.23), and images need 29 pixels a side. The decoder is mmseg's, which differs from theirs:
a convolution with batch normalisation a level, concatenation from fine to coarse, 256 channels for every size.
With offsets (Zhang et al., 2025, arXiv 2508.08811) its features are pooled from stride 4 to 8 and classified by
`OffsetClassifier`.

Shape shorthand: B images, K classes, H, W input height and width, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparserefine_ros.networks.compact import ConvBnRelu
from sparserefine_ros.networks.offset import OffsetClassifier

SIZES = {
    "b0": (32, (2, 2, 2, 2)),
    "b1": (64, (2, 2, 2, 2)),
    "b2": (64, (3, 4, 6, 3)),
    "b3": (64, (3, 4, 18, 3)),
    "b4": (64, (3, 8, 27, 3)),
    "b5": (64, (3, 6, 40, 3)),
}
"""Size to the channels of the first stage and the blocks of every stage."""
HEAD_WIDTH = 256


class SegFormer(nn.Module):
    """Images to logits at the images' own size.

    Args:
        num_classes: K.
        size: b0 to b5.
        offsets: classify with offset learning, at stride 8, instead of a 1x1 convolution, at stride 4.

    Raises:
        ValueError: another size, or the package transformers is missing or too old.
    """

    def __init__(self, num_classes: int, size: str = "b0", offsets: bool = True) -> None:
        super().__init__()
        if size not in SIZES:
            raise ValueError(f"unknown SegFormer size {size!r}; known are {', '.join(SIZES)}")
        first, depths = SIZES[size]
        heads = (1, 2, 5, 8)
        widths = [first * factor for factor in heads]
        self.encoder: Any = mix_transformer(
            {"hidden_sizes": widths, "depths": list(depths), "num_attention_heads": list(heads)}
        )
        for module in self.encoder.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-6  # mmseg's
        self.levels = nn.ModuleList(ConvBnRelu(width, HEAD_WIDTH, 1) for width in widths)
        self.fusion = ConvBnRelu(4 * HEAD_WIDTH, HEAD_WIDTH, 1)
        self.pool = nn.MaxPool2d(2, ceil_mode=True) if offsets else nn.Identity()
        make = OffsetClassifier if offsets else _conv_1x1
        self.classifier: nn.Module = make(HEAD_WIDTH, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] to logits [B, K, H, W]."""
        x, levels = images, []
        for stage, level in zip(self.encoder.stages, self.levels, strict=True):
            x = stage(x)  # [B, C, h, w] at strides 4, 8, 16 and 32
            levels.append(level(x))
        size = levels[0].shape[-2:]
        resized = [F.interpolate(level, size, mode="bilinear", align_corners=False) for level in levels]
        logits = self.classifier(self.pool(self.fusion(torch.cat(resized, 1))))
        return F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)


def _conv_1x1(channels: int, num_classes: int) -> nn.Module:
    return nn.Conv2d(channels, num_classes, 1)


def mix_transformer(config: Mapping[str, Any]) -> Any:
    """The encoder of transformers, its `stages` to be called one after another.

    config: keyword arguments of its SegformerConfig. Raises ValueError where the package is missing or names its
    parts differently.
    """
    try:
        from transformers import SegformerConfig, SegformerModel
    except ImportError as error:
        raise ValueError(
            f"a SegFormer needs the package transformers: pip install 'transformers>=5.23' ({error})"
        ) from error
    encoder = SegformerModel(SegformerConfig(**config))
    if not hasattr(encoder, "stages"):
        raise ValueError(
            "a SegFormer needs a newer transformers, whose encoder has 'stages'; pip install -U transformers"
        )
    return encoder
