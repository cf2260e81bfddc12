"""Attention between pixels and the superpixels around them, both ways (Superpixel Transformers, Eqs. 3 and 4).

Shape shorthand
    B images, C channels of all heads together, D = C / heads
    Gy, Gx    the grid of superpixels, each over one cell of the image
    P         pixels of a cell, row by row; pixel features are kept cell by cell, [B, Gy, Gx, P, C]
    9         the 3x3 neighbourhood of a cell, row by row: neighbour 3 dy + dx lies dy - 1 rows and dx - 1 columns away

A pixel sees the 9 superpixels around its cell; a superpixel sees the 9 P pixels of the cells around its own. Unfolding
one side for the other, as the paper's own implementation does, writes every pixel or superpixel 9 times. Here both
directions are made of three products that keep to the pixels' cells and read every pixel once:

    score   what each pixel of a cell scores with each of the 9 superpixels around it     [B, heads, Gy, Gx, P, 9]
    spread  what the 9 superpixels give each pixel, by weights of that shape              [B, Gy, Gx, P, C]
    gather  what the pixels of 9 cells give each superpixel, by weights of that shape     [B, Gy, Gx, C]

They are each other's derivatives, so a backward pass is made of the same three and keeps no more than their inputs. The
softmax over a superpixel's 9 P pixels needs no pixels at all: its sum is taken within each cell first, then over the 9
cells, on maps of [Gy, Gx, 9]. Superpixels are read in blocks of a few rows; what stands in memory nine times is such a
block, sized for a cache, and never the grid.

Floor at 1024x2048 (32x64 superpixels over 4x4 pixels each, C 256, float32): 0.30 G multiply-adds (both directions,
scores and sums of 9 x 32768 x 256 each) and 142 MB (three pixel tensors read, one written, four superpixel tensors):
10 ms of arithmetic at 60 GFLOP/s, 14 ms at 10 GB/s. Unfolding writes, and reads again, 2 x 302 MB of pixels more.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from sparserefine_ros.networks.exporting import exporting, windows

BLOCK_BYTES = {"cpu": 1 << 19}  # neighbours held at a time: half of a usual second-level cache
DEVICE_BLOCK_BYTES = 1 << 26  # elsewhere few and large products count


class QueryKeyValue(NamedTuple):
    """Of pixels, each [B, Gy, Gx, P, C], or of superpixels, each [B, Gy, Gx, C]."""

    query: Tensor
    key: Tensor
    value: Tensor


def local_attention(pixels: QueryKeyValue, superpixels: QueryKeyValue, heads: int) -> tuple[Tensor, Tensor]:
    """What Eq. 4 adds to the pixels [B, Gy, Gx, P, C] and Eq. 3 to the superpixels [B, Gy, Gx, C].

    Products are scaled by 1 / sqrt(D). Superpixels outside the grid, and their pixels, get no weight. Where no
    gradients are wanted, a GPU with Triton has kernels for it.
    """
    tensors = (*pixels, *superpixels)
    if pixels.query.is_cuda and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        kernels = _kernels()
        count, channels = pixels.query.shape[3:]
        if kernels is not None and kernels.fits(count, channels // heads) and kernels.usable(pixels.query.device):
            result: tuple[Tensor, Tensor] = kernels.local_attention_triton(pixels, superpixels, heads)
            return result
    return plain_local_attention(pixels, superpixels, heads)


def plain_local_attention(pixels: QueryKeyValue, superpixels: QueryKeyValue, heads: int) -> tuple[Tensor, Tensor]:
    """`local_attention` in torch alone: any device, with gradients."""
    scale = (pixels.query.shape[-1] // heads) ** -0.5
    weights = over_superpixels(score(pixels.query, superpixels.key * scale, heads))
    to_pixels = spread(weights.to(superpixels.value.dtype), superpixels.value)
    weights = over_pixels(score(pixels.key, superpixels.query * scale, heads))
    return to_pixels, gather(weights.to(pixels.value.dtype), pixels.value)


def over_superpixels(scores: Tensor) -> Tensor:
    """Softmax of every pixel's 9 scores, in float32 or wider; weights of the same shape."""
    return (at_least_float32(scores) + outside(scores)[..., None, :]).softmax(-1)


