"""2-D sparse convolution in plain torch.

A mask [B, H, W] says which pixels are active.  `Pyramid.build` lists them level by level (`SiteSet`) and
looks up, once a frame, which features meet under which kernel tap (`KernelMap`); the layers
`SubmanifoldConv2d`, `StridedConv2d` and `TransposedConv2d` then work on features [N, C], one row a site, by
chunked gather-GEMM, forward and backward, on any device.  Semantics and weight layout are those of the
official SparseRefine refiner.  Knows nothing of segmentation.
"""

from sparserefine_ros.sparse.conv import sparse_conv, sparse_conv_transposed
from sparserefine_ros.sparse.layers import StridedConv2d, SubmanifoldConv2d, TransposedConv2d
from sparserefine_ros.sparse.maps import STRIDE_MODES, KernelMap, TapGroup, strided, submanifold_map
from sparserefine_ros.sparse.pyramid import Pyramid
from sparserefine_ros.sparse.sites import SiteSet, sites_from_mask

__all__ = [
    "STRIDE_MODES",
    "KernelMap",
    "Pyramid",
    "SiteSet",
    "StridedConv2d",
    "SubmanifoldConv2d",
    "TapGroup",
    "TransposedConv2d",
    "sites_from_mask",
    "sparse_conv",
    "sparse_conv_transposed",
    "strided",
    "submanifold_map",
]
