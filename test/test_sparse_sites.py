"""Sites, kernel maps and pyramids against brute force and hand-written examples."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparserefine_ros.sparse import (
    STRIDE_MODES,
    Pyramid,
    SiteSet,
    sites_from_mask,
    strided,
    submanifold_map,
)

PADDING = {"dilate": 0, "floor": 1}


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    """Random, empty, full and single-pixel batches; some members empty; sides from 1."""
    batch = draw(st.integers(1, 3))
    height, width = draw(st.integers(1, 11)), draw(st.integers(1, 11))
    kind = draw(st.sampled_from(["random", "random", "random", "empty", "full", "single"]))
    if kind == "single":
        mask = torch.zeros(batch, height, width, dtype=torch.bool)
        mask[
            draw(st.integers(0, batch - 1)),
            draw(st.integers(0, height - 1)),
            draw(st.integers(0, width - 1)),
        ] = True
        return mask
    density = {"random": draw(st.sampled_from([0.05, 0.3, 0.7])), "empty": 0.0, "full": 1.0}[kind]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    mask = torch.rand(batch, height, width, generator=generator) < density
    if batch > 1 and draw(st.booleans()):
        mask[draw(st.integers(0, batch - 1))] = False
    return mask


def active(mask: Tensor) -> set[tuple[int, int, int]]:
    return {(b, h, w) for b, h, w in itertools.product(*(range(size) for size in mask.shape)) if bool(mask[b, h, w])}


def rows(sites: SiteSet) -> list[tuple[int, int, int]]:
    return [(b, h, w) for b, h, w in sites.sites.tolist()]


def coarse_by_definition(fine: list[tuple[int, int, int]], mode: str) -> list[tuple[int, int, int]]:
    if mode == "floor":
        return sorted({(b, h // 2, w // 2) for b, h, w in fine})
    last_row = (max((h for _, h, _ in fine), default=0) - 2) // 2
    last_column = (max((w for _, _, w in fine), default=0) - 2) // 2
    coarse = set()
    for b, h, w in fine:
        for row, column in itertools.product(range(last_row + 1), range(last_column + 1)):
            if 2 * row <= h <= 2 * row + 2 and 2 * column <= w <= 2 * column + 2:
                coarse.add((b, row, column))
    return sorted(coarse)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(masks())
def test_sites_are_the_true_pixels_in_lexicographic_order(mask: Tensor) -> None:
    sites = SiteSet.from_mask(mask)
    assert rows(sites) == sorted(active(mask))
    assert torch.equal(sites_from_mask(mask), sites.sites)
    assert sites.sites.dtype == torch.int64 and sites.bordered_grid.dtype == torch.int32
    assert torch.equal(sites.mask, mask)
    inner = sites.bordered_grid[:, 1:-1, 1:-1]
    assert torch.equal(inner.reshape(-1)[sites.flat], torch.arange(len(sites), dtype=torch.int32))
    assert torch.equal(inner < len(sites), mask)
    assert int((sites.bordered_grid == len(sites)).sum()) == sites.bordered_grid.numel() - len(sites)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(masks(), st.sampled_from(STRIDE_MODES))
def test_maps_hold_exactly_the_pairs_of_the_definition(mask: Tensor, mode: str) -> None:
    fine = SiteSet.from_mask(mask)
    coarse, down = strided(fine, mode)
    assert rows(coarse) == coarse_by_definition(rows(fine), mode)
    shapes = {
        "dilate": [(size - 1) // 2 for size in mask.shape[1:]],
        "floor": [(s + 1) // 2 for s in mask.shape[1:]],
    }
    assert coarse.shape == (mask.shape[0], *shapes[mode])

    index = {site: i for i, site in enumerate(rows(fine))}
    for kernel_map, outputs, stride, padding in (
        (down, rows(coarse), 2, PADDING[mode]),
        (submanifold_map(fine), rows(fine), 1, 1),
    ):
        expected = [
            [index.get((b, stride * h + k % 3 - padding, stride * w + k // 3 - padding), len(fine)) for k in range(9)]
            for b, h, w in outputs
        ]
        table = kernel_map.out_to_in
        assert table.tolist() == expected
        assert kernel_map.pairs == kernel_map.transposed.pairs == int((table < len(fine)).sum())
        # The reverse table holds the same pairs.
        reverse = torch.full((len(fine) + 1, 9), kernel_map.n_out, dtype=torch.int32)
        for k in range(9):
            reverse[table[:, k].long(), k] = torch.arange(kernel_map.n_out, dtype=torch.int32)
        assert torch.equal(kernel_map.transposed.out_to_in, reverse[:-1])


def test_submanifold_reverse_is_the_flipped_table() -> None:
    kernel_map = submanifold_map(SiteSet.from_mask(torch.rand(2, 7, 5, generator=torch.Generator()) < 0.5))
    assert torch.equal(kernel_map.transposed.out_to_in, kernel_map.out_to_in.flip(1))


@pytest.mark.parametrize(
    ("pixels", "coarse"),
    [
        # The largest coordinate, 4, is even: o <= 1.  (2, 2) lies in four windows, (4, 4) in that of (1, 1).
        ([(2, 2), (4, 4)], [(0, 0), (0, 1), (1, 0), (1, 1)]),
        # 5 is odd: still o <= 1, whose window ends at 4, so pixel (5, 5) has no coarse path.
        ([(0, 0), (5, 5)], [(0, 0)]),
        ([(0, 0), (5, 4)], [(0, 0)]),
        # Alone, its own coordinate is the limit: o <= (2 - 2) // 2 = 0 though the image is larger.
        ([(2, 2)], [(0, 0)]),
        ([(3, 3)], []),
        # Coordinates 0 and 1 give a negative limit: no coarse pixel at all.
        ([(0, 0)], []),
        ([(1, 1)], []),
        ([(1, 1), (2, 2)], [(0, 0)]),
        # Limits are per axis: rows o <= 2, columns o <= 0.
        ([(6, 2), (0, 1)], [(0, 0), (2, 0)]),
    ],
)
def test_dilate_limit_by_hand(pixels: list[tuple[int, int]], coarse: list[tuple[int, int]]) -> None:
    mask = torch.zeros(1, 9, 8, dtype=torch.bool)
    for row, column in pixels:
        mask[0, row, column] = True
    assert rows(strided(SiteSet.from_mask(mask), "dilate")[0]) == [(0, row, column) for row, column in coarse]


def test_dilate_limit_is_that_of_the_whole_batch() -> None:
    mask = torch.zeros(2, 9, 9, dtype=torch.bool)
    mask[0, 3, 3] = True  # alone: limit 0, and no window up to 2 holds it
    assert len(strided(SiteSet.from_mask(mask), "dilate")[0]) == 0
    mask[1, 6, 6] = True  # raises the limit for both images
    assert rows(strided(SiteSet.from_mask(mask), "dilate")[0]) == [(0, 1, 1), (1, 2, 2)]


def test_parity_groups_hold_no_tap_that_cannot_be_met() -> None:
    full = SiteSet.from_mask(torch.ones(1, 9, 9, dtype=torch.bool))
    for mode, first in (("dilate", 4), ("floor", 1)):
        groups = strided(full, mode)[1].backward
        by_parity = {}
        for group in groups:
            assert group.rows is not None and group.table.shape == (len(group.rows), len(group.taps))
            (parity,) = {(h % 2, w % 2) for _, h, w in full.sites[group.rows].tolist()}
            by_parity[parity] = len(group.taps)
        assert by_parity == {(0, 0): first, (0, 1): 2, (1, 0): 2, (1, 1): 5 - first}


@settings(max_examples=30, deadline=None, derandomize=True)
@given(masks(), st.sampled_from(STRIDE_MODES))
def test_pyramid_is_the_chain_of_its_levels(mask: Tensor, mode: str) -> None:
    pyramid = Pyramid.build(mask, 5, mode)
    assert len(pyramid) == len(pyramid.levels) == len(pyramid.submanifold) == 5 and len(pyramid.strided) == 4
    for level in range(4):
        coarse, kernel_map = strided(pyramid.levels[level], mode)
        assert rows(coarse) == rows(pyramid.levels[level + 1])
        assert torch.equal(kernel_map.out_to_in, pyramid.strided[level].out_to_in)
        expected = submanifold_map(pyramid.levels[level]).out_to_in
        assert torch.equal(pyramid.submanifold[level].out_to_in, expected)


def test_pyramid_of_a_mask_that_is_not_contiguous() -> None:
    mask = torch.rand(6, 8, 2, generator=torch.Generator().manual_seed(3)) < 0.5
    view = mask.permute(2, 1, 0)
    assert torch.equal(Pyramid.build(view, 2).levels[1].sites, Pyramid.build(view.contiguous(), 2).levels[1].sites)


def test_gather_and_scatter_are_inverse_and_differentiable() -> None:
    generator = torch.Generator().manual_seed(0)
    sites = SiteSet.from_mask(torch.rand(2, 5, 4, generator=generator) < 0.4)
    features = torch.randn(len(sites), 3, dtype=torch.float64, generator=generator).requires_grad_()
    dense = sites.scatter(features, fill=-7.0)
    assert dense.shape == (2, 3, 5, 4)
    for row, (b, h, w) in enumerate(rows(sites)):
        assert torch.equal(dense[b, :, h, w], features[row])
    assert bool((dense.permute(0, 2, 3, 1)[~sites.mask] == -7.0).all())
    assert torch.equal(sites.gather(dense), features)
    assert torch.autograd.gradcheck(lambda x: sites.gather(sites.scatter(x) * 2), (features,))


def test_errors_name_the_value_and_the_remedy() -> None:
    mask = torch.ones(1, 4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"\(4, 4\).*mask\[None\]"):
        SiteSet.from_mask(mask[0])
    with pytest.raises(ValueError, match=r"torch.float32: give torch.bool"):
        Pyramid.build(mask.float(), 2)
    with pytest.raises(ValueError, match=r"'ceil' is unknown: use one of dilate, floor"):
        Pyramid.build(mask, 1, "ceil")
    with pytest.raises(ValueError, match=r"'ceil' is unknown: use one of dilate, floor"):
        strided(SiteSet.from_mask(mask), "ceil")
    with pytest.raises(ValueError, match=r"levels is 0"):
        Pyramid.build(mask, 0)
    sites = SiteSet.from_mask(mask)
    with pytest.raises(ValueError, match=r"\(1, 3, 4, 5\).*give \[1, C, 4, 4\]"):
        sites.gather(torch.zeros(1, 3, 4, 5))
    with pytest.raises(ValueError, match=r"\(15, 2\).*give \[16, C\]"):
        sites.scatter(torch.zeros(15, 2))
