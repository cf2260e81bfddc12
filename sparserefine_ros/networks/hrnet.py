"""HRNet: branches at strides 4 to 32 that run side by side and exchange what they know.

Sun et al., 2019, "High-Resolution Representations for Labeling Pixels and Regions" (arXiv 1904.04514), form V2: a head
reads all four branches, resized to stride 4 and concatenated. The head is mmseg's FCN head: one 1x1 convolution as
wide as the branches together, then the classifier.

Shape shorthand: B images, K classes, H, W input height and width, C width of the finest branch; branch b (0 the finest)
has C 2^b channels at stride 4 2^b.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparserefine_ros.networks.compact import BasicBlock, ConvBnRelu
from sparserefine_ros.networks.points import CoarseFine

WIDTHS = (18, 32, 40, 48)
"""Widths of the finest branch that the paper names: HRNet-W18 to HRNet-W48."""
MODULES = (1, 4, 3)
"""Exchanges in the stages of two, three and four branches."""
BLOCKS = 4  # residual blocks a branch between two exchanges, and bottlenecks of the first stage


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution to 256 channels, and a shortcut, projected where the width changes."""

    def __init__(self, cin: int, inner: int = 64, cout: int = 256) -> None:
        super().__init__()
        self.conv1, self.conv2 = ConvBnRelu(cin, inner, 1), ConvBnRelu(inner, inner)
        self.conv3 = _conv_bn(inner, cout, 1)
        self.shortcut: nn.Module = nn.Identity() if cin == cout else _conv_bn(cin, cout, 1)

    def forward(self, x: Tensor) -> Tensor:  # [B, Cin, h, w] -> [B, 256, h, w]
        return F.relu(self.conv3(self.conv2(self.conv1(x))) + self.shortcut(x))


class Exchange(nn.ModuleList):
    """What one branch becomes: the sum of all branches, each brought to its shape by a path of its own.

    From finer branches by 3x3 convolutions of stride 2, one a halving; from coarser ones by a 1x1 convolution and
    bilinear upsampling; its own as it is.
    """

    def __init__(self, widths: Sequence[int], target: int) -> None:
        super().__init__(_path(widths, source, target) for source in range(len(widths)))
        self.target = target

    def forward(self, xs: Sequence[Tensor]) -> Tensor:  # [B, C 2^b, h / 2^b, w / 2^b] by branch -> that of the target
        parts = [path(x) for path, x in zip(self, xs, strict=True)]
        parts = [part if source <= self.target else _resize(part, xs[self.target]) for source, part in enumerate(parts)]
        return F.relu(reduce(torch.add, parts))


class HRModule(nn.Module):
    """Residual blocks on every branch, then an exchange between all."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(*(BasicBlock(w, w) for _ in range(BLOCKS))) for w in widths)
        self.fuse = nn.ModuleList(Exchange(widths, target) for target in range(len(widths)))

    def forward(self, xs: Sequence[Tensor]) -> list[Tensor]:  # [B, C 2^b, h / 2^b, w / 2^b] by branch, and so back
        xs = [branch(x) for branch, x in zip(self.branches, xs, strict=True)]
        return [exchange(xs) for exchange in self.fuse]


class Transition(nn.ModuleList):
    """Before stage ``s`` a branch joins, made from the coarsest so far; before the first, both come from layer1."""

    def __init__(self, widths: Sequence[int], s: int) -> None:
        coarsest = widths[s] if s else 256
        super().__init__(
            nn.Identity() if s and b <= s else ConvBnRelu(coarsest, widths[b], stride=2 if b > s else 1)
            for b in range(s + 2)
        )

    def forward(self, xs: Sequence[Tensor]) -> list[Tensor]:
        return [join(xs[min(b, len(xs) - 1)]) for b, join in enumerate(self)]


class HRNet(nn.Module):
    """Images of any size to logits at their own size.

    Args:
        num_classes: K.
        width: C, one of `WIDTHS`.

    Raises:
        ValueError: another width.
    """

    def __init__(self, num_classes: int, width: int = 48) -> None:
        super().__init__()
        if width not in WIDTHS:
            raise ValueError(f"unknown HRNet width {width!r}; known are {', '.join(map(str, WIDTHS))}")
        widths = [width * 2**b for b in range(4)]
        self.stem = nn.Sequential(ConvBnRelu(3, 64, stride=2), ConvBnRelu(64, 64, stride=2))
        self.layer1 = nn.Sequential(*(Bottleneck(64 if i == 0 else 256) for i in range(BLOCKS)))
        self.transitions = nn.ModuleList(Transition(widths, s) for s in range(3))
        self.stages = nn.ModuleList(
            nn.Sequential(*(HRModule(widths[: s + 2]) for _ in range(modules))) for s, modules in enumerate(MODULES)
        )
        self.head = ConvBnRelu(sum(widths), sum(widths), 1)
        self.classifier = nn.Conv2d(sum(widths), num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] to logits [B, K, H, W]."""
        return _resize(self.coarse_and_fine(images).coarse, images)

    def coarse_and_fine(self, images: Tensor) -> CoarseFine:
        """Logits [B, K, H/4, W/4], and the features of that resolution before they meet the others, C channels."""
        xs = [self.layer1(self.stem(images))]
        for transition, stage in zip(self.transitions, self.stages, strict=True):
            xs = stage(transition(xs))
        y = self.head(torch.cat([xs[0], *(_resize(x, xs[0]) for x in xs[1:])], 1))  # [B, 15 C, H/4, W/4]
        return CoarseFine(self.classifier(y), (xs[0],))


def _path(widths: Sequence[int], source: int, target: int) -> nn.Module:
    if source == target:
        return nn.Identity()
    if source > target:
        return _conv_bn(widths[source], widths[target], 1)
    steps = [ConvBnRelu(widths[source], widths[source], stride=2) for _ in range(target - source - 1)]
    return nn.Sequential(*steps, _conv_bn(widths[source], widths[target], 3, 2))


def _conv_bn(cin: int, cout: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(cout))


def _resize(x: Tensor, like: Tensor) -> Tensor:
    """To the height and width of ``like``."""
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)