def over_pixels(scores: Tensor) -> Tensor:
    """Softmax of every superpixel's 9 P scores, in float32 or wider; weights of the same shape."""
    scores = at_least_float32(scores)
    by_cell = F.pad(scores.logsumexp(-2), (0, 0, 1, 1, 1, 1), value=-torch.inf)  # [B, heads, Gy + 2, Gx + 2, 9]
    rows, columns = scores.shape[2:4]
    # The cell that has a superpixel as its neighbour (dy, dx) lies the same way back.
    seen = [
        by_cell[:, :, 2 - dy : 2 - dy + rows, 2 - dx : 2 - dx + columns, 3 * dy + dx]
        for dy in range(3)
        for dx in range(3)
    ]
    total = torch.stack(seen, -1).logsumexp(-1)  # [B, heads, Gy, Gx]
    return (scores - around(total, torch.inf)[..., None, :]).exp()


def around(grid: Tensor, value: float = 0.0) -> Tensor:
    """The 9 neighbours [..., Gy, Gx, 9] of every cell of ``grid`` [..., Gy, Gx]; ``value`` outside the grid."""
    padded = F.pad(grid, (1, 1, 1, 1), value=value)
    if exporting():
        return windows(windows(padded, -2, 3), -2, 3).flatten(-2)
    return padded.unfold(-2, 3, 1).unfold(-2, 3, 1).flatten(-2)


def outside(scores: Tensor) -> Tensor:
    """0 for neighbours inside the grid and -inf for those outside, [1, 1, Gy, Gx, 9], for ``scores``."""
    return around(torch.zeros(1, 1, *scores.shape[2:4], device=scores.device), -torch.inf)


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def score(x: Tensor, y: Tensor, heads: int) -> Tensor:
    """Products [B, heads, Gy, Gx, P, 9] of pixels ``x`` with the superpixels ``y`` around them; 0 outside the grid."""
    if exporting():
        return _by_head(x, heads) @ _by_head(neighbours(y), heads).transpose(-2, -1)
    dtype = torch.promote_types(x.dtype, y.dtype)  # under autocast they may differ
    scores: Tensor = _Score.apply(x.to(dtype).contiguous(), y.to(dtype).contiguous(), heads)
    return scores


def spread(weights: Tensor, y: Tensor) -> Tensor:
    """Sums [B, Gy, Gx, P, C] over the superpixels ``y`` around each pixel, by ``weights`` [B, heads, Gy, Gx, P, 9]."""
    if exporting():
        return _together(weights @ _by_head(neighbours(y), weights.shape[1]))
    sums: Tensor = _Spread.apply(weights.contiguous(), y.contiguous())
    return sums


