"""All sites and kernel maps of a pyramid on the GPU, with one host synchronisation a frame.

Shape shorthand
    L           levels; level l has the grid [B, H_l, W_l] and N_l sites
    p           padding of the strided convolutions: 0 for "dilate", 1 for "floor"
The presence of every pixel of every level lies in one flat array, and behind it once more for the levels which are
raised to, sorted by parity of (row + p, column + p). One prefix sum over all of it numbers the sites of each level and
the rows of each parity group; its values at the ends of the sections are all counts, read back at once. One kernel a
level then writes what that level's sites look up. Tables lie in memory as [T, n]: a tap's column is read in one go.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparserefine_ros.sparse.maps import STRIDE_PADDING, TAPS, KernelMap, TapGroup
from sparserefine_ros.sparse.pyramid import Pyramid
from sparserefine_ros.sparse.sites import SiteSet

# mypy: allow-untyped-defs

BLOCK = 1024
PARITIES = 4
PARITY_TAPS = tuple(
    tuple(kh + 3 * kw for kw in column_taps for kh in row_taps)
    for row_taps in ((0, 2), (1,))
    for column_taps in ((0, 2), (1,))
)
"""Taps that rows of each parity meet, even + even first; see `maps`."""


@triton.jit
def mark_kernel(
    mask,  # the finest level's pixels, uint8
    present,  # all levels' pixels, uint8; zero where nothing is written
    largest,  # [L, 2] int32: largest row and column of a site; -1 at first
    fine_start,  # where the next finer level starts in present
    start,
    parity_start,
    level,
    batch,
    fine_height,
    fine_width,
    height,
    width,
    half_height,  # of a parity's pixels
    half_width,
    PADDING: tl.constexpr,
    FINEST: tl.constexpr,
    RAISED: tl.constexpr,  # has a coarser level
    BLOCK: tl.constexpr,
):
    """Presence of a level's pixels, from the mask or from the next finer level."""
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < batch * height * width
    column = pixel % width
    row = pixel // width % height
    image = pixel // width // height
    if FINEST:
        here = tl.load(mask + pixel, mask=inside, other=0) != 0
    else:
        here = pixel < 0
        for k in tl.static_range((3 - PADDING) * (3 - PADDING)):
            fine_row = 2 * row + k // (3 - PADDING)
            fine_column = 2 * column + k % (3 - PADDING)
            exists = inside & (fine_row < fine_height) & (fine_column < fine_width)
            position = fine_start + (image * fine_height + fine_row) * fine_width + fine_column
            here = here | (tl.load(present + position, mask=exists, other=0) != 0)
        if PADDING == 0:
            here = here & (row <= (tl.load(largest + 2 * level - 2) - 2) >> 1)
            here = here & (column <= (tl.load(largest + 2 * level - 1) - 2) >> 1)
    tl.store(present + start + pixel, here.to(tl.uint8), mask=inside)
    if RAISED:
        parity = ((row + PADDING) & 1) * 2 + ((column + PADDING) & 1)
        half_row = (row + PADDING) >> 1
        half_column = (column + PADDING) >> 1
        position = ((parity * batch + image) * half_height + half_row) * half_width + half_column
        tl.store(present + parity_start + position, here.to(tl.uint8), mask=inside)
        if PADDING == 0:
            tl.atomic_max(largest + 2 * level, tl.max(tl.where(here, row, -1), 0))
            tl.atomic_max(largest + 2 * level + 1, tl.max(tl.where(here, column, -1), 0))


@triton.jit
def _row_of(present, running, start, before, height, width, image, row, column, wanted, none):
    """Row of the site at (image, row, column) of a level with ``before`` sites in the levels before; else ``none``."""
    inside = wanted & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    position = start + (image * height + row) * width + column
    here = tl.load(present + position, mask=inside, other=0) != 0
    return tl.where(here, tl.load(running + position, mask=here, other=0) - 1 - before, none)


@triton.jit(do_not_specialize=["before", "fine_before", "coarse_before", "parity_before", "n", "fine_n", "coarse_n"]
            + ["n0", "n1", "n2", "n3"])  # fmt: skip
