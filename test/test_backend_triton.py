"""The triton backend against float64: on a GPU where there is one, else in Triton's interpreter on the CPU."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparserefine_ros.sparse import STRIDE_MODES, KernelMap, Pyramid
from sparserefine_ros.sparse.backends import Backend, Output, triton_backend
from sparserefine_ros.sparse.backends.triton_backend import TritonBackend
from sparserefine_ros.sparse.backends.triton_tiles import TILE_MEMORY, Tile, candidates, fastest, pick_tile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MISSING = TritonBackend.missing(DEVICE)
runs = pytest.mark.skipif(MISSING is not None, reason=f"triton backend: {MISSING}")

MASKS = {
    "random": lambda g: torch.rand(2, 17, 23, generator=g) < 0.4,
    "lines": lambda g: (torch.rand(1, 40, 1, generator=g) < 0.2).expand(1, 40, 33).contiguous(),
    "one pixel": lambda g: torch.arange(35).view(1, 5, 7) == 17,
    "all": lambda g: torch.ones(1, 12, 14, dtype=torch.bool),
    "row": lambda g: torch.ones(1, 1, 9, dtype=torch.bool),
    "empty": lambda g: torch.zeros(2, 6, 6, dtype=torch.bool),
}
KINDS = ("submanifold", "strided", "transposed")
# What rounding once may cost, relative. The interpreter cuts bf16 off where a GPU rounds.
ROUNDING = {
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8 if DEVICE.type == "cuda" else 2.0**-7,
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, g: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=g).to(DEVICE, dtype)


def kernel_map(kind: str, mask: Tensor, stride: str = "dilate") -> KernelMap:
    pyramid = Pyramid.build(mask.to(DEVICE), 2, stride)
    if kind == "submanifold":
        return pyramid.submanifold[0]
    return pyramid.strided[0] if kind == "strided" else pyramid.strided[0].transposed


def columns_of_wider(tensor: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """``tensor`` [N, C] as columns ``first`` ... of a buffer [N, width] full of NaN, and that buffer."""
    buffer = torch.full((len(tensor), width), torch.nan, dtype=tensor.dtype, device=tensor.device)
    view = buffer[:, first : first + tensor.shape[1]]
    view.copy_(tensor)
    return view, buffer


def reference(
    x: Tensor,
    weights: tuple[Tensor, Tensor | None],
    kernel_map: KernelMap,
    outputs: list[Output],
    add: Tensor | None = None,
    shortcut: Tensor | None = None,
) -> list[Tensor]:
    """What the torch backend writes in float64."""

    def double(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.double()

    wide = [Output(torch.empty_like(o.tensor).double(), double(o.scale), double(o.shift), o.relu) for o in outputs]
    Backend().conv(x.double(), tuple(map(double, weights)), kernel_map, wide, double(add), double(shortcut))
    return [out.tensor for out in wide]


def assert_rounded_once(actual: Tensor, expected: Tensor) -> None:
    """Equal but for one rounding to ``actual``'s dtype and sums in fp32."""
    assert actual.isfinite().all()
    error = (actual.double() - expected).abs()
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    allowed = 1.01 * ROUNDING[actual.dtype] * expected.abs() + 2e-6 * max(1.0, largest)
    assert (error <= allowed).all(), f"error {float(error.max())} of {largest}"


@runs
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", MASKS)
def test_a_convolution_on_every_kind_of_mask(mask: str, kind: str) -> None:
    g = generator(1)
    backend = TritonBackend()
    for stride in ("dilate", "floor"):
        maps = kernel_map(kind, MASKS[mask](g), stride)
        x, weight = randn(maps.n_in, 19, g=g), randn(9, 19, 22, g=g)
        outputs = [Output(x.new_full((maps.n_out, 22), torch.nan))]
        backend.conv(x, backend.pack(weight), maps, outputs)
        (expected,) = reference(x, (weight, None), maps, outputs)
        assert_rounded_once(outputs[0].tensor, expected)


