"""The sparse feature extractor: a MinkowskiUNet on selected pixels (SparseRefine, section 3.2 and appendix A1).

Pre-activation residual blocks (He et al., 2016b), ``blocks`` of them a stage before downsampling and as many after
upsampling; skips are concatenated.

Shape shorthand: N_l sites at level l, C_l channels there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparserefine_ros.sparse import KernelMap, Pyramid, StridedConv2d, SubmanifoldConv2d, TransposedConv2d


class SiteNorm(nn.BatchNorm1d):
    """Batch normalisation over sites; a single site or none has no statistics of its own and uses the running ones."""

    def forward(self, x: Tensor) -> Tensor:  # [N, C] -> [N, C]
        if self.training and len(x) < 2:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(x)


class ResidualBlock(nn.Module):
    """x -> shortcut(x) + conv(act(conv(act(x)))), act = ReLU of batch normalisation."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = SiteNorm(cin), SubmanifoldConv2d(cin, cout)
        self.norm2, self.conv2 = SiteNorm(cout), SubmanifoldConv2d(cout, cout)
        self.shortcut: nn.Module = nn.Identity() if cin == cout else nn.Linear(cin, cout, bias=False)

    def forward(self, x: Tensor, neighbours: KernelMap) -> Tensor:  # [N_l, Cin] -> [N_l, Cout]
        # What a normalisation or a convolution returns belongs to nobody else: ReLU may work in place.
        y = self.conv1(F.relu(self.norm1(x), inplace=True), neighbours)
        y = self.conv2(F.relu(self.norm2(y), inplace=True), neighbours)
        shortcut: Tensor = self.shortcut(x)
        return shortcut + y


class Stage(nn.Module):
    """One level of the U and, inside it, all deeper ones."""

    def __init__(self, channels: Sequence[int], blocks: int, level: int = 0) -> None:
        super().__init__()
        self.level = level
        width, deeper = channels[0], channels[1:]
        self.before = nn.ModuleList(ResidualBlock(width, width) for _ in range(blocks))
        self.inner: Stage | None = None
        if deeper:
            self.norm_down, self.down = SiteNorm(width), StridedConv2d(width, deeper[0])
            self.inner = Stage(deeper, blocks, level + 1)
            self.norm_up, self.up = SiteNorm(deeper[0]), TransposedConv2d(deeper[0], width)
            self.after = nn.ModuleList(ResidualBlock(width * (2 if i == 0 else 1), width) for i in range(blocks))

    def forward(self, x: Tensor, pyramid: Pyramid) -> Tensor:  # [N_l, C_l] -> [N_l, C_l]
        neighbours = pyramid.submanifold[self.level]
        for block in self.before:
            x = block(x, neighbours)
        if self.inner is not None:
            strided = pyramid.strided[self.level]
            y = self.inner(self.down(F.relu(self.norm_down(x), inplace=True), strided), pyramid)
            y = self.up(F.relu(self.norm_up(y), inplace=True), strided)
            x = torch.cat([x, y], 1)  # [N_l, 2 C_l]
            for block in self.after:
                x = block(x, neighbours)
        return x


class SparseUNet(nn.Module):
    """Features of every selected pixel from the colours of all of them.

    Args:
        in_channels: 3 for RGB.
        channels: C_l by level; as many levels as entries. The paper: 32, 64, ..., 1024 (appendix: up to 512).
        blocks: residual blocks before downsampling, and again after upsampling.
    """

    def __init__(self, in_channels: int, channels: Sequence[int], blocks: int = 2) -> None:
        super().__init__()
        self.stem = SubmanifoldConv2d(in_channels, channels[0])
        self.stage = Stage(tuple(channels), blocks)
        self.norm = SiteNorm(channels[0])

    def forward(self, x: Tensor, pyramid: Pyramid) -> Tensor:
        """[N_0, in_channels] to [N_0, C_0], both in the order of ``pyramid.levels[0]``."""
        y = self.stem(x, pyramid.submanifold[0])
        return F.relu(self.norm(self.stage(y, pyramid)), inplace=True)
