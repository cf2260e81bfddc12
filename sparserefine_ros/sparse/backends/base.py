"""What a sparse engine has to do for inference, and how plain torch does it.

Every layer of a refiner is one call of `Backend.conv`: a sparse convolution, optionally plus a 1x1 shortcut, plus
features that are already there, written to one or several places, each with its own normalisation and ReLU. Whatever
an engine fuses, this is the unit it fuses in.

Shape shorthand
    Ni, No      input and output sites of the layer
    Cin, Cout   channels of the convolution
    C2          channels of the shortcut's input
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparserefine_ros.sparse.conv import sparse_conv
from sparserefine_ros.sparse.maps import TAPS, KernelMap
from sparserefine_ros.sparse.pyramid import Pyramid


@dataclass(frozen=True)
class Output:
    """One place where a layer's result goes: ``tensor = relu(scale * sum + shift)``.

    tensor: [No, Cout], written in full; channels are adjacent, rows may be further apart (a slice of a wider buffer).
    scale, shift: [Cout], or None for 1 and 0.
    """

    tensor: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None
    relu: bool = False


class Backend:
    """Plain torch: any device, any floating dtype. The reference for every other engine.

    An engine subclasses this and overrides what it does better. An instance serves one thread at a time.
    """

    name = "torch"
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

    @classmethod
    def missing(cls, device: torch.device) -> str | None:
        """Why this engine cannot run on ``device`` and what would help, or None where it can."""
        return None

    def pyramid(self, mask: Tensor, levels: int, stride: str) -> Pyramid:
        """Sites and maps of ``mask`` [B, H, W] bool; as `Pyramid.build`, tensor for tensor."""
        return Pyramid.build(mask, levels, stride)

    def pack(self, weight: Tensor, shortcut: Tensor | None = None) -> Any:
        """The engine's own layout of ``weight`` [9, Cin, Cout] and ``shortcut`` [C2, Cout]; done once a layer."""
        return weight, shortcut

    def conv(
        self,
        x: Tensor,
        packed: Any,
        kernel_map: KernelMap,
        outputs: Sequence[Output],
        add: Tensor | None = None,
        shortcut: Tensor | None = None,
    ) -> None:
        """Writes sum = sparse_conv(x) + shortcut @ W2 + add to every one of ``outputs``.

        x: [Ni, Cin]; kernel_map: leads from x's sites to the outputs' (for a transposed convolution
        ``map.transposed``); add: [No, Cout]; shortcut: [No, C2], given exactly when its weight was packed.
        Channels of every tensor are adjacent, rows may be further apart. An output may be ``add`` itself
        and overlaps no other input.
        """
        weight, weight2 = packed
        total = self.product(x, weight, kernel_map)
        if shortcut is not None:
            total += shortcut @ weight2
        if add is not None:
            total += add
        for out in outputs:
            y = total
            if out.scale is not None:
                y = y * out.scale
            if out.shift is not None:
                y = y + out.shift
            out.tensor.copy_(y.relu() if out.relu else y)

    def product(self, x: Tensor, weight: Any, kernel_map: KernelMap) -> Tensor:
        """The sparse convolution alone, [Ni, Cin] to a new [No, Cout]: all that an adapter of a library overrides."""
        return sparse_conv(x, weight, kernel_map)


def check_weights(weight: Tensor, shortcut: Tensor | None) -> None:
    """ValueError for weights of another shape, of which a compiled kernel would read past the end."""
    fits = weight.dim() == 3 and weight.shape[0] == TAPS
    if not fits or (shortcut is not None and shortcut.shape[1:] != weight.shape[2:]):
        given = ", ".join(str(list(t.shape)) for t in (weight, shortcut) if t is not None)
        raise ValueError(f"weights have shape {given}: give [{TAPS}, Cin, Cout] and, for a shortcut, [C2, Cout]")