@runs
@pytest.mark.parametrize(
    ("cin", "cout"), [(1, 1), (3, 16), (16, 19), (32, 32), (22, 48), (96, 40), (128, 64), (64, 160)], ids=str
)
def test_any_number_of_channels(cin: int, cout: int) -> None:
    g = generator(2)
    backend = TritonBackend()
    maps = kernel_map("submanifold", MASKS["random"](g)[:1])
    x, weight = randn(maps.n_in, cin, g=g), randn(9, cin, cout, g=g)
    shortcut, weight2 = randn(maps.n_out, 2 * cin + 1, g=g), randn(2 * cin + 1, cout, g=g)
    outputs = [Output(x.new_empty(maps.n_out, cout))]
    backend.conv(x, backend.pack(weight, weight2), maps, outputs, shortcut=shortcut)
    (expected,) = reference(x, (weight, weight2), maps, outputs, shortcut=shortcut)
    assert_rounded_once(outputs[0].tensor, expected)


@runs
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_all_that_a_layer_may_do_between_columns_of_wider_buffers(kind: str, dtype: torch.dtype) -> None:
    g = generator(3)
    backend = TritonBackend()
    maps = kernel_map(kind, MASKS["random"](g))
    x, x_buffer = columns_of_wider(randn(maps.n_in, 20, g=g, dtype=dtype), 3, 31)
    shortcut, _ = columns_of_wider(randn(maps.n_out, 7, g=g, dtype=dtype), 1, 9)
    add, add_buffer = columns_of_wider(randn(maps.n_out, 24, g=g, dtype=dtype), 8, 40)
    weight, weight2 = randn(9, 20, 24, g=g, dtype=dtype), randn(7, 24, g=g, dtype=dtype)
    scale, shift = (randn(24, g=g, dtype=dtype) for _ in range(2))
    activated, buffer = columns_of_wider(torch.zeros_like(add), 16, 48)
    outputs = [
        Output(add),  # the layer adds in place
        Output(activated, scale, shift, relu=True),
        Output(torch.empty_like(add).contiguous(), None, shift, relu=kind == "strided"),
    ]
    expected = reference(x, (weight, weight2), maps, outputs, add, shortcut)
    x_before = x_buffer.clone()
    backend.conv(x, backend.pack(weight, weight2), maps, outputs, add, shortcut)
    for out, value in zip(outputs, expected, strict=True):
        assert_rounded_once(out.tensor, value)
    assert float(activated.min()) == 0
    # Nothing was written beside the columns.
    assert torch.equal(x_buffer.nan_to_num(), x_before.nan_to_num())
    assert add_buffer[:, :8].isnan().all() and add_buffer[:, 32:].isnan().all()
    assert buffer[:, :16].isnan().all() and buffer[:, 40:].isnan().all()


@runs
def test_one_output_scaled_without_shift() -> None:
    g = generator(4)
    backend = TritonBackend()
    maps = kernel_map("submanifold", MASKS["all"](g))
    x, weight, scale = randn(maps.n_in, 8, g=g), randn(9, 8, 12, g=g), randn(12, g=g)
    outputs = [Output(x.new_empty(maps.n_out, 12), scale)]
    backend.conv(x, backend.pack(weight), maps, outputs)
    assert_rounded_once(outputs[0].tensor, reference(x, (weight, None), maps, outputs)[0])


@runs
def test_not_a_number_stays_and_reaches_its_neighbours_only() -> None:
    g = generator(5)
    backend = TritonBackend()
    maps = kernel_map("submanifold", torch.ones(1, 9, 9, dtype=torch.bool))
    x, weight = randn(81, 4, g=g), randn(9, 4, 4, g=g)
    x[40] = torch.nan
    out = Output(torch.empty_like(x), None, None, relu=True)
    backend.conv(x, backend.pack(weight), maps, [out])
    hit = out.tensor.isnan().all(1).view(9, 9)
    assert hit[3:6, 3:6].all() and int(hit.sum()) == 9 and int(out.tensor.isnan().sum()) == 36


