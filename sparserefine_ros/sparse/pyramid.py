"""All site sets and kernel maps of a sparse U-Net: built once a frame, shared by every layer.

Shape shorthand
    B, H, W  batch, rows, columns of the finest grid
    L        levels; level l has 1/2^l of the resolution
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparserefine_ros.sparse.maps import STRIDE_MODES, KernelMap, strided, submanifold_map
from sparserefine_ros.sparse.sites import SiteSet


@dataclass(frozen=True, eq=False)
class Pyramid:
    """Sites and maps of L levels.

    levels: L site sets, finest first.  A coarse level may be empty: its layers then give [0, C].
    submanifold: L maps for 3x3 convolutions that keep the sites of a level.
    strided: L - 1 maps; strided[l] leads from level l to l + 1.  A transposed convolution back from level
        l + 1 to l takes the same map.
    """

    stride_mode: str
    levels: tuple[SiteSet, ...]
    submanifold: tuple[KernelMap, ...]
    strided: tuple[KernelMap, ...]

    @classmethod
    def build(cls, mask: Tensor, levels: int, stride_mode: str = "dilate") -> Pyramid:
        """Pyramid over the True pixels of ``mask`` [B, H, W] bool, with ``levels`` >= 1 levels.

        stride_mode: "dilate" or "floor", see `strided`.
        Raises ValueError for a mask of another shape or dtype, levels < 1, an unknown mode.
        """
        check_pyramid(levels, stride_mode)
        site_sets = [SiteSet.from_mask(mask)]
        maps = []
        for _ in range(levels - 1):
            coarse, kernel_map = strided(site_sets[-1], stride_mode)
            site_sets.append(coarse)
            maps.append(kernel_map)
        return cls(stride_mode, tuple(site_sets), tuple(map(submanifold_map, site_sets)), tuple(maps))

    def __len__(self) -> int:
        return len(self.levels)


def check_pyramid(levels: int, stride_mode: str) -> None:
    """Raises ValueError for fewer than one level or an unknown mode."""
    if levels < 1:
        raise ValueError(f"levels is {levels}: a pyramid has at least 1")
    if stride_mode not in STRIDE_MODES:
        raise ValueError(f"stride mode {stride_mode!r} is unknown: use one of {', '.join(STRIDE_MODES)}")