def gather(weights: Tensor, x: Tensor) -> Tensor:
    """Sums [B, Gy, Gx, C] over the pixels ``x`` around each superpixel, by ``weights`` [B, heads, Gy, Gx, P, 9]."""
    if exporting():
        near = _together(
            weights.transpose(-2, -1) @ _by_head(x, weights.shape[1])
        )  # [B, Gy, Gx, 9, C]: what each cell has to give
        rows, columns = near.shape[1:3]
        padded = F.pad(near, (0, 0, 0, 0, 1, 1, 1, 1))
        # The cell that has a superpixel as its neighbour (dy, dx) lies the same way back.
        parts = [padded[:, 2 - n // 3 :, 2 - n % 3 :, n][:, :rows, :columns] for n in range(9)]
        return torch.stack(parts).sum(0)
    sums: Tensor = _Gather.apply(weights.contiguous(), x.contiguous())
    return sums


def neighbours(y: Tensor) -> Tensor:
    """The 9 neighbours [B, Gy, Gx, 9, C] of every cell of ``y`` [B, Gy, Gx, C]; 0 outside. For exports: all at once."""
    return around(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 4, 1)


def _by_head(x: Tensor, heads: int) -> Tensor:
    """[B, Gy, Gx, P, C] to [B, heads, Gy, Gx, P, D]."""
    return x.reshape(*x.shape[:4], heads, -1).permute(0, 4, 1, 2, 3, 5)


def _together(x: Tensor) -> Tensor:
    """[B, heads, Gy, Gx, P, D] to [B, Gy, Gx, P, C]."""
    return x.permute(0, 2, 3, 4, 1, 5).flatten(4)


class _Score(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, heads: int) -> Tensor:
        ctx.save_for_backward(x, y)
        out = x.new_empty(x.shape[0], heads, *x.shape[1:4], 9)
        for b, rows, near in _neighbours(y):
            for head, part in enumerate(_heads(x.shape[-1], heads)):
                # Not by out=, which does not take the dtype that autocast gives a product.
                _cells(out[:, head], b, rows).copy_(torch.bmm(_cells(x, b, rows)[..., part], near[..., part].mT))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        wants_x, wants_y, _ = ctx.needs_input_grad
        return spread(grads[0], y) if wants_x else None, gather(grads[0], x) if wants_y else None, None


class _Spread(Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(weights, y)
        heads, cells, channels = weights.shape[1], weights.shape[2:5], y.shape[-1]
        out = y.new_empty(y.shape[0], *cells, channels)
        for b, rows, near in _neighbours(y):
            for head, part in enumerate(_heads(channels, heads)):
                # A batched product written into columns of a wider tensor would run one matrix at a time.
                _cells(out, b, rows)[..., part] = torch.bmm(_cells(weights[:, head], b, rows), near[..., part])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weights, y = ctx.saved_tensors
        wants_weights, wants_y = ctx.needs_input_grad
        return (
            score(grads[0], y, weights.shape[1]) if wants_weights else None,
            gather(weights, grads[0]) if wants_y else None,
        )


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(weights, x)
        batch, rows_all, columns, _, channels = x.shape
        wide = torch.promote_types(x.dtype, torch.float32)
        out = x.new_zeros(batch, rows_all + 2, columns + 2, channels, dtype=wide)  # with a border to be cut off
        for b, rows in _blocks(x[:, :, :, 0]):
            height = rows.stop - rows.start
            near = x.new_empty(height * columns, 9, channels)
            for head, part in enumerate(_heads(channels, weights.shape[1])):
                near[..., part] = torch.bmm(_cells(weights[:, head], b, rows).mT, _cells(x, b, rows)[..., part])
            for n, share in enumerate(near.view(height, columns, 9, channels).unbind(2)):
                dy, dx = divmod(n, 3)
                out[b, rows.start + dy : rows.stop + dy, dx : dx + columns] += share
        return out[:, 1:-1, 1:-1].to(x.dtype).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weights, x = ctx.saved_tensors
        wants_weights, wants_x = ctx.needs_input_grad
        return (
            score(x, grads[0], weights.shape[1]) if wants_weights else None,
            spread(weights, grads[0]) if wants_x else None,
        )


@cache
def _kernels() -> ModuleType | None:
    """The module of the Triton kernels, or None where Triton is not installed."""
    try:
        from sparserefine_ros.networks import local_attention_triton
    except ImportError:
        return None
    return local_attention_triton


def _neighbours(y: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
    """Blocks of ``y`` [B, Gy, Gx, C]: the image, the rows, and the neighbours [cells, 9, C] of the cells there."""
    windows = F.pad(y, (0, 0, 1, 1, 1, 1)).unfold(1, 3, 1).unfold(2, 3, 1).permute(0, 1, 2, 4, 5, 3)
    for b, rows in _blocks(y):
        yield b, rows, windows[b, rows].reshape(-1, 9, y.shape[-1])


def _blocks(y: Tensor) -> Iterator[tuple[int, slice]]:
    """Images and rows of ``y`` [B, Gy, Gx, C] such that the neighbours of a block fit into BLOCK_BYTES."""
    batch, rows, columns, channels = y.shape
    fit = BLOCK_BYTES.get(y.device.type, DEVICE_BLOCK_BYTES) // (9 * columns * channels * y.element_size())
    for b in range(batch):
        for first in range(0, rows, max(1, fit)):
            yield b, slice(first, min(first + max(1, fit), rows))


def _cells(x: Tensor, b: int, rows: slice) -> Tensor:
    """Rows of one image of ``x`` [B, Gy, Gx, P, ...] as a batch of cells [cells, P, ...], a view."""
    return x[b, rows].flatten(0, 1)


def _heads(channels: int, heads: int) -> list[slice]:
    width = channels // heads
    return [slice(head * width, (head + 1) * width) for head in range(heads)]
