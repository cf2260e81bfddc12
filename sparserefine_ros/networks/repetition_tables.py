"""Where the operations of a repeated network read: sites, kernels' taps, corners of interpolations; in plain torch.

Shape shorthand: B images, C channels, h, w the native size of a grid, N its active sites, M sites beyond them that an
operation reads, n outputs of the operation, T inputs that each of them reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sparserefine_ros.sparse import KernelMap, SiteSet, TapGroup
from sparserefine_ros.sparse.backends.base import Backend, Output
from sparserefine_ros.sparse.conv import sparse_conv
from sparserefine_ros.sparse.maps import TAPS

Size = tuple[int, int]
SITES_AT_ONCE = 4096  # whose inputs are laid side by side for a product


class Grid:
    """The active sites of all maps of one size. active: [B, h, w] bool."""

    def __init__(self, active: Tensor) -> None:
        self.active = active
        self.size: Size = (active.shape[1], active.shape[2])
        self.sites = SiteSet.from_mask(active)


def lies_under(active: Tensor, size: Size) -> Tensor:
    """[B, h, w] bool: where one of ``active`` [B, H, W] bool lies under a place of a grid of ``size``; adaptive maximum
    pooling."""
    while all(side % (2 * places) == 0 for side, places in zip(active.shape[1:], size, strict=True)):
        active = active[:, ::2] | active[:, 1::2]
        active = active[:, :, ::2] | active[:, :, 1::2]
    return active if active.shape[1:] == size else F.adaptive_max_pool2d(active.float(), size) > 0


class Form(NamedTuple):
    """Of a convolution; pairs are of rows and columns."""

    kernel: Size
    stride: int
    padding: Size
    dilation: int

    def output(self, size: Size) -> Size:
        """Of an input of ``size``."""
        height, width = (
            (side + 2 * padding - self.dilation * (kernel - 1) - 1) // self.stride + 1
            for side, kernel, padding in zip(size, self.kernel, self.padding, strict=True)
        )
        return height, width


class Rows(NamedTuple):
    """Which row of features lies at each pixel of a grid: its N, then M of sites beyond; N + M where there is none.

    The grid has a border above and to the left, and what else may be read behind.
    """

    beyond: SiteSet  # M
    number: Tensor  # [B tall wide] int32
    tall: int
    wide: int

    @classmethod
    def of(cls, source: Grid, read: Tensor, border: int) -> Rows:
        """Of ``source``, where pixels ``read`` [B, tall, wide] bool are asked for; ``border`` above and to the left."""
        height, width = source.size
        inside = read[:, border : border + height, border : border + width]
        beyond = SiteSet.from_mask(inside & ~source.active)
        active, count = len(source.sites), len(source.sites) + len(beyond)
        number = torch.full((read.numel(),), count, dtype=torch.int32, device=read.device)
        counted = torch.arange(count, dtype=torch.int32, device=read.device)
        for sites, rows in ((source.sites, counted[:active]), (beyond, counted[active:])):
            number[sites.flat_in(read.shape[1], read.shape[2], border)] = rows
        return cls(beyond, number, read.shape[1], read.shape[2])


class Corners:
    """Bilinear interpolation at some sites: four positions of a flattened map each, and their weights.

    at: [n, 4] int64 or int32; weights: [n, 4].
    """

    def __init__(self, at: Tensor, weights: Tensor) -> None:
        self.at, self.weights = at, weights

    def mark(self, read: Tensor) -> None:
        """Sets ``read``, flat bool, where something is read."""
        read[self.at.view(-1)] = True

    def through(self, number: Tensor) -> Corners:
        """The same of rows that lie at the positions, by `Rows.number`."""
        return Corners(number[self.at], self.weights)

    def blend(self, rows: Tensor) -> Tensor:
        """[R, C] to [n, C]; differentiable."""
        return F.embedding_bag(self.at, rows, mode="sum", per_sample_weights=self.weights.to(rows.dtype))


class Engine:
    """The work of a repeated network, in torch, but for 3x3 convolutions on a backend.

    backend: None for torch's convolution, which is differentiable.
    """

    def __init__(self, backend: Backend | None = None) -> None:
        self.backend = backend
        self.packed: dict[int, tuple[Tensor, object]] = {}

    def conv(self, x: Tensor, weight: Tensor, bias: Tensor | None, kernel_map: KernelMap) -> Tensor:
        """As `sparse_conv`, of a weight [Cout, Cin, 3, 3]."""
        if self.backend is None:
            return sparse_conv(x, by_tap(weight), kernel_map, bias)
        kept = self.packed.get(id(weight))
        if kept is None:  # with the weight itself, so that its id stays its own
            kept = self.packed[id(weight)] = (weight, self.backend.pack(by_tap(weight)))
        out = x.new_empty(kernel_map.n_out, weight.shape[0])
        self.backend.conv(x, kept[1], kernel_map, [Output(out, shift=bias)])
        return out

    def conv_any(self, x: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor) -> Tensor:
        """[n, Cout] of rows [R, Cin], a weight [Cout, Cin, height, width], and the rows [n, T] that outputs read, R
        where there is none."""
        x, by_output = _with_zeros(x), by_tap(weight).flatten(0, 1).T
        return torch.cat([F.linear(x[part].flatten(1), by_output, bias) for part in table.split(SITES_AT_ONCE)])

    def conv_by_channel(self, x: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor) -> Tensor:
        """As `conv_any`, each channel by itself: [n, C] of rows [R, C] and a weight [C, 1, height, width]."""
        x = _with_zeros(x)
        out = x.new_zeros(len(table), x.shape[1]) if bias is None else bias.expand(len(table), -1)
        for rows, one in zip(table.unbind(1), by_tap(weight)[:, 0], strict=True):
            out = torch.addcmul(out, x.index_select(0, rows), one)
        return out

    def under(self, source: Grid, target: Grid, form: Form) -> tuple[Rows, Tensor]:
        """What a kernel's taps read of ``source`` at each site of ``target``: rows [n, T] int32, rows fastest."""
        batch, border = len(source.active), max(form.padding)
        taps = [
            [border - padding + tap * form.dilation for tap in range(kernel)]
            for kernel, padding in zip(form.kernel, form.padding, strict=True)
        ]
        # A border saves every bounds check; no tap lies further out than this. Two pixels more: see `kernel_map`.
        tall, wide = (
            max(side + border + 2, (out - 1) * form.stride + along[-1] + 1)
            for side, out, along in zip(source.size, target.size, taps, strict=True)
        )
        read = torch.zeros(batch, tall, wide, dtype=torch.bool, device=source.active.device)
        for y, x in product(*taps):
            rows, columns = (
                slice(tap, tap + (out - 1) * form.stride + 1, form.stride)
                for tap, out in zip((y, x), target.size, strict=True)
            )
            read[:, rows, columns] |= target.active
        found = Rows.of(source, read, border)
        base = target.sites.flat_in(tall, wide, stride=form.stride)
        return found, self.look_up(found.number, base, [y * wide + x for x in taps[1] for y in taps[0]])

    def look_up(self, number: Tensor, base: Tensor, offsets: Sequence[int]) -> Tensor:
        """Entries of ``number`` at ``base`` [n] plus each of T ``offsets``: [n, T] int32."""
        return number[base[:, None] + torch.tensor(offsets, device=base.device)]

    def kernel_map(self, source: Grid, found: Rows, table: Tensor, form: Form) -> KernelMap:
        """Of a 3x3 convolution whose outputs read ``table`` [n, 9]."""
        n_in, n_out, taps = len(source.sites) + len(found.beyond), len(table), tuple(range(TAPS))
        forward = (TapGroup(None, taps, table),)
        if self.backend is not None:
            return KernelMap(n_in, n_out, forward, ())
        # Under each tap an input row meets one output row at most, so that the table can be turned round.
        back = torch.full((n_in + 1, TAPS), n_out, dtype=torch.int32, device=table.device)
        outputs = torch.arange(n_out, dtype=torch.int32, device=table.device)
        for tap in taps:
            back[table[:, tap].long(), tap] = outputs
        return KernelMap(n_in, n_out, forward, (TapGroup(None, taps, back[:-1]),))

    def corners(self, sites: SiteSet, here: Size, there: Size, dtype: torch.dtype) -> Corners:
        """In a map of size ``there``, at ``sites`` of a grid of size ``here``; as F.interpolate, not align_corners."""
        axes, (image, *places) = [], sites.sites.unbind(1)
        for place, size, other in zip(places, here, there, strict=True):
            first, weight = axis(size, other, place.device)
            pair = torch.stack([first, (first + 1).clamp(max=other - 1)], 1)  # [size, 2]
            weights = torch.stack([1 - weight, weight], 1).to(dtype)
            axes.append((pair[place], weights[place]))  # [N, 2] each
        (rows, down), (columns, right) = axes
        base = (image[:, None] * there[0] + rows) * there[1]
        at = (base[:, :, None] + columns[:, None]).flatten(1)
        return Corners(at, (down[:, :, None] * right[:, None]).flatten(1))


def axis(here: int, there: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For every pixel of ``here``: the first of the two of ``there`` around it, int64, and the second's weight."""
    centre = (torch.arange(here, device=device, dtype=torch.float64) + 0.5) * (there / here) - 0.5
    first = centre.clamp(min=0).floor()
    return first.long(), centre.clamp(min=0) - first


def by_tap(weight: Tensor) -> Tensor:
    """A convolution's [Cout, Cin, height, width] as the engine's [T, Cin, Cout]."""
    return weight.permute(3, 2, 1, 0).flatten(0, 1)


def _with_zeros(x: Tensor) -> Tensor:
    """[R + 1, C]: the last row is what lies outside."""
    return torch.cat([x, x.new_zeros(1, x.shape[1])])
