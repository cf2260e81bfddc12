"""How the triton backend cuts a layer's work into tiles.

Shape shorthand
    Kp, Np   channels in and out as packed: padded with zeros to whole tiles
    K2p      channels of the 1x1 shortcut's input as packed
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Shared memory a program may take for its tiles in flight, bytes: the 99 KB of a consumer Ampere or Ada GPU less a
# little. On an H100 (227 KB) two such programs share a multiprocessor, which hides latency as well as more steps would.
TILE_MEMORY = 96 << 10
REPEATS = 5


@dataclass(frozen=True)
class Packed:
    """A layer's weights, padded with zeros to whole tiles.

    weight: [9, Kp, Np]; shortcut: [K2p, Np] or None.  cin, cout, c2: channels without padding (c2 is 0 for None).
    """

    weight: Tensor
    shortcut: Tensor | None
    cin: int
    cout: int
    c2: int


@dataclass(frozen=True)
class Tile:
    """How a launch is cut: a program's output rows and channels, input channels a step, warps, steps in flight."""

    rows: int
    columns: int
    depth: int
    warps: int
    in_flight: int


def pick_tile(packed: Packed, rows: int, processors: int) -> Tile:
    """The tile for a layer with ``rows`` output rows on a GPU of ``processors`` multiprocessors."""
    _, kp, np = packed.weight.shape
    size = packed.weight.element_size()
    depth = _depth(packed, 128 // size)
    columns = _divisor(np, 128)
    tall = 128
    # Coarse levels have few rows: smaller tiles until every multiprocessor has one to work on.
    while tall > 64 and -(-rows // tall) * (np // columns) < processors:
        tall //= 2
    while columns > 32 and -(-rows // tall) * (np // columns) < processors:
        columns //= 2
    held = TILE_MEMORY // (size * depth * (tall + columns))  # those in flight and the one being multiplied
    warps = 8 if tall * columns * size >= 2 * 128 * 128 else 4  # sums and, in fp32, parts of operands are in registers
    return Tile(tall, columns, depth, warps, max(1, min(3, held - 1)))


def interpreter_tile(packed: Packed) -> Tile:
    """Time there goes by operations, not by elements; still, a test's few hundred rows are several blocks."""
    return Tile(256, _divisor(packed.weight.shape[2], 64), _depth(packed, 64), 4, 1)


def _depth(packed: Packed, limit: int) -> int:
    depth = _divisor(packed.weight.shape[1], limit)
    return depth if packed.shortcut is None else min(depth, _divisor(packed.shortcut.shape[0], limit))


def _divisor(size: int, limit: int) -> int:
    """The largest power of two that divides ``size``, at most ``limit``."""
    return min(size & -size, limit)


def candidates(packed: Packed, rows: int, processors: int) -> list[Tile]:
    """`pick_tile`'s tile and its neighbours; some may need more memory or registers than the GPU has."""
    first = pick_tile(packed, rows, processors)
    widest = _divisor(packed.weight.shape[2], 256)
    others = [
        replace(first, rows=first.rows // 2),
        replace(first, rows=first.rows * 2, warps=8),
        replace(first, columns=max(16, first.columns // 2)),
        replace(first, columns=min(widest, first.columns * 2), warps=8, in_flight=max(1, first.in_flight - 1)),
        replace(first, warps=12 - first.warps),  # 4 or 8
        replace(first, in_flight=first.in_flight + 1),
        replace(first, in_flight=max(1, first.in_flight - 1)),
    ]
    return list(dict.fromkeys([first, *others]))


def fastest(tiles: list[Tile], run: Callable[[Tile], None], device: torch.device) -> Tile:
    """The tile with which ``run`` takes least time on ``device``; those it cannot run with are left out.

    Raises what the first tile raised where none can run.
    """
    times: dict[Tile, float] = {}
    error: Exception | None = None
    for tile in tiles:
        try:
            run(tile)  # compiles
            times[tile] = _milliseconds(lambda tile=tile: run(tile), device)  # type: ignore[misc]
        except Exception as failure:  # out of shared memory or registers: Triton's errors share no base class
            error = error or failure
    if not times:
        assert error is not None
        raise error
    return min(times, key=times.__getitem__)


def _milliseconds(run: Callable[[], None], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(REPEATS):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / REPEATS