def tables_kernel(
    present,
    running,  # prefix sum over present, int32
    sites,  # [n, 3] int64
    neighbours,  # [9, n] int32
    window,  # [9, n] int32: rows of the next finer level
    raised_rows,  # [n] int64: this level's rows by parity
    raised,  # int32, the parities' tables [T, n_parity] of rows of the next coarser level, one after the other
    start,
    fine_start,
    coarse_start,
    parity_start,
    before,
    fine_before,
    coarse_before,
    parity_before,
    n,
    fine_n,
    coarse_n,
    n0,
    n1,
    n2,
    n3,
    batch,
    height,
    width,
    fine_height,
    fine_width,
    coarse_height,
    coarse_width,
    half_height,
    half_width,
    PADDING: tl.constexpr,
    FINEST: tl.constexpr,
    RAISED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All that the sites of one level look up, written in their order."""
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < batch * height * width
    here = tl.load(present + start + pixel, mask=inside, other=0) != 0
    own = tl.load(running + start + pixel, mask=here, other=1) - 1 - before
    column = pixel % width
    row = pixel // width % height
    image = pixel // width // height
    site = sites + own.to(tl.int64) * 3
    tl.store(site, image.to(tl.int64), mask=here)
    tl.store(site + 1, row.to(tl.int64), mask=here)
    tl.store(site + 2, column.to(tl.int64), mask=here)
    for k in tl.static_range(9):
        found = _row_of(
            present, running, start, before, height, width, image, row + k % 3 - 1, column + k // 3 - 1, here, n
        )
        tl.store(neighbours + k * n + own, found, mask=here)
        if not FINEST:
            fine_row = 2 * row + k % 3 - PADDING
            fine_column = 2 * column + k // 3 - PADDING
            found = _row_of(
                present, running, fine_start, fine_before, fine_height, fine_width, image, fine_row, fine_column, here,
                fine_n,
            )  # fmt: skip
            tl.store(window + k * n + own, found, mask=here)
    if RAISED:
        odd_row = (row + PADDING) & 1
        odd_column = (column + PADDING) & 1
        parity = odd_row * 2 + odd_column
        half_row = (row + PADDING) >> 1
        half_column = (column + PADDING) >> 1
        position = parity_start + ((parity * batch + image) * half_height + half_row) * half_width + half_column
        place = tl.load(running + position, mask=here, other=1) - 1 - parity_before
        tl.store(raised_rows + place, own.to(tl.int64), mask=here)
        # Rows of a parity, where they start among all, and where its table starts behind those of 4, 2 and 2 taps.
        count = tl.where(parity == 0, n0, tl.where(parity == 1, n1, tl.where(parity == 2, n2, n3)))
        first = tl.where(parity == 0, 0, tl.where(parity == 1, n0, tl.where(parity == 2, n0 + n1, n0 + n1 + n2)))
        table = tl.where(parity == 0, 0, tl.where(parity == 1, 4 * n0, 4 * n0 + 2 * tl.where(parity == 2, n1, n1 + n2)))
        for k in tl.static_range(4):
            up = k % 2
            left = k // 2
            meets = here & (odd_row * up == 0) & (odd_column * left == 0)
            found = _row_of(
                present, running, coarse_start, coarse_before, coarse_height, coarse_width, image, half_row - up,
                half_column - left, meets, coarse_n,
            )  # fmt: skip
            tap = left * (2 - odd_row) + up
            tl.store(raised + table + tap * count + place - first, found, mask=meets)


@dataclass(frozen=True, eq=False)
class Plan:
    """Where everything lies for masks of one shape.

    shapes: L grids (H, W). halves: L (H, W) of a parity's pixels. starts, parity_starts: L positions in the flat array,
    of which the last level has no parities. size: of the flat array. ends: [L + 4 * (L - 1)] last positions of all
    sections.
    """

    batch: int
    shapes: tuple[tuple[int, int], ...]
    halves: tuple[tuple[int, int], ...]
    starts: tuple[int, ...]
    parity_starts: tuple[int, ...]
    size: int
    ends: Tensor


@lru_cache(maxsize=8)
def plan(batch: int, height: int, width: int, levels: int, padding: int, device: torch.device) -> Plan:
    shapes = [(height, width)]
    for _ in range(levels - 1):
        shapes.append(tuple(max(0, (size - 1 + 2 * padding) // 2) for size in shapes[-1]))  # type: ignore[arg-type]
    halves = [((h + padding + 1) // 2, (w + padding + 1) // 2) for h, w in shapes]
    # One leading pixel that is never present: the end of an empty section then is the end of the one before it.
    size = 1
    starts, parity_starts, ends = [], [], []
    for h, w in shapes:
        starts.append(size)
        size += batch * h * w
        ends.append(size - 1)
    for h, w in halves[:-1]:
        parity_starts.append(size)
        for _ in range(PARITIES):
            size += batch * h * w
            ends.append(size - 1)
    return Plan(
        batch,
        tuple(shapes),
        tuple(halves),
        tuple(starts),
        (*parity_starts, 0),
        size,
        torch.tensor(ends, device=device),
    )


def build_pyramid(mask: Tensor, levels: int, stride_mode: str) -> Pyramid:
    """`Pyramid.build`, tensor for tensor; the caller has checked the arguments."""
    padding = STRIDE_PADDING[stride_mode]
    layout = plan(*mask.shape, levels, padding, mask.device)
    present = torch.zeros(layout.size, dtype=torch.uint8, device=mask.device)
    largest = torch.full((levels, 2), -1, dtype=torch.int32, device=mask.device)
    pixels = mask.contiguous().view(torch.uint8)
    for level, (height, width) in enumerate(layout.shapes):
        finer = max(0, level - 1)
        programs = -(-layout.batch * height * width // BLOCK)
        if programs:
            mark_kernel[(programs,)](
                pixels, present, largest,
                layout.starts[finer], layout.starts[level], layout.parity_starts[level], level,
                layout.batch, *layout.shapes[finer], height, width, *layout.halves[level],
                PADDING=padding, FINEST=level == 0, RAISED=level + 1 < levels, BLOCK=BLOCK,
            )  # fmt: skip
    running = torch.cumsum(present, 0, dtype=torch.int32)
    ends = running[layout.ends].tolist()  # the one synchronisation
    counts = [end - before for end, before in zip(ends, [0, *ends[:-1]], strict=True)]
    befores = [0, *ends]
    return _tables(layout, stride_mode, present, running, counts, befores)


def _tables(
    layout: Plan, stride_mode: str, present: Tensor, running: Tensor, counts: list[int], befores: list[int]
) -> Pyramid:
    """The pyramid of a numbered flat array. counts, befores: sites of each section, and of all sections before it."""
    levels = len(layout.shapes)
    device = present.device

    def table(taps: int, rows: int) -> Tensor:
        return torch.empty(taps, rows, dtype=torch.int32, device=device)

    site_sets, submanifold, strided = [], [], []
    from_finer: tuple[TapGroup, ...] = ()  # the finer level's rows by parity: the map into this level, backwards
    for level, (height, width) in enumerate(layout.shapes):
        n = counts[level]
        finer, coarser = max(0, level - 1), min(level + 1, levels - 1)
        raised_to = level + 1 < levels
        section = levels + PARITIES * level
        parity_counts = counts[section : section + PARITIES] if raised_to else [0] * PARITIES
        sites = torch.empty(n, 3, dtype=torch.int64, device=device)
        neighbours, window = table(TAPS, n), table(TAPS, n if level else 0)
        raised_rows = torch.empty(n if raised_to else 0, dtype=torch.int64, device=device)
        sizes = [len(taps) * rows for taps, rows in zip(PARITY_TAPS, parity_counts, strict=True)]
        raised = torch.empty(sum(sizes), dtype=torch.int32, device=device)
        if n:
            tables_kernel[(-(-layout.batch * height * width // BLOCK),)](
                present, running, sites, neighbours, window, raised_rows, raised,
                layout.starts[level], layout.starts[finer], layout.starts[coarser], layout.parity_starts[level],
                befores[level], befores[finer], befores[coarser], befores[section] if raised_to else 0,
                n, counts[finer], counts[coarser], *parity_counts,
                layout.batch, height, width, *layout.shapes[finer], *layout.shapes[coarser], *layout.halves[level],
                PADDING=STRIDE_PADDING[stride_mode], FINEST=level == 0, RAISED=raised_to, BLOCK=BLOCK,
            )  # fmt: skip
        site_sets.append(SiteSet(sites, (layout.batch, height, width)))
        taps = tuple(range(TAPS))
        found = neighbours.t()
        submanifold.append(KernelMap(n, n, (TapGroup(None, taps, found),), (TapGroup(None, taps[::-1], found),)))
        if level:
            forward = (TapGroup(None, taps, window.t()),)
            strided.append(KernelMap(counts[finer], n, forward, from_finer))
        from_finer = tuple(
            TapGroup(rows, taps, part.view(len(taps), len(rows)).t())
            for taps, rows, part in zip(
                PARITY_TAPS, raised_rows.split(parity_counts) if raised_to else [], raised.split(sizes), strict=False
            )
        )
    return Pyramid(stride_mode, tuple(site_sets), tuple(submanifold), tuple(strided))
