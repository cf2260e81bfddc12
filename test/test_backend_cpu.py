"""The CPU engine against convolutions in float64, and its tables against torch's, tensor for tensor."""

from __future__ import annotations

import pytest
import torch
from compiler import needs_compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparserefine_ros.benchmarks.masks import edge_mask
from sparserefine_ros.networks.selectors import upsample_nearest
from sparserefine_ros.sparse import KernelMap, Pyramid, SiteSet
from sparserefine_ros.sparse.backends import Backend, Output, cpu, pick_backend
from sparserefine_ros.sparse.backends.cpu import BlockMap

pytestmark = needs_compiler
CPU = torch.device("cpu")
MASKS = {
    "empty": torch.zeros(1, 6, 7, dtype=torch.bool),
    "one": torch.zeros(1, 5, 5, dtype=torch.bool).index_fill_(2, torch.tensor([2]), True)
    & (torch.arange(5) == 3)[:, None],
    "all": torch.ones(2, 9, 14, dtype=torch.bool),
    "some": torch.rand(2, 33, 41, generator=torch.Generator().manual_seed(0)) < 0.35,
    "blocks": edge_mask(34, 42, 0.4)[:, :33, :41],  # at both odd ends they are cut through
}


def strided_rows(rows: int, channels: int, generator: torch.Generator) -> Tensor:
    """Part of a wider buffer, as one half of a skip concatenation is."""
    return torch.randn(rows, channels + 5, generator=generator)[:, 2 : 2 + channels]


