"""What the sparse engine is measured on."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparserefine_ros.benchmarks.masks import edge_mask
from sparserefine_ros.networks.unet import SparseUNet


@dataclass(frozen=True)
class Case:
    """The defaults are the network of the paper's appendix on a Cityscapes frame."""

    size: tuple[int, int] = (1024, 2048)
    density: float = 0.118
    channels: tuple[int, ...] = (32, 64, 128, 256, 512)
    blocks: int = 2
    stride: str = "dilate"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32

    def unet(self) -> SparseUNet:
        torch.manual_seed(0)
        return SparseUNet(3, self.channels, self.blocks).eval().to(self.device)

    def mask(self) -> Tensor:
        return edge_mask(*self.size, self.density).to(self.device)

    def colours(self, sites: int) -> Tensor:
        return torch.randn(sites, 3, generator=torch.Generator().manual_seed(1)).to(self.device, self.dtype)
