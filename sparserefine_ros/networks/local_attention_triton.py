"""Local attention on NVIDIA GPUs in Triton: one launch a direction, nothing between input and output in memory.

Its values are checked in Triton's interpreter on the CPU; it has never run on a GPU, nor been timed on one. Before a
first use there a small problem is compared with the plain formulation (`usable`), which stays in place if it differs.

Shape shorthand as in `networks.local_attention`. A program holds one cell's pixels, or one superpixel, for one head in
registers and walks over the 9 neighbours with a running maximum and sum (the softmax of Milakov and Gimelshein, 2018,
"Online normalizer calculation for softmax"). It begins with its own cell, so that the maximum is finite from then on.
The work is 9 multiply-adds for each number that is read, so plain products on vectors do; tiles for tensor cores would
be mostly padding.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparserefine_ros.networks.local_attention import QueryKeyValue, plain_local_attention

# mypy: allow-untyped-defs


@triton.jit
def to_pixels_kernel(
    query, key, value, out, GY, GX, C, scale, P: tl.constexpr, D: tl.constexpr, PB: tl.constexpr, DB: tl.constexpr
):  # fmt: skip
    """Eq. 4: query, out [cells, P, C] of pixels; key, value [cells, C] of superpixels.

    PB, DB are P, D raised to powers of two.
    """
    cell, head = tl.program_id(0), tl.program_id(1)
    row, column = cell // GX % GY, cell % GX
    p, d = tl.arange(0, PB), tl.arange(0, DB)
    at = (cell.to(tl.int64) * P + p)[:, None] * C + head * D + d[None, :]
    live = (p < P)[:, None] & (d < D)[None, :]
    q = tl.load(query + at, mask=live, other=0.0).to(tl.float32) * scale
    top = tl.full([PB], -float("inf"), tl.float32)
    total = tl.zeros([PB], tl.float32)
    sums = tl.zeros([PB, DB], tl.float32)
    for step in tl.static_range(9):
        dy, dx = (step + 4) % 9 // 3 - 1, (step + 4) % 9 % 3 - 1
        inside = (row + dy >= 0) & (row + dy < GY) & (column + dx >= 0) & (column + dx < GX)
        near = (cell + dy * GX + dx).to(tl.int64) * C + head * D + d
        # Bounds of 0 and not masks of one bit, which the interpreter does not broadcast.
        there, seen = tl.where(inside, D, 0), tl.where(inside, PB, 0)
        k = tl.load(key + near, mask=d < there, other=0.0).to(tl.float32)
        v = tl.load(value + near, mask=d < there, other=0.0).to(tl.float32)
        score = tl.where(p < seen, tl.sum(q * k[None, :], 1), -float("inf"))
        higher = tl.maximum(top, score)
        before, weight = tl.exp(top - higher), tl.exp(score - higher)
        total = total * before + weight
        sums = sums * before[:, None] + weight[:, None] * v[None, :]
        top = higher
    tl.store(out + at, (sums / total[:, None]).to(out.dtype.element_ty), mask=live)


@triton.jit
def to_superpixels_kernel(
    query, key, value, out, GY, GX, C, scale, P: tl.constexpr, D: tl.constexpr, PB: tl.constexpr, DB: tl.constexpr
):  # fmt: skip
    """Eq. 3: query, out [cells, C] of superpixels; key, value [cells, P, C] of pixels."""
    cell, head = tl.program_id(0), tl.program_id(1)
    row, column = cell // GX % GY, cell % GX
    p, d = tl.arange(0, PB), tl.arange(0, DB)
    at = cell.to(tl.int64) * C + head * D + d
    q = tl.load(query + at, mask=d < D, other=0.0).to(tl.float32) * scale
    top = -float("inf")
    total = 0.0
    sums = tl.zeros([DB], tl.float32)
    for step in tl.static_range(9):
        dy, dx = (step + 4) % 9 // 3 - 1, (step + 4) % 9 % 3 - 1
        inside = (row + dy >= 0) & (row + dy < GY) & (column + dx >= 0) & (column + dx < GX)
        near = ((cell + dy * GX + dx).to(tl.int64) * P + p)[:, None] * C + head * D + d[None, :]
        seen = tl.where(inside, P, 0)
        live = (p < seen)[:, None] & (d < D)[None, :]
        k = tl.load(key + near, mask=live, other=0.0).to(tl.float32)
        v = tl.load(value + near, mask=live, other=0.0).to(tl.float32)
        score = tl.where(p < seen, tl.sum(q[None, :] * k, 1), -float("inf"))
        higher = tl.maximum(top, tl.max(score, 0))
        before, weight = tl.exp(top - higher), tl.exp(score - higher)
        total = total * before + tl.sum(weight, 0)
        sums = sums * before + tl.sum(weight[:, None] * v, 0)
        top = higher
    tl.store(out + at, (sums / total).to(out.dtype.element_ty), mask=d < D)


MAX_HELD = 2048  # values of one tensor in a program: 16 pixels of 128 channels
INTERPRETED = not isinstance(to_pixels_kernel, triton.runtime.JITFunction)


def local_attention_triton(pixels: QueryKeyValue, superpixels: QueryKeyValue, heads: int) -> tuple[Tensor, Tensor]:
    """As `local_attention`, without gradients."""
    _, gy, gx, count, channels = pixels.query.shape
    width = channels // heads
    pixels = QueryKeyValue(*(x.contiguous() for x in pixels))
    superpixels = QueryKeyValue(*(x.contiguous() for x in superpixels))
    to_pixels, to_superpixels = torch.empty_like(pixels.query), torch.empty_like(superpixels.query)
    blocks = {"PB": triton.next_power_of_2(count), "DB": triton.next_power_of_2(width)}
    common = (gy, gx, channels, width**-0.5, count, width)
    grid = (superpixels.query.shape[0] * gy * gx, heads)
    with torch.cuda.device_of(pixels.query):
        to_pixels_kernel[grid](pixels.query, superpixels.key, superpixels.value, to_pixels, *common, **blocks)
        to_superpixels_kernel[grid](superpixels.query, pixels.key, pixels.value, to_superpixels, *common, **blocks)
    return to_pixels, to_superpixels


def fits(count: int, width: int) -> bool:
    """Whether a program can hold the ``count`` pixels of a cell and ``width`` channels of a head in registers: with
    twice the limit compilers take minutes and spill most of it."""
    return triton.next_power_of_2(count) * triton.next_power_of_2(width) <= MAX_HELD


@cache
def usable(device: torch.device) -> bool:
    """Whether the kernels compile and compute there what the plain formulation does; warns where they do not."""
    if device.type != "cuda" or INTERPRETED:
        return False
    g = torch.Generator().manual_seed(0)
    pixels = QueryKeyValue(*(torch.randn(1, 2, 3, 4, 32, generator=g).to(device) for _ in range(3)))
    superpixels = QueryKeyValue(*(torch.randn(1, 2, 3, 32, generator=g).to(device) for _ in range(3)))
    try:
        actual = local_attention_triton(pixels, superpixels, 2)
        expected = plain_local_attention(pixels, superpixels, 2)
        if all(torch.allclose(a, b, rtol=1e-2, atol=1e-2) for a, b in zip(actual, expected, strict=True)):
            return True
        reason = "it computes wrong values"
    except Exception as error:  # the compiler, the launcher's compiler, the driver: each has errors of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
    warnings.warn(f"local attention on {device} stays in plain torch, as Triton fails there: {reason}", stacklevel=2)
    return False
