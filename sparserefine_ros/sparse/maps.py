"""Kernel maps: which input row meets which output row under which tap of a 3x3 kernel.

Shape shorthand
    Ni, No  input and output sites
    k       tap, k = kh + 3 * kw, kh and kw in 0..2 (rows fastest: the official SparseRefine weight layout)
    T       taps of a group
An index table holds rows of the input features; "no site" is Ni, the index of a zero row which the
convolution appends.  Everything is looked up in a dense index grid: a 2-D grid is small (8 MB for 2
megapixels), so there is no hashing, no sorting and no `unique`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sparserefine_ros.sparse.sites import SiteSet, coarse_mask

TAPS = 9
STRIDE_PADDING = {"dilate": 0, "floor": 1}
STRIDE_MODES = tuple(STRIDE_PADDING)


@dataclass(frozen=True, eq=False)
class TapGroup:
    """Output rows which meet the same taps.

    rows: [n] int64 output rows, or None for all rows in order.
    taps: the T taps, in the order of the table's columns.
    table: [n, T] int32 input row for each output row and tap; Ni where there is no site.
    count: None, or [1] int32 on the table's device: n and Ni are capacities, and only so many of the rows are in use.
        Of the backends the triton one alone understands it.
    """

    rows: Tensor | None
    taps: tuple[int, ...]
    table: Tensor
    count: Tensor | None = None


@dataclass(frozen=True, eq=False)
class KernelMap:
    """The pairs (input row, output row, tap) of one convolution, ready to be gathered in both directions.

    n_in, n_out: rows of the input and of the output features.
    forward: groups which together cover every output row once; their tables hold input rows.
    backward: the same pairs seen from the input: they cover every input row once and hold output rows.
    """

    n_in: int
    n_out: int
    forward: tuple[TapGroup, ...]
    backward: tuple[TapGroup, ...]

    @cached_property
    def transposed(self) -> KernelMap:
        """The same pairs with input and output exchanged (the map of the transposed convolution)."""
        return KernelMap(self.n_out, self.n_in, self.backward, self.forward)

    @cached_property
    def pairs_by_tap(self) -> tuple[Tensor, Tensor]:
        """The pairs tap by tap, as gather-scatter libraries want them.  Synchronises CUDA.

        Returns [2, 9, P] int32 (input row, output row), -1 behind the last pair of a tap; counts [9] int32.
        """
        table = self.out_to_in  # [No, 9]
        tap, out = torch.nonzero((table != self.n_in).T, as_tuple=True)
        counts = torch.bincount(tap, minlength=TAPS)
        position = torch.arange(len(tap), device=tap.device) - (counts.cumsum(0) - counts)[tap]
        pairs = table.new_full((2, TAPS, int(counts.max())), -1)
        pairs[0, tap, position] = table[out, tap]
        pairs[1, tap, position] = out.int()
        return pairs, counts.int()

    @property
    def out_to_in(self) -> Tensor:
        """[No, 9] int32: input row for each output row and tap, Ni where none."""
        return _full_table(self.forward, self.n_out, self.n_in)

    @property
    def pairs(self) -> int:
        """Number of pairs; a convolution costs pairs * Cin * Cout multiply-adds.  Synchronises CUDA."""
        return sum(int((group.table != self.n_in).sum()) for group in self.forward)


def submanifold_map(sites: SiteSet) -> KernelMap:
    """3x3 submanifold convolution: output sites are the input sites, in = out + (kh - 1, kw - 1)."""
    width = sites.shape[2] + 2
    centre = sites.flat_in(sites.shape[1] + 2, width, border=1)
    offsets = [(k % 3 - 1) * width + (k // 3 - 1) for k in range(TAPS)]
    table = _look_up(sites.bordered_grid, centre, offsets)
    taps = tuple(range(TAPS))
    # Seen from the input every offset has the opposite sign, so the same table serves with the taps reversed.
    return KernelMap(len(sites), len(sites), (TapGroup(None, taps, table),), (TapGroup(None, taps[::-1], table),))


def strided(sites: SiteSet, stride_mode: str = "dilate") -> tuple[SiteSet, KernelMap]:
    """Coarse sites and kernel map of a 3x3 convolution with stride 2, in = 2 * out + (kh, kw) - padding.

    "dilate" (padding 0; TorchSparse 2.1's default, hence the official SparseRefine weights): an output site
    is every o whose window {2o .. 2o+2}^2 holds a site, 0 <= o <= (max_in - 2) // 2 on each axis, where
    max_in is the largest coordinate in the whole batch.  The coarse grid is [B, (H - 1) // 2, (W - 1) // 2],
    as of conv2d(stride=2).
    "floor" (padding 1; MinkowskiEngine's coordinates): o = floor(i / 2).  The coarse grid is
    [B, (H + 1) // 2, (W + 1) // 2], as of conv2d(stride=2, padding=1).

    Raises ValueError for another mode.
    """
    if stride_mode not in STRIDE_PADDING:
        raise ValueError(f"stride mode {stride_mode!r} is unknown: use one of {', '.join(STRIDE_MODES)}")
    padding = STRIDE_PADDING[stride_mode]
    coarse = SiteSet.from_mask(coarse_mask(sites, padding))
    kernel_map = KernelMap(
        len(sites),
        len(coarse),
        (_strided_group(sites, coarse, padding),),
        _parity_groups(sites, coarse, padding),
    )
    return coarse, kernel_map


def _strided_group(fine: SiteSet, coarse: SiteSet, padding: int) -> TapGroup:
    """Fine rows under each coarse site's window, [No, 9]."""
    height, width = fine.shape[1] + 2, fine.shape[2] + 2
    batch, row, column = coarse.sites.unbind(1)
    first = (batch * height + (2 * row + 1 - padding)) * width + (2 * column + 1 - padding)
    offsets = [k % 3 * width + k // 3 for k in range(TAPS)]
    return TapGroup(None, tuple(range(TAPS)), _look_up(fine.bordered_grid, first, offsets))


def _parity_groups(fine: SiteSet, coarse: SiteSet, padding: int) -> tuple[TapGroup, ...]:
    """Coarse rows over each fine site, grouped by the parity of (row, column).

    o = (i + padding - k) / 2 is whole for even i + padding under taps 0 and 2 only, for odd under tap 1 only:
    of a 2x2 block of fine sites one meets 4 taps, two meet 2 and one meets 1.  No tap that cannot be met is
    computed.
    """
    height, width = coarse.shape[1] + 2, coarse.shape[2] + 2
    batch, row, column = fine.sites.unbind(1)
    shifted_row, shifted_column = row + padding, column + padding
    parity = (shifted_row & 1) * 2 + (shifted_column & 1)
    # The tap 0 partner, in the bordered grid; taps further on lie one coarse pixel before.
    base = (batch * height + (shifted_row >> 1) + 1) * width + (shifted_column >> 1) + 1
    groups = []
    for row_parity in (0, 1):
        for column_parity in (0, 1):
            rows = torch.nonzero(parity == row_parity * 2 + column_parity).view(-1)
            row_taps = (1,) if row_parity else (0, 2)
            column_taps = (1,) if column_parity else (0, 2)
            taps = tuple(kh + 3 * kw for kw in column_taps for kh in row_taps)
            offsets = [-(k % 3 // 2) * width - k // 3 // 2 for k in taps]
            groups.append(TapGroup(rows, taps, _look_up(coarse.bordered_grid, base[rows], offsets)))
    return tuple(groups)


def _look_up(grid: Tensor, base: Tensor, offsets: list[int]) -> Tensor:
    """Entries of a bordered ``grid`` at ``base`` [n] + each of T ``offsets``, [n, T] int32."""
    shift = torch.stack([base.new_full((), offset) for offset in offsets])  # torch.tensor would make a GPU's host wait
    positions = base[:, None] + shift
    return grid.view(-1).index_select(0, positions.view(-1)).view(positions.shape)


def _full_table(groups: tuple[TapGroup, ...], rows: int, none: int) -> Tensor:
    table = torch.full((rows, TAPS), none, dtype=torch.int32, device=groups[0].table.device)
    for group in groups:
        for tap, column in zip(group.taps, group.table.unbind(1), strict=True):
            table[slice(None) if group.rows is None else group.rows, tap] = column
    return table
