"""Layers over sparse features: 3x3 submanifold, strided and transposed convolution.

Shape shorthand
    N          sites of a level
    Cin, Cout  channels
A layer is given the kernel map of its level (see `Pyramid`); a 1x1 convolution is nn.Linear on the features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sparserefine_ros.sparse.conv import sparse_conv, sparse_conv_transposed
from sparserefine_ros.sparse.maps import TAPS, KernelMap


class _SparseConv2d(nn.Module):
    """Holds the weight [9, Cin, Cout]; the dense one is weight.view(3, 3, Cin, Cout).permute(3, 2, 1, 0)."""

    def __init__(self, cin: int, cout: int, bias: bool = False) -> None:
        super().__init__()
        if cin < 1 or cout < 1:
            raise ValueError(f"channels are {cin} in, {cout} out: both must be at least 1")
        self.cin, self.cout = cin, cout
        self.weight = nn.Parameter(torch.empty(TAPS, cin, cout))
        self.bias = nn.Parameter(torch.empty(cout)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He initialisation for ReLU (He et al. 2015, eq. 10) over a fan-in of 9 * Cin; zero bias."""
        nn.init.normal_(self.weight, std=math.sqrt(2.0 / (TAPS * self.cin)))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"{self.cin}, {self.cout}, bias={self.bias is not None}"


class SubmanifoldConv2d(_SparseConv2d):
    """3x3 convolution whose output sites are its input sites: [N, Cin] -> [N, Cout]."""

    def forward(self, x: Tensor, kernel_map: KernelMap) -> Tensor:
        """kernel_map: `Pyramid.submanifold[level]`.  Raises ValueError as `sparse_conv`."""
        return sparse_conv(x, self.weight, kernel_map, self.bias)


class StridedConv2d(_SparseConv2d):
    """3x3 convolution with stride 2: [N of level l, Cin] -> [N of level l + 1, Cout]."""

    def forward(self, x: Tensor, kernel_map: KernelMap) -> Tensor:
        """kernel_map: `Pyramid.strided[l]`.  Raises ValueError as `sparse_conv`."""
        return sparse_conv(x, self.weight, kernel_map, self.bias)


class TransposedConv2d(_SparseConv2d):
    """Transposed 3x3 convolution with stride 2, onto known sites: [N of l + 1, Cin] -> [N of l, Cout]."""

    def forward(self, x: Tensor, kernel_map: KernelMap) -> Tensor:
        """kernel_map: `Pyramid.strided[l]`, the map that led down.  Raises ValueError as `sparse_conv`."""
        return sparse_conv_transposed(x, self.weight, kernel_map, self.bias)
