"""SegFormer with the decoder of its authors and of the Hugging Face hub.

Xie et al., 2021, "SegFormer" (arXiv 2105.15203), section 3.2: a linear layer a level, concatenation from coarse to
fine, one more to fuse them, a classifier. `segformer` has mmseg's decoder, whose weights are others.

Shape shorthand: B images, K classes, H, W input height and width, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparserefine_ros.networks.compact import ConvBnRelu
from sparserefine_ros.networks.hub_config import check_segformer
from sparserefine_ros.networks.segformer import mix_transformer


class HubSegFormer(nn.Module):
    """Images to logits at the images' own size.

    Args:
        num_classes: K.
        config: transformers' configuration of a SegFormer, as its config.json has it; see `hub_config` for the keys.

    Raises:
        ValueError: a config with other keys, or the package transformers is missing or too old.
    """

    def __init__(self, num_classes: int, config: Mapping[str, Any]) -> None:
        super().__init__()
        check_segformer(config)
        # Left out, the last level would be a sequence, which only square images can be rebuilt from.
        self.encoder: Any = mix_transformer({**config, "reshape_last_stage": True})
        settings = self.encoder.config
        width = settings.decoder_hidden_size
        self.levels = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in settings.hidden_sizes)
        self.fusion = ConvBnRelu(len(self.levels) * width, width, 1)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] to logits [B, K, H, W]."""
        x, levels = images, []
        for stage, level in zip(self.encoder.stages, self.levels, strict=True):
            x = stage(x)  # [B, C, h, w] at strides 4, 8, 16 and 32
            levels.append(level(x))
        size = levels[0].shape[-2:]
        resized = [F.interpolate(level, size, mode="bilinear", align_corners=False) for level in reversed(levels)]
        logits = self.classifier(self.fusion(torch.cat(resized, 1)))
        return F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)
