"""spconv 2 (Yan et al., 2018) for the matrix products of each layer, on our sites and neighbour maps.

For comparing, and for who trusts the kernels he has: same sites, same order, both strides. It adds nothing of spconv's
own maps or fusion; that is what `benchmarks.spconv_peer` measures. Shape shorthand: as in `base`.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from sparserefine_ros.sparse.backends.base import Backend
from sparserefine_ros.sparse.maps import KernelMap


class SpconvBackend(Backend):
    """float32 and float16; on a CPU with one thread alone, as spconv's CPU build races with more."""

    name = "spconv"
    dtypes = (torch.float32, torch.float16)

    @classmethod
    def missing(cls, device: torch.device) -> str | None:
        if find_spec("spconv") is None:
            return "spconv is not installed (pip install spconv, or spconv-cu126 for CUDA 12)"
        if device.type == "cpu" and torch.get_num_threads() > 1:
            return f"its CPU build is right with one thread only (now {torch.get_num_threads()}); set threads to 1"
        return None

    def pack(self, weight: Tensor, shortcut: Tensor | None = None) -> Any:
        kernel = weight.permute(2, 0, 1).unflatten(1, (3, 3)).contiguous()  # [Cout, 3, 3, Cin], taps in our order
        return kernel, shortcut

    def product(self, x: Tensor, weight: Any, kernel_map: KernelMap) -> Tensor:
        from spconv.pytorch import ops  # imported late: it takes seconds

        if not kernel_map.n_in or not kernel_map.n_out:
            return x.new_zeros(kernel_map.n_out, len(weight))
        pairs, counts = kernel_map.pairs_by_tap
        result: Tensor = ops.indice_conv(x.contiguous(), weight, pairs, counts, kernel_map.n_out)
        return result
