"""A compact dense segmenter that trains from scratch on a few hundred frames.

A residual encoder (He et al., 2016) to stride 16, pyramid pooling for context (Zhao et al., 2017, PSPNet) and a
top-down path with lateral connections (Lin et al., 2017, FPN) up to stride 2, where thin objects still show.

Shape shorthand: B images, K classes, H, W input height and width, C channels, h, w a stage's height and width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparserefine_ros.networks.exporting import adaptive_average, exporting
from sparserefine_ros.networks.limits import check_flags, check_list
from sparserefine_ros.networks.offset import OffsetClassifier
from sparserefine_ros.networks.points import CoarseFine


class ConvBnRelu(nn.Sequential):
    """3x3 or 1x1 convolution, batch normalisation, ReLU."""

    def __init__(self, cin: int, cout: int, kernel: int = 3, stride: int = 1, dilation: int = 1) -> None:
        super().__init__(
            nn.Conv2d(cin, cout, kernel, stride, dilation * (kernel // 2), dilation, bias=False),
            nn.BatchNorm2d(cout),
            nn.ReLU(inplace=True),
        )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected by 1x1 where the shape changes."""

    def __init__(self, cin: int, cout: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv1 = ConvBnRelu(cin, cout, stride=stride, dilation=dilation)
        self.conv2 = nn.Sequential(
            nn.Conv2d(cout, cout, 3, padding=dilation, dilation=dilation, bias=False), nn.BatchNorm2d(cout)
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or cin != cout:
            self.shortcut = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:  # [B, Cin, h, w] -> [B, Cout, h/stride, w/stride]
        return F.relu(self.conv2(self.conv1(x)) + self.shortcut(x))


class PyramidPooling(nn.Module):
    """Adds to every position what the image holds as a whole, in halves and in quarters."""

    def __init__(self, channels: int, bins: Sequence[int] = (1, 2, 4)) -> None:
        super().__init__()
        self.bins = tuple(bins)
        part = channels // 4
        if part == 0:
            raise ValueError(f"pyramid pooling splits {channels} channels into quarters; give at least 4")
        # No batch normalisation here: at bin 1 a batch of one image would leave one value a channel.
        self.reduce = nn.ModuleList(nn.Conv2d(channels, part, 1) for _ in self.bins)
        self.merge = ConvBnRelu(channels + part * len(self.bins), channels, kernel=1)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w] -> [B, C, h, w]
        parts = [x]
        for bins, reduce in zip(self.bins, self.reduce, strict=True):
            average = adaptive_average(x, bins) if exporting() else F.adaptive_avg_pool2d(x, bins)
            pooled = F.relu(reduce(average))
            parts.append(F.interpolate(pooled, x.shape[-2:], mode="bilinear", align_corners=False))
        return self.merge(torch.cat(parts, 1))


class CompactEncoder(nn.Module):
    """Images to features at four strides; the decoders of this package share it.

    Args:
        widths: channels at strides 2, 4, 8 and 16, the last at least 4.
        depths: residual blocks at strides 4, 8 and 16.

    Raises ValueError for others than four widths and three depths.
    """

    PARTS = ("stem", "down4", "stage4", "stage8", "stage16", "context")
    """What is the encoder's in a network that derives from it."""

    def __init__(self, widths: Sequence[int] = (32, 64, 128, 192), depths: Sequence[int] = (2, 2, 3)) -> None:
        super().__init__()
        check_list(4, widths=widths)
        check_list(3, depths=depths)
        self.widths = c2, c4, c8, c16 = tuple(widths)
        self.stem = ConvBnRelu(3, c2, stride=2)
        self.down4 = ConvBnRelu(c2, c4, stride=2)
        self.stage4 = nn.Sequential(*(BasicBlock(c4, c4) for _ in range(depths[0])))
        self.stage8 = nn.Sequential(
            *(BasicBlock(c4 if i == 0 else c8, c8, 2 if i == 0 else 1) for i in range(depths[1]))
        )
        # The last blocks widen their view instead of losing more resolution.
        self.stage16 = nn.Sequential(
            *(BasicBlock(c8 if i == 0 else c16, c16, 2 if i == 0 else 1, 1 if i == 0 else 2) for i in range(depths[2]))
        )
        self.context = PyramidPooling(c16)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Normalised images [B, 3, H, W] to features [B, C, h, w] at strides 2, 4, 8 and 16."""
        x2 = self.stem(images)
        x4 = self.stage4(self.down4(x2))
        x8 = self.stage8(x4)
        return x2, x4, x8, self.context(self.stage16(x8))


class CompactSegmenter(CompactEncoder):
    """Images to logits at the images' own size.

    Args:
        num_classes: K.
        widths, depths: as in `CompactEncoder`.
        offsets: classify with offset learning (`OffsetClassifier`) instead of a 1x1 convolution.
        offset_norm: end it in a LayerNorm over the classes.
    """

    def __init__(
        self,
        num_classes: int,
        widths: Sequence[int] = (32, 64, 128, 192),
        depths: Sequence[int] = (2, 2, 3),
        offsets: bool = False,
        offset_norm: bool = True,
    ) -> None:
        super().__init__(widths, depths)
        check_flags(offsets=offsets, offset_norm=offset_norm)
        c2, c4, c8, c16 = widths
        self.lateral16, self.lateral8 = nn.Conv2d(c16, c4, 1), nn.Conv2d(c8, c4, 1)
        self.lateral4, self.lateral2 = nn.Conv2d(c4, c4, 1), nn.Conv2d(c2, c2, 1)
        self.fuse8, self.fuse4, self.fuse2 = ConvBnRelu(c4, c4), ConvBnRelu(c4, c4), ConvBnRelu(c4, c2)
        self.mix2 = ConvBnRelu(c2, c2)
        self.classifier = OffsetClassifier(c2, num_classes, offset_norm) if offsets else nn.Conv2d(c2, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] to logits [B, K, H, W]."""
        return _upsample(self.coarse_and_fine(images).coarse, images)

    def coarse_and_fine(self, images: Tensor) -> CoarseFine:
        """Logits [B, K, H/2, W/2], and what the encoder first and the decoder last know at their resolution.

        The fine features have 2 x C channels together, C the first of the widths.
        """
        x2, x4, x8, x16 = self.encode(images)
        y = self.fuse8(self.lateral8(x8) + _upsample(self.lateral16(x16), x8))
        y = self.fuse4(self.lateral4(x4) + _upsample(y, x4))
        y = self.mix2(self.lateral2(x2) + _upsample(self.fuse2(y), x2))
        return CoarseFine(self.classifier(y), (x2, y))


def _upsample(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)
