"""The active pixels of a sparse tensor.

Shape shorthand
    B     images in the batch
    H, W  rows and columns of the grid the sites lie on
    N     sites (active pixels of the whole batch)
    C     channels
A site is (batch, row, column).  Sites are always in lexicographic order, which is the memory order of a
[B, H, W] grid: a site's neighbours in a row are neighbours in memory, and no sorting is ever needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F


def check_mask(mask: Tensor) -> None:
    """Raises ValueError where the mask is not three-dimensional or not bool."""
    if mask.dim() != 3:
        raise ValueError(f"mask has shape {tuple(mask.shape)}: give [B, H, W] (one image: mask[None])")
    if mask.dtype != torch.bool:
        raise ValueError(f"mask has dtype {mask.dtype}: give torch.bool (for example entropy > threshold)")


def sites_from_mask(mask: Tensor) -> Tensor:
    """Active pixels of ``mask`` [B, H, W] bool, as [N, 3] int64 (batch, row, column), lexicographic.

    Raises ValueError where the mask is not three-dimensional or not bool.
    """
    check_mask(mask)
    return torch.nonzero(mask)


@dataclass(frozen=True, eq=False)
class SiteSet:
    """Active pixels together with the grid they lie on.

    sites: [N, 3] int64 (batch, row, column), lexicographic and unique.
    shape: (B, H, W) of the grid.  H or W may be 0 at the coarse end of a pyramid.
    """

    sites: Tensor
    shape: tuple[int, int, int]

    @classmethod
    def from_mask(cls, mask: Tensor) -> SiteSet:
        """The True pixels of ``mask`` [B, H, W] bool.  Raises ValueError for another shape or dtype."""
        sites = sites_from_mask(mask)
        batch, height, width = mask.shape
        return cls(sites, (batch, height, width))

    @classmethod
    def of(cls, sites: Tensor, shape: tuple[int, int, int], flat: Tensor, bordered_grid: Tensor) -> SiteSet:
        """For who has computed ``flat`` and ``bordered_grid`` already."""
        result = cls(sites, shape)
        result.__dict__.update(flat=flat, bordered_grid=bordered_grid)  # where cached_property keeps them
        return result

    def __len__(self) -> int:
        return self.sites.shape[0]

    @property
    def device(self) -> torch.device:
        return self.sites.device

    @cached_property
    def flat(self) -> Tensor:
        """[N] int64: position of every site in a flattened [B, H, W] grid."""
        return self.flat_in(self.shape[1], self.shape[2])

    @cached_property
    def bordered_grid(self) -> Tensor:
        """[B, H + 2, W + 2] int32: row of each site's features, N where there is none.

        One empty pixel all round saves every bounds check: the neighbours of any site can be looked up.  N is
        the index of the zero row that `sparse_conv` appends to the features.
        """
        batch, height, width = self.shape
        grid = torch.full((batch, height + 2, width + 2), len(self), dtype=torch.int32, device=self.device)
        rows = torch.arange(len(self), dtype=torch.int32, device=self.device)
        grid.view(-1)[self.flat_in(height + 2, width + 2, border=1)] = rows
        return grid

    @property
    def mask(self) -> Tensor:
        """[B, H, W] bool: True at the sites."""
        return self.bordered_grid[:, 1:-1, 1:-1] < len(self)

    def flat_in(self, height: int, width: int, border: int = 0, stride: int = 1) -> Tensor:
        """[N] int64: position in a flattened [B, height, width] grid, ``border`` pixels further in.

        stride: what rows and columns are multiplied with before.
        """
        batch, row, column = self.sites.unbind(1)
        return (batch * height + (row * stride + border)) * width + (column * stride + border)

    def gather(self, dense: Tensor) -> Tensor:
        """Values of ``dense`` [B, C, H, W] at the sites, [N, C] contiguous.  Differentiable.

        Raises ValueError where ``dense`` does not lie on this grid.
        """
        batch, height, width = self.shape
        if dense.dim() != 4 or (dense.shape[0], dense.shape[2], dense.shape[3]) != self.shape:
            raise ValueError(
                f"dense tensor has shape {tuple(dense.shape)}, but the sites lie on a grid of {self.shape}: "
                f"give [{batch}, C, {height}, {width}]"
            )
        row_major = dense.permute(0, 2, 3, 1).reshape(-1, dense.shape[1])
        return row_major.index_select(0, self.flat)

    def scatter(self, features: Tensor, fill: float = 0.0) -> Tensor:
        """A dense [B, C, H, W] tensor (channels-last memory) with ``features`` [N, C] at the sites.

        Everything else is ``fill``.  Differentiable.  Raises ValueError where the row count is not N.
        """
        if features.dim() != 2 or features.shape[0] != len(self):
            raise ValueError(f"features have shape {tuple(features.shape)}: give [{len(self)}, C], a row a site")
        batch, height, width = self.shape
        dense = features.new_full((batch * height * width, features.shape[1]), fill)
        dense = dense.index_copy(0, self.flat, features)
        return dense.view(batch, height, width, features.shape[1]).permute(0, 3, 1, 2)


def coarse_mask(sites: SiteSet, padding: int) -> Tensor:
    """Active pixels after a 3x3 stride-2 convolution, [B, H', W'] bool.

    Floor coordinates (padding 1): o = floor(i / 2).  Dilating coordinates (padding 0): every o whose window
    {2o .. 2o+2} holds a site, 0 <= o <= (largest site coordinate of the batch - 2) // 2 on each axis.
    """
    batch, height, width = sites.shape
    coarse_height, coarse_width = ((size - 1 + 2 * padding) // 2 for size in (height, width))
    if coarse_height < 1 or coarse_width < 1 or len(sites) == 0:
        empty = (batch, max(0, coarse_height), max(0, coarse_width))
        return torch.zeros(empty, dtype=torch.bool, device=sites.device)
    if padding == 1:
        return _or_windows(F.pad(sites.mask, (0, width % 2, 0, height % 2)), size=2)
    coarse = _or_windows(sites.mask, size=3)
    limit = (sites.sites[:, 1:].amax(0) - 2) // 2
    coarse &= (torch.arange(coarse_height, device=sites.device) <= limit[0])[:, None]
    coarse &= torch.arange(coarse_width, device=sites.device) <= limit[1]
    return coarse


def _or_windows(mask: Tensor, size: int) -> Tensor:
    """OR over size x size windows, stride 2: [B, H, W] -> [B, (H - size) // 2 + 1, (W - size) // 2 + 1]."""
    for axis in (1, 2):
        length = 2 * ((mask.shape[axis] - size) // 2) + 1
        first, *others = (mask.narrow(axis, k, length) for k in range(size))
        stride = (slice(None),) * axis + (slice(None, None, 2),)
        mask = first[stride].clone()
        for other in others:
            mask |= other[stride]
    return mask