@runs
def test_tables_in_either_memory_order() -> None:
    g = generator(6)
    backend = TritonBackend()
    x_of, weight = {}, randn(9, 6, 6, g=g)
    for kind in KINDS:
        maps = kernel_map(kind, MASKS["random"](g))
        x = x_of.setdefault(maps.n_in, randn(maps.n_in, 6, g=g))
        groups = tuple(type(group)(group.rows, group.taps, group.table.t().contiguous().t()) for group in maps.forward)
        other = KernelMap(maps.n_in, maps.n_out, groups, maps.backward)
        results = [x.new_empty(maps.n_out, 6) for _ in range(2)]
        for result, one in zip(results, (maps, other), strict=True):
            backend.conv(x, backend.pack(weight), one, [Output(result)])
        assert torch.equal(*results)


@runs
def test_what_does_not_fit_is_refused() -> None:
    backend = TritonBackend()
    maps = kernel_map("submanifold", torch.ones(1, 4, 4, dtype=torch.bool))
    x, packed = torch.zeros(16, 3, device=DEVICE), backend.pack(torch.zeros(9, 3, 5, device=DEVICE))
    out = Output(torch.zeros(16, 5, device=DEVICE))
    with pytest.raises(ValueError, match=r"x has shape \(15, 3\): give \(16, 3\)"):
        backend.conv(x[1:], packed, maps, [out])
    with pytest.raises(ValueError, match=r"an output has shape \(16, 3\): give \(16, 5\)"):
        backend.conv(x, packed, maps, [Output(x)])
    with pytest.raises(ValueError, match="adjacent channels"):
        backend.conv(torch.zeros(3, 16, device=DEVICE).t(), packed, maps, [out])
    with pytest.raises(ValueError, match=r"x is torch.float16 on .*, but the weight torch.float32"):
        backend.conv(x.half(), packed, maps, [out])
    with pytest.raises(ValueError, match="exactly when its weight was packed"):
        backend.conv(x, packed, maps, [out], shortcut=x)
    with pytest.raises(ValueError, match=r"scale and shift have shape \(3,\): give \(5,\)"):
        backend.conv(x, packed, maps, [Output(out.tensor, x[0])])
    for weights in ((torch.zeros(8, 3, 5),), (torch.zeros(9, 3, 5), torch.zeros(2, 4))):
        with pytest.raises(ValueError, match=r"weights have shape \[[89], 3, 5\].*: give \[9, Cin, Cout\]"):
            backend.pack(*weights)
    with pytest.raises(ValueError, match="4 outputs: the triton backend writes 1 to 3"):
        backend.conv(x, packed, maps, [out] * 4)


