"""The axes of a map in the order in which a network has put them; rows of features stay the same in any.

Attention wants a sequence of places where a convolution wants rows and columns, and channels by head. Written by
letter: b images, h rows, w columns, p = h w places, c = g d channels, g heads, d channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

MAP = "bchw"
HEADS = "bgpd"
"""As `scaled_dot_product_attention` takes queries, keys and values."""
KNOWN = (MAP, "bcp", "bhwc", "bpc", "bpgd", HEADS)
"""What axes may be split and merged to."""


def sizes(axes: str, images: int, channels: int, size: tuple[int, int], heads: int) -> tuple[int, ...]:
    """How long the axes of a map are. size: height and width."""
    height, width = size
    by_letter = {
        "b": images, "c": channels, "h": height, "w": width, "p": height * width, "g": heads, "d": channels // heads,
    }  # fmt: skip
    return tuple(by_letter[axis] for axis in axes)


def reshaped(
    axes: str, shape: Sequence[int], images: int, channels: int, size: tuple[int, int]
) -> tuple[str, int] | None:
    """The axes of a map after ``reshape(shape)``, and into how many heads its channels are split; None where that is
    none of `KNOWN`."""
    known = -math.prod(shape) if -1 in shape else 1
    total = images * channels * math.prod(size)
    shape = tuple(total // max(known, 1) if side == -1 else side for side in shape)
    for candidate in KNOWN:
        if _atoms(candidate) == _atoms(axes) and len(candidate) == len(shape):
            heads = shape[candidate.index("g")] if "g" in candidate else 1
            if heads and channels % heads == 0 and sizes(candidate, images, channels, size, heads) == shape:
                return candidate, heads
    return None


def as_map(x: Tensor, axes: str, size: tuple[int, int]) -> Tensor:
    """``x``, whose axes are ``axes``, as [B, C, h, w]; channels come last in memory where they do not already."""
    if axes == MAP:
        return x
    if "p" in axes:
        x = x.unflatten(axes.index("p"), size)
        axes = axes.replace("p", "hw")
    if "g" in axes:
        x = x.permute([axes.index(axis) for axis in "bhwgd"]).flatten(3)
        axes = "bhwc"
    return x.permute([axes.index(axis) for axis in MAP])


def _atoms(axes: str) -> str:
    return axes.replace("p", "hw").replace("c", "gd")