@pytest.mark.parametrize("kind", ["submanifold", "strided", "transposed"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("cin", "cout"), [(1, 1), (3, 16), (16, 16), (17, 33), (22, 16), (64, 32), (40, 70)])
def test_layer_equals_float64(kind: str, mask: str, cin: int, cout: int) -> None:
    backend, generator = pick_backend("cpu", CPU), torch.Generator().manual_seed(3)
    pyramid = backend.pyramid(MASKS[mask], 2, "floor")
    table = {"submanifold": pyramid.submanifold[0], "strided": pyramid.strided[0]}.get(
        kind, pyramid.strided[0].transposed
    )
    n_in, n_out, c2 = table.n_in, table.n_out, 7
    x, add, short = (strided_rows(n, c, generator) for n, c in ((n_in, cin), (n_out, cout), (n_out, c2)))
    weight, weight2 = torch.randn(9, cin, cout, generator=generator), torch.randn(c2, cout, generator=generator)
    scale, shift = torch.randn(cout, generator=generator), torch.randn(cout, generator=generator)
    wide = torch.full((n_out, 2 * cout + 1), 5.0)
    targets = [wide[:, 1 : 1 + cout], torch.empty(n_out, cout), add]  # the last in place
    expected = [torch.empty(n_out, cout, dtype=torch.float64) for _ in targets]
    forms = [(None, None, False), (scale, shift, True), (None, shift, False)]

    reference = Backend()
    packed = reference.pack(weight.double(), weight2.double())
    outputs = [
        Output(t, *(None if v is None else v.double() for v in f[:2]), f[2])
        for t, f in zip(expected, forms, strict=True)
    ]
    reference.conv(x.double(), packed, table, outputs, add=add.double(), shortcut=short.double())
    outputs = [Output(t, *f) for t, f in zip(targets, forms, strict=True)]
    backend.conv(x, backend.pack(weight, weight2), table, outputs, add=add, shortcut=short)
    for actual, exact in zip(targets, expected, strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-5 * (9 * cin) ** 0.5)
    assert (wide[:, 0] == 5).all() and (wide[:, 1 + cout :] == 5).all()


@given(
    st.integers(1, 2), st.integers(1, 24), st.integers(1, 24), st.floats(0, 1), st.integers(1, 5),
    st.sampled_from(["dilate", "floor"]), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_pyramid_is_torchs_tensor_for_tensor(
    batch: int, height: int, width: int, density: float, levels: int, stride: str, seed: int
) -> None:
    mask = torch.rand(batch, height, width, generator=torch.Generator().manual_seed(seed)) < density
    ours, theirs = pick_backend("cpu", CPU).pyramid(mask, levels, stride), Pyramid.build(mask, levels, stride)
    for a, b in zip(ours.levels, theirs.levels, strict=True):
        assert a.shape == b.shape
        for name in ("sites", "flat", "bordered_grid"):
            same(getattr(a, name), getattr(b, name))
    for ours_maps, their_maps in ((ours.submanifold, theirs.submanifold), (ours.strided, theirs.strided)):
        for a, b in zip(ours_maps, their_maps, strict=True):
            assert (a.n_in, a.n_out) == (b.n_in, b.n_out)
            for group, other in zip(a.forward + a.backward, b.forward + b.backward, strict=True):
                assert group.taps == other.taps
                same(group.table, other.table)
                assert (group.rows is None) == (other.rows is None)
                if group.rows is not None and other.rows is not None:
                    same(group.rows, other.rows)


def same(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype and torch.equal(a, b)


def test_a_mask_that_is_a_view_is_read_right() -> None:
    mask = MASKS["some"].transpose(1, 2)
    same(pick_backend("cpu", CPU).pyramid(mask, 1, "floor").levels[0].sites, SiteSet.from_mask(mask).sites)


@given(
    st.integers(1, 2), st.integers(1, 12), st.integers(1, 12), st.floats(0, 1), st.booleans(), st.integers(0, 99)
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_patches_hold_the_sites_around_every_block(
    batch: int, height: int, width: int, density: float, whole: bool, seed: int
) -> None:
    mask = torch.rand(batch, height, width, generator=torch.Generator().manual_seed(seed)) < density
    if whole:
        mask = mask.repeat_interleave(2, 1).repeat_interleave(2, 2)
    sites = SiteSet.from_mask(mask)
    blocks = {(b, y // 2, x // 2) for b, y, x in sites.sites.tolist()}
    kernel_map = pick_backend("cpu", CPU).pyramid(mask, 1, "floor").submanifold[0]
    assert isinstance(kernel_map, BlockMap) == (len(blocks) <= 0.4 * len(sites))
    if not isinstance(kernel_map, BlockMap):
        return
    row = {site: i for i, site in enumerate(map(tuple, sites.sites.tolist()))}
    expected = [
        [row.get((b, 2 * y - 1 + i, 2 * x - 1 + j), len(sites)) for i in range(4) for j in range(4)]
        for b, y, x in blocks
    ]
    assert sorted(kernel_map.patches.tolist()) == sorted(expected)


@pytest.mark.parametrize(
    ("low", "density", "blocks"), [((20, 32), 0.4, True), ((25, 40), 0.8, True), ((25, 40), 0.4, False)]
)
def test_blocks_and_single_sites_give_the_same(low: tuple[int, int], density: float, blocks: bool) -> None:
    """Blocks are whole at a scale of 1/2, irregular at 1/1.6, and there too many where few pixels are selected."""
    generator = torch.Generator().manual_seed(4)
    mask = upsample_nearest(torch.rand(1, *low, generator=generator) < density, (40, 64))
    backend = pick_backend("cpu", CPU)
    kernel_map = backend.pyramid(mask, 1, "dilate").submanifold[0]
    assert isinstance(kernel_map, BlockMap) == blocks
    n, cin, cout = kernel_map.n_in, 48, 40
    x, weight = torch.randn(n, cin, generator=generator), torch.randn(9, cin, cout, generator=generator)
    by_block, by_site = torch.empty(n, cout), torch.empty(n, cout)
    backend.conv(x, backend.pack(weight), kernel_map, [Output(by_block)])
    plain = KernelMap(n, n, kernel_map.forward, kernel_map.backward)
    backend.conv(x, backend.pack(weight), plain, [Output(by_site)])
    exact = torch.empty(n, cout, dtype=torch.float64)
    Backend().conv(x.double(), Backend().pack(weight.double()), kernel_map, [Output(exact)])
    largest = exact.abs().max()
    for actual in (by_block, by_site):
        assert float((actual - exact).abs().max() / largest) <= 2e-6
    assert torch.equal(by_block, by_site) != blocks  # another order of sums, or the very same


@pytest.mark.parametrize("mask", ["some", "blocks"])
def test_outputs_beyond_the_cache_are_the_same(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are streamed to memory, whole cache lines at a time, where they lie on such lines."""
    backend, results = pick_backend("cpu", CPU), []
    for cache in (1e9, 0):
        monkeypatch.setattr(cpu, "CACHE", cache)
        generator = torch.Generator().manual_seed(5)
        kernel_map = backend.pyramid(MASKS[mask], 1, "floor").submanifold[0]
        x, wide = torch.randn(kernel_map.n_in, 32, generator=generator), torch.zeros(kernel_map.n_out, 131)
        out, packed = torch.empty(kernel_map.n_out, 48), backend.pack(torch.randn(9, 32, 48, generator=generator))
        backend.conv(x, packed, kernel_map, [Output(out), Output(wide[:, 1:49]), Output(wide[:, 64:112], relu=True)])
        assert torch.equal(wide[:, 1:49], out) and torch.equal(wide[:, 64:112], out.relu())
        results.append(out)
    assert torch.equal(*results)


@pytest.mark.parametrize("density", [0.5, 0.9])
@pytest.mark.parametrize("channels", [16, 40])
def test_threads_do_not_change_a_bit(channels: int, density: float) -> None:
    backend, before, results = pick_backend("cpu", CPU), torch.get_num_threads(), []
    mask = torch.rand(1, 80, 90, generator=torch.Generator().manual_seed(0)) < density
    pyramid = backend.pyramid(mask, 1, "floor")
    assert isinstance(pyramid.submanifold[0], BlockMap) == (density == 0.9)
    n = len(pyramid.levels[0])
    x, weight = torch.randn(n, channels), torch.randn(9, channels, channels)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = torch.empty(n, channels)
            backend.conv(x, backend.pack(weight), pyramid.submanifold[0], [Output(out)])
            results.append(out)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_bad_input_is_named() -> None:
    backend = pick_backend("cpu", CPU)
    table = backend.pyramid(MASKS["all"], 1, "floor").submanifold[0]
    n, packed = table.n_in, backend.pack(torch.zeros(9, 4, 6))
    good, out = torch.zeros(n, 4), Output(torch.zeros(n, 6))
    cases = [
        (good[:-1], [out], {}, rf"features has shape \({n - 1}, 4\): give \[{n}, 4\]"),
        (good.double(), [out], {}, "features is torch.float64"),
        (good.T.contiguous().T, [out], {}, f"stride {n} between channels"),
        (good, [Output(torch.zeros(n, 5))], {}, "output has shape"),
        (good, [out], {"add": torch.zeros(n, 5)}, "add has shape"),
        (good, [out], {"shortcut": torch.zeros(n, 5)}, "exactly when its weight was packed"),
        (good, [out] * 5, {}, "5 outputs: at most 4"),
    ]
    vectors = (
        (torch.ones(1), r"shape \(1, 1\): give \[1, 6\]"),
        (torch.ones(6).double(), "torch.float64"),
        (torch.ones(12)[::2], "stride 2"),
    )
    for vector, message in vectors:  # the kernel would read elsewhere
        for names in ({"scale": vector}, {"shift": vector}):
            cases.append((good, [Output(out.tensor, **names)], {}, f"scale or shift as a row (has|is) {message}"))
    for x, outputs, more, message in cases:
        with pytest.raises(ValueError, match=message):
            backend.conv(x, packed, table, outputs, **more)
    for weights in ((torch.zeros(8, 4, 6),), (torch.zeros(9, 4, 6), torch.zeros(2, 5))):
        with pytest.raises(ValueError, match=r"weights have shape \[[89], 4, 6\].*: give \[9, Cin, Cout\]"):
            backend.pack(*weights)
    with pytest.raises(ValueError, match="give torch.bool"):
        backend.pyramid(MASKS["all"].int(), 1, "floor")
    with pytest.raises(ValueError, match="mask is on meta: the cpu backend takes it on the CPU"):
        backend.pyramid(MASKS["all"].to("meta"), 1, "floor")  # whose address the kernels would read
    with pytest.raises(ValueError, match="levels is 0"):
        backend.pyramid(MASKS["all"], 0, "floor")
    with pytest.raises(ValueError, match="'ceil' is unknown"):
        backend.pyramid(MASKS["all"], 2, "ceil")