@runs
@pytest.mark.parametrize("stride", STRIDE_MODES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 45, 38), (1, 9, 14), (3, 7, 1), (1, 2, 70)], ids=str)
def test_pyramids_are_those_of_torch_tensor_for_tensor(shape: tuple[int, int, int], stride: str) -> None:
    for levels, density in ((1, 0.3), (3, 0.0), (4, 0.05), (3, 0.2), (3, 0.4), (2, 1.0)):
        mask = torch.rand(shape, generator=generator(levels)) < density
        if density == 0.2:  # the last site in an odd row and column, far from the border: no coarse site over it
            row, column = (2 * (size // 4) + 1 for size in shape[1:])
            mask[:, row + 1 :] = mask[:, :, column + 1 :] = False
            mask[0, row : row + 1, column : column + 1] = True
        if density == 0.4:
            mask[0] = False
        actual = TritonBackend().pyramid(mask.to(DEVICE), levels, stride)
        expected = Pyramid.build(mask.to(DEVICE), levels, stride)
        assert (actual.stride_mode, len(actual)) == (stride, levels)
        for mine, theirs in zip(actual.levels, expected.levels, strict=True):
            assert mine.shape == theirs.shape and torch.equal(mine.sites, theirs.sites)
        for name in ("submanifold", "strided"):
            for mine, theirs in zip(getattr(actual, name), getattr(expected, name), strict=True):
                assert (mine.n_in, mine.n_out) == (theirs.n_in, theirs.n_out)
                for one, other in zip(mine.forward + mine.backward, theirs.forward + theirs.backward, strict=True):
                    assert one.taps == other.taps and (one.rows is None) == (other.rows is None)
                    assert one.rows is None or torch.equal(one.rows, other.rows)
                    assert one.table.dtype == other.table.dtype and torch.equal(one.table, other.table)


@runs
def test_pyramids_take_masks_that_are_no_block_of_memory() -> None:
    mask = (torch.rand(1, 30, 44, generator=generator(9)) < 0.4).to(DEVICE)
    actual = TritonBackend().pyramid(mask[:, 3:, ::2], 2, "dilate")
    assert torch.equal(actual.levels[1].sites, Pyramid.build(mask[:, 3:, ::2], 2).levels[1].sites)


def test_pyramids_are_refused_as_by_torch() -> None:
    with pytest.raises(ValueError, match="levels is 0"):
        TritonBackend().pyramid(torch.zeros(1, 2, 2, dtype=torch.bool), 0, "dilate")
    with pytest.raises(ValueError, match="give torch.bool"):
        TritonBackend().pyramid(torch.zeros(1, 2, 2), 1, "dilate")
    with pytest.raises(ValueError, match="'spam' is unknown"):
        TritonBackend().pyramid(torch.zeros(1, 2, 2, dtype=torch.bool), 1, "spam")


@runs
@pytest.mark.parametrize("stride", STRIDE_MODES)
@pytest.mark.parametrize("mask", MASKS)
def test_padded_pyramids_hold_those_of_the_sites_in_use(mask: str, stride: str) -> None:
    """Every entry of a row in use is what it is without padding, but for "no site", which is the capacity."""
    chosen = MASKS[mask](generator(12)).to(DEVICE)
    expected = Pyramid.build(chosen, 3, stride)
    for spare in (0, 5):
        rooms = [len(sites) + spare for sites in expected.levels]
        actual, counts = TritonBackend().padded_pyramid(chosen, stride, rooms)
        assert counts.tolist() == [len(sites) for sites in expected.levels]
        for mine, theirs in zip(actual.levels, expected.levels, strict=True):
            assert mine.shape == theirs.shape and len(mine) == len(theirs) + spare
            assert torch.equal(mine.sites[: len(theirs)], theirs.sites) and not mine.sites[len(theirs) :].any()
        for name in ("submanifold", "strided"):
            for mine, theirs in zip(getattr(actual, name), getattr(expected, name), strict=True):
                assert (mine.n_in, mine.n_out) == (theirs.n_in + spare, theirs.n_out + spare)
                for one, other in zip(mine.forward + mine.backward, theirs.forward + theirs.backward, strict=True):
                    none = theirs.n_in if any(other is group for group in theirs.forward) else theirs.n_out
                    n = int(one.count)
                    assert one.taps == other.taps and n == len(other.table)
                    assert other.rows is None or torch.equal(one.rows[:n], other.rows)
                    table = torch.where(other.table == none, none + spare, other.table)
                    assert torch.equal(one.table[:n], table)


@runs
@pytest.mark.parametrize("kind", KINDS)
def test_rows_behind_the_count_are_neither_read_nor_written(kind: str) -> None:
    g = generator(13)
    backend, weight, weight2 = TritonBackend(), randn(9, 20, 24, g=g), randn(7, 24, g=g)
    packed = backend.pack(weight, weight2)
    mask = MASKS["random"](g).to(DEVICE)
    plain = Pyramid.build(mask, 2)
    padded, _ = backend.padded_pyramid(mask, "dilate", [len(sites) + 600 for sites in plain.levels])
    maps, room = (
        p.submanifold[0] if kind == "submanifold" else p.strided[0] if kind == "strided" else p.strided[0].transposed
        for p in (plain, padded)
    )
    for group in room.forward:  # whatever an earlier frame may have left there
        group.table[int(group.count) :] = 0
        if group.rows is not None:
            group.rows[int(group.count) :] = 0
    x, shortcut, add = (
        torch.cat([randn(n, c, g=g), torch.full((600, c), torch.nan, device=DEVICE)])
        for n, c in ((maps.n_in, 20), (maps.n_out, 7), (maps.n_out, 24))
    )
    out, wide = x.new_empty(maps.n_out, 24), x.new_full((room.n_out, 24), 7.0)
    backend.conv(x[: maps.n_in], packed, maps, [Output(out)], add[: maps.n_out], shortcut[: maps.n_out])
    backend.conv(x, packed, room, [Output(wide)], add, shortcut)
    assert_rounded_once(
        wide[: maps.n_out],
        reference(x[: maps.n_in], (weight, weight2), maps, [Output(out)], add[: maps.n_out], shortcut[: maps.n_out])[0],
    )
    if DEVICE.type == "cpu":  # where tiles do not follow the number of rows
        assert torch.equal(wide[: maps.n_out], out)
    assert (wide[maps.n_out :] == 7).all()


@runs
@pytest.mark.parametrize("step", [1, 2], ids=["all", "one parity"])
@pytest.mark.parametrize("stride", STRIDE_MODES)
def test_more_sites_than_fit_write_nothing_beside_their_place(
    stride: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All memory of the tables lies between guards; rows, which decide where layers write, stay below the capacity."""
    from sparserefine_ros.sparse.backends import triton_maps

    guarded: list[tuple[Tensor, int]] = []

    def allocate(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        size = math.prod(shape)
        memory = torch.full((size + 128,), -7, dtype=dtype, device=device)
        guarded.append((memory, size))
        return memory[64 : 64 + size].view(shape)

    mask = torch.zeros(1, 12, 14, dtype=torch.bool, device=DEVICE)
    mask[:, ::step, ::step] = True
    counts = [len(sites) for sites in Pyramid.build(mask, 3, stride).levels]
    for short in range(3):
        rooms = [max(0, count - 5 * (level == short)) for level, count in enumerate(counts)]
        with monkeypatch.context() as patch:
            patch.setattr(triton_maps.torch, "empty", allocate)
            pyramid, found = TritonBackend().padded_pyramid(mask, stride, rooms)
        assert found.tolist() == counts
        for memory, size in guarded:
            assert (memory[:64] == -7).all() and (memory[64 + size :] == -7).all()
        for maps in pyramid.strided:
            for group in maps.backward:
                used = min(int(group.count), len(group.rows))
                assert ((group.rows[:used] >= 0) & (group.rows[:used] < maps.n_in)).all()
                assert ((group.table[:used] >= 0) & (group.table[:used] <= maps.n_out)).all()
        for maps in (*pyramid.submanifold, *pyramid.strided):
            table = maps.forward[0].table[: int(maps.forward[0].count)]
            assert ((table >= 0) & (table <= maps.n_in)).all()


@runs
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_networks_in_every_precision(dtype: torch.dtype) -> None:
    from sparserefine_ros.networks.fused_unet import FusedUNet
    from sparserefine_ros.networks.unet import SparseUNet

    torch.manual_seed(0)
    net = SparseUNet(3, (16, 24, 32), 1).eval().to(DEVICE)
    mask = (torch.rand(1, 30, 26, generator=generator(7)) < 0.3).to(DEVICE)
    x = randn(int(mask.sum()), 3, g=generator(8))
    backend = TritonBackend()
    with torch.no_grad():
        expected = net.double()(x.double(), Pyramid.build(mask, 3))
    actual = FusedUNet(net, backend, dtype)(x, backend.pyramid(mask, 3, "dilate"))
    assert actual.dtype == dtype
    # About ten layers in a row, each rounding weights and features once; sums in fp32.
    allowed = max(1e-5, 20 * ROUNDING[dtype])
    assert float((actual.double() - expected).abs().max() / expected.abs().max()) <= allowed


@runs
def test_the_self_test_tells_right_from_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    self_test = triton_backend._self_test.__wrapped__
    assert self_test(DEVICE) is None
    launch = triton_backend._launch

    def on_other_rows(tile: Tile, x: Tensor, *args: object) -> None:
        launch(tile, x.roll(1, 0), *args)

    monkeypatch.setattr(triton_backend, "_launch", on_other_rows)
    assert self_test(DEVICE) == "Triton computes wrong values there in float32"

    def broken(*args: object) -> None:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(triton_backend, "_launch", broken)
    assert self_test(DEVICE) == "Triton fails there: Failed to find C compiler."


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Kernels:
        INTERPRETED = False

    monkeypatch.setattr(triton_backend, "_kernels", Kernels)
    assert re.search("needs CUDA", TritonBackend.missing(torch.device("cpu")) or "")
    assert re.search("needs CUDA", TritonBackend.missing(torch.device("meta")) or "")
    monkeypatch.setattr(Kernels, "INTERPRETED", True)
    assert TritonBackend.missing(torch.device("cpu")) is None
    assert re.search("TRITON_INTERPRET is set", TritonBackend.missing(torch.device("cuda")) or "")

    def absent() -> None:
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(triton_backend, "_kernels", absent)
    assert re.search("cannot be imported.*install", TritonBackend.missing(torch.device("cuda")) or "")


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_tiles_divide_the_weights_and_fit_a_multiprocessor(dtype: torch.dtype) -> None:
    backend = TritonBackend()
    for cin, cout, c2 in ((3, 16, 0), (16, 19, 3), (48, 96, 96), (64, 32, 64), (512, 512, 0), (512, 256, 512)):
        packed = backend.pack(
            torch.zeros(9, cin, cout, dtype=dtype), torch.zeros(c2, cout, dtype=dtype) if c2 else None
        )
        for rows in (1, 1000, 250_000):
            tile = pick_tile(packed, rows, processors=132)
            _, kp, np = packed.weight.shape
            assert cin <= kp and cout <= np and kp % tile.depth == 0 and np % tile.columns == 0
            assert packed.shortcut is None or packed.shortcut.shape[0] % tile.depth == 0
            assert min(tile.rows, tile.columns, tile.depth) >= 16
            held = (tile.in_flight + 1) * tile.depth * (tile.rows + tile.columns) * packed.weight.element_size()
            assert tile.in_flight >= 1 and held <= TILE_MEMORY
            others = candidates(packed, rows, processors=132)
            assert others[0] == tile and len(set(others)) == len(others) > 1
            for other in others:
                assert np % other.columns == 0 and min(other.rows, other.columns, other.depth) >= 16
                assert other.warps in (4, 8) and other.in_flight >= 1
    many, few = (pick_tile(backend.pack(torch.zeros(9, 512, 512)), rows, 132) for rows in (250_000, 1000))
    assert few.rows * few.columns < many.rows * many.columns


def test_the_fastest_tile_that_runs_is_taken() -> None:
    tiles = [Tile(rows, 32, 32, 4, 2) for rows in (16, 32, 64)]

    def run(tile: Tile) -> None:
        if tile.rows == 16:
            raise RuntimeError("out of resource: shared memory")
        time.sleep(0.02 if tile.rows == 32 else 0.001)

    assert fastest(tiles, run, torch.device("cpu")) == tiles[2]
    with pytest.raises(RuntimeError, match="out of resource"):
        fastest(tiles[:1], run, torch.device("cpu"))


@runs
def test_tuning_leaves_what_is_added_alone() -> None:
    g = generator(10)
    backend = TritonBackend(tune=True)
    maps = kernel_map("submanifold", MASKS["random"](g))
    x, weight = randn(maps.n_in, 32, g=g), randn(9, 32, 32, g=g)
    for turn in range(2):  # tunes, then knows
        outputs = [Output(randn(maps.n_out, 32, g=g))]
        (expected,) = reference(x, (weight, None), maps, outputs, outputs[0].tensor)
        backend.conv(x, backend.pack(weight), maps, outputs, outputs[0].tensor)
        assert_rounded_once(outputs[0].tensor, expected)
        assert len(backend.tuned) == 1, turn


# What the kernel is given for a layer: architecture, Cin, Cout, C2, groups of rows, dtype, whether with counts.
LAYERS = [
    (80, 3, 16, 0, 1, torch.float16, False),
    (80, 128, 128, 0, 4, torch.bfloat16, False),
    (86, 32, 32, 64, 1, torch.float32, False),
    (87, 19, 22, 0, 1, torch.float16, True),
    (90, 512, 256, 512, 1, torch.float16, True),
    (90, 64, 64, 0, 4, torch.float32, True),
]


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_compiler_takes_the_kernels_without_a_gpu() -> None:
    """The interpreter accepts what a GPU's compiler refuses, so compile too; in a process without the interpreter."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    command = [sys.executable, "-c", "import test_backend_triton as t; t.compile_layers(); t.compile_maps()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["tensor-cores"] * len(LAYERS) + ["maps"] * 4


def compile_layers() -> None:
    """Compiles LAYERS for GPUs which need not be there; prints whether each multiplies on the tensor cores."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sparserefine_ros.sparse.backends.triton_kernels import conv_kernel

    for architecture, cin, cout, c2, groups, dtype, padded in LAYERS:
        packed = TritonBackend().pack(
            torch.zeros(9, cin, cout, dtype=dtype), torch.zeros(c2, cout, dtype=dtype) if c2 else None
        )
        tile = pick_tile(packed, 10_000, 100)
        constants = triton_backend.constants(packed, tile, relu=6, groups=groups, column_major=True)
        features = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}[dtype]
        signature = {}
        for name in conv_kernel.arg_names:
            base = name.rstrip("0123")
            absent = {"shortcut": not c2, "weight2": not c2, "rows": groups == 1, "table": name[-1] >= str(groups)}
            absent["count"] = absent["table"] or not padded
            if name in constants or absent.get(name if name in absent else base, False):
                signature[name] = "constexpr"
                constants.setdefault(name, None)
            elif base in ("table", "count"):
                signature[name] = "*i32"
            elif base == "rows":
                signature[name] = "*i64"
            elif base in ("x", "weight", "shortcut", "add", "out", "scale", "shift"):
                signature[name] = features
            else:
                signature[name] = "i64" if base == "code" else "i32"
        source = ASTSource(conv_kernel, signature, constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": tile.warps})
        assert compiled.metadata.shared <= 99 << 10, compiled.metadata.shared
        print("tensor-cores" if re.search(r"\b(wgmma\.mma_async|mma)\.sync", compiled.asm["ptx"]) else "none")


def compile_maps() -> None:
    """Compiles the kernels which build the maps; prints a word for each."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sparserefine_ros.sparse.backends import triton_maps

    types = dict.fromkeys(("mask", "present"), "*u8") | dict.fromkeys(("sites", "raised_rows"), "*i64")
    types |= dict.fromkeys(("largest", "running", "neighbours", "window", "raised"), "*i32")
    for kernel in (triton_maps.mark_kernel, triton_maps.tables_kernel):
        for finest in (True, False):
            constants = {"PADDING": int(finest), "FINEST": finest, "RAISED": not finest, "BLOCK": triton_maps.BLOCK}
            signature = {
                name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names
            }
            triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 80, 32))
            print("maps")
