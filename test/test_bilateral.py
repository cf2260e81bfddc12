"""The training-free refiner: its sum written out, and a segmenter that runs it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from compiler import needs_compiler

from sparserefine_ros.networks import bilateral
from sparserefine_ros.networks.bilateral import BilateralRefiner
from sparserefine_ros.networks.macs import counting_refiner_macs
from sparserefine_ros.segmenter.bundle import Bundle, save_network
from sparserefine_ros.segmenter.segmenter import Segmenter
from sparserefine_ros.sparse import SiteSet

ARGS = {"radius": 1, "step": 2, "distance": 1.5, "colour": 0.2, "initial": 0.25}


@pytest.fixture(params=[pytest.param("c", marks=needs_compiler), "torch"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(bilateral, "load_if_possible", lambda source: None)
    return str(request.param)


@pytest.mark.parametrize("size", [(8, 12), (9, 13), (4, 6)])
def test_equals_the_sum_written_out(size: tuple[int, int], engine: str) -> None:
    rng = np.random.default_rng(0)
    (high, wide), (h, w), classes = size, (4, 6), 5
    native, low = rng.integers(0, 256, (2, high, wide, 3), np.uint8), rng.integers(0, 256, (2, h, w, 3), np.uint8)
    p = torch.randn(2, classes, h, w).softmax(1)
    mask = torch.from_numpy(rng.random((2, high, wide)) < 0.4)
    sites = SiteSet.from_mask(mask)
    found = BilateralRefiner(classes, **ARGS)(sites, torch.from_numpy(native), torch.from_numpy(low), p)
    for n, (b, i, j) in enumerate(sites.sites.tolist()):
        own_row, own_column = i * h // high, j * w // wide
        y, x = (i + 0.5) * h / high - 0.5, (j + 0.5) * w / wide - 0.5
        total, mean = 0.0, np.zeros(classes)
        for dy in (-2, 0, 2):
            for dx in (-2, 0, 2):
                row, column = min(max(own_row + dy, 0), h - 1), min(max(own_column + dx, 0), w - 1)
                distance = (own_row + dy - y) ** 2 + (own_column + dx - x) ** 2
                colour = ((native[b, i, j] / 255 - low[b, row, column] / 255) ** 2).sum()
                weight = math.exp(-distance / (2 * 1.5**2) - colour / (2 * 0.2**2))
                total, mean = total + weight, mean + weight * p[b, :, row, column].double().numpy()
        expected = 0.25 * p[b, :, own_row, own_column].double().numpy() + 0.75 * mean / total
        np.testing.assert_allclose(found[n].exp().numpy(), expected, rtol=1e-4, atol=1e-6)


@needs_compiler
@pytest.mark.parametrize(("classes", "radius"), [(2, 0), (19, 2), (255, 3), (256, 1), (3, 16)])
def test_engines_agree(classes: int, radius: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a class has no probability, a colour decides alone, and a value is not finite."""
    torch.manual_seed(0)
    refiner = BilateralRefiner(classes, radius, distance=0.5, colour=0.01)
    native, low = (torch.randint(0, 256, (2, side, side + 3, 3), dtype=torch.uint8) for side in (31, 12))
    p = (30 * torch.randn(2, classes, 12, 15)).softmax(1).to(memory_format=torch.channels_last)
    p[1, 0, 11, 14] = math.nan
    sites = SiteSet.from_mask(torch.rand(2, 31, 34) < 0.7)
    in_c = refiner(sites, native, low, p)
    monkeypatch.setattr(bilateral, "load_if_possible", lambda source: None)
    plain = refiner(sites, native, low, p)
    assert plain.isnan().any() and not plain.isnan().all()
    torch.testing.assert_close(in_c, plain, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_an_edge_between_low_resolution_pixels_is_found(engine: str) -> None:
    """Black left of column 7, white from there on: low-resolution column 3 covers both, its class is one of them."""
    native = torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    native[:, :, 7:] = 255
    low = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    low[:, :, 3], low[:, :, 4:] = 128, 255
    p = torch.zeros(1, 2, 8, 8)
    p[:, 0, :, :3], p[:, 1, :, 4:] = 0.9, 0.9
    p[:, 0, :, 3] = 0.5
    p[:, 1] = 1 - p[:, 0]
    sites = SiteSet.from_mask(torch.ones(1, 16, 16, dtype=torch.bool))
    found = BilateralRefiner(2)(sites, native, low, p).argmax(1).view(16, 16)
    expected = (torch.arange(16) >= 7).long().expand(16, 16)
    assert torch.equal(found, expected)


def test_a_bundle_names_it_and_needs_no_weights(tiny_bundle: Path, frame: np.ndarray, tmp_path: Path) -> None:
    source = Bundle.load(tiny_bundle)
    (tmp_path / "dense.safetensors").write_bytes((tiny_bundle / "dense.safetensors").read_bytes())
    spec = save_network(tmp_path, BilateralRefiner(11, **ARGS), "bilateral", ARGS, "refiner.safetensors")
    replace(source, path=tmp_path, refiner=spec).save()
    segmenter = Segmenter(Bundle.load(tmp_path), "cpu")
    assert segmenter.refiner is not None
    with counting_refiner_macs(segmenter.refiner) as counts:
        refined = segmenter.segment([frame])[0]
    plain = segmenter.segment([frame], refine=False)[0]
    selected = plain.entropy > segmenter.entropy_threshold
    assert 0.05 < selected.mean() < 0.95
    assert counts == [int(selected.sum()) * 9 * 11]
    np.testing.assert_array_equal(refined.mask[~selected], plain.mask[~selected])
    assert (refined.mask != plain.mask).any()
    assert refined.density == pytest.approx(selected.mean())

    segmenter.entropy_threshold = math.log(11)  # nothing is that uncertain
    np.testing.assert_array_equal(segmenter.segment([frame])[0].mask, plain.mask)


@pytest.mark.parametrize(
    "args",
    [
        {"radius": -1}, {"radius": 1000}, {"radius": 2.5}, {"step": 0}, {"distance": 0.0}, {"colour": 0},
        {"colour": math.nan}, {"initial": 1.5},
    ],
    ids=str,
)  # fmt: skip
def test_refuses(args: dict[str, float]) -> None:
    """A bundle may say anything: what gives no mean, or takes all memory before the first frame, ends its loading."""
    [(name, value)] = args.items()
    with pytest.raises(ValueError, match=f"{name} (is )?{value}.*; give"):
        BilateralRefiner(11, **args)
