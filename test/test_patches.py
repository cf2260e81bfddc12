"""Patch refinement: which patches, what the dense segmenter sees of them, and what becomes of the mask."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparserefine_ros.networks.macs import counting_refiner_macs, dense_macs
from sparserefine_ros.networks.patches import PatchRefiner
from sparserefine_ros.segmenter.bundle import Bundle, save_network
from sparserefine_ros.segmenter.segmenter import Segmenter
from sparserefine_ros.training.bundle import copy_dense


class Local(nn.Module):
    """A dense segmenter that sees three pixels around each, and asks no one beyond the image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convs = nn.ModuleList(nn.Conv2d(cin, cout, 3, padding=1) for cin, cout in ((3, 4), (4, 4), (4, 5)))

    def forward(self, crops: Tensor) -> Tensor:  # [n, s, t, 3] uint8 -> [n, 5, s, t]
        x = crops.permute(0, 3, 1, 2).float() / 255
        for conv in self.convs:
            x = F.relu(conv(x))
        return x


@pytest.mark.parametrize("size", [(32, 48), (33, 50), (7, 100)])
@pytest.mark.parametrize("batch", [1, 4])
@torch.no_grad()
def test_patches_with_enough_margin_are_the_whole_image(size: tuple[int, int], batch: int) -> None:
    """Everything selected, and a margin of the network's view: as if the image had been seen at once."""
    dense = Local()
    native = torch.randint(0, 256, (2, *size, 3), dtype=torch.uint8)
    sites, logits, density = PatchRefiner(5, 16, 3, batch=batch)(dense, native, torch.ones(2, *size, dtype=torch.bool))
    assert len(sites) == 2 * size[0] * size[1] and density.tolist() == [1.0, 1.0]
    torch.testing.assert_close(logits, dense(native).permute(0, 2, 3, 1).reshape(-1, 5), rtol=1e-5, atol=1e-6)
    _, bare, _ = PatchRefiner(5, 16, 0)(dense, native, torch.ones(2, *size, dtype=torch.bool))
    assert (bare - logits).abs().max() > 1e-3  # without a margin, what lies beyond a patch is missed


@pytest.mark.parametrize("paste", ["patch", "selected"])
@torch.no_grad()
def test_patches_one_by_one(paste: str) -> None:
    """Against a loop over patches that crops each by itself."""
    dense, size, margin, limit = Local(), 8, 2, 0.1
    native = torch.randint(0, 256, (2, 21, 30, 3), dtype=torch.uint8)
    selected = torch.rand(2, 21, 30) < torch.linspace(0, 0.25, 30)
    expected = torch.full((2, 21, 30, 5), torch.nan)
    share = []
    for image in range(2):
        pixels = 0
        for top in range(0, 21, size):
            for left in range(0, 30, size):
                core = (slice(top, min(top + size, 21)), slice(left, min(left + size, 30)))
                inside = selected[image][core]
                if inside.float().mean() <= limit:
                    continue
                pixels += inside.numel()
                y, x = (min(max(start - margin, 0), n - size - 2 * margin) for start, n in ((top, 21), (left, 30)))
                logits = dense(native[image : image + 1, y : y + 12, x : x + 12])[0].permute(1, 2, 0)
                own = logits[core[0].start - y : core[0].stop - y, core[1].start - x : core[1].stop - x]
                keep = inside if paste == "selected" else torch.ones_like(inside)
                expected[image][core][keep] = own[keep]
        share.append(pixels / (21 * 30))
    sites, logits, density = PatchRefiner(5, size, margin, limit, paste)(dense, native, selected)
    known = ~expected[..., 0].isnan()
    assert 0.05 < known.float().mean() < 0.9
    assert torch.equal(sites.sites, known.nonzero())
    torch.testing.assert_close(logits, expected[known], rtol=1e-5, atol=1e-6)
    assert density.tolist() == pytest.approx(share)


def test_choice_counts_the_pixels_that_a_patch_has() -> None:
    """A patch that is cut off at the border has fewer pixels, and needs fewer."""
    selected = torch.zeros(1, 6, 10, dtype=torch.bool)
    selected[0, 0, :4] = True  # 4 of 16 pixels
    selected[0, 4, 8:] = True  # 2 of 4
    for density, expected in ((0.0, [[0, 0, 0], [0, 1, 2]]), (0.25, [[0, 1, 2]]), (0.5, [])):
        assert PatchRefiner(2, 4, density=density).choose(selected).tolist() == expected


@pytest.mark.parametrize(
    "args", [{"size": 0}, {"margin": -1}, {"density": 1.0}, {"batch": 0}, {"paste": "all"}], ids=lambda a: next(iter(a))
)
def test_refuses(args: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(args))} is .*; (give a|choose one of patch, selected)"):
        PatchRefiner(2, **args)


@pytest.mark.parametrize("native", [False, True])
def test_a_bundle_names_it_and_needs_no_weights(
    tiny_bundle: Path, frame: np.ndarray, tmp_path: Path, native: bool
) -> None:
    """With one patch over the whole image the mask is that of HR dense; smaller ones leave LR's outside."""
    source = copy_dense(Bundle.load(tiny_bundle), tmp_path)
    if native:
        network = Segmenter(Bundle.load(tiny_bundle), "cpu").bundle
        weights = tmp_path / "native.safetensors"
        weights.write_bytes((tmp_path / "dense.safetensors").read_bytes())
        source = replace(source, native=replace(network.dense, weights="native.safetensors"), temperature=1.3)
    hr = Segmenter(source, "cpu", scale=1.0).segment([frame])[0]

    def refined(size: int) -> Segmenter:
        args = {"size": size}
        spec = save_network(tmp_path, PatchRefiner(11, **args), "patches", args, "refiner.safetensors")
        replace(source, refiner=spec).save()
        return Segmenter(Bundle.load(tmp_path), "cpu")

    whole = refined(96).segment([frame])[0]
    np.testing.assert_array_equal(whole.mask, hr.mask)
    assert whole.density == 1

    segmenter = refined(16)
    plain = segmenter.segment([frame], refine=False)[0]
    segmenter.entropy_threshold = float(np.median(plain.entropy.reshape(4, 16, 6, 16).max((1, 3))))
    assert segmenter.refiner is not None
    with counting_refiner_macs(segmenter.refiner) as counts:
        result = segmenter.segment([frame])[0]
    tiles = (plain.entropy > segmenter.entropy_threshold).reshape(4, 16, 6, 16).any((1, 3))
    assert 0.3 < tiles.mean() < 0.7
    assert result.density == pytest.approx(tiles.mean())
    inside = tiles.repeat(16, 0).repeat(16, 1)
    np.testing.assert_array_equal(result.mask[~inside], plain.mask[~inside])
    row, column = np.argwhere(tiles)[0] * 16
    crop = np.ascontiguousarray(frame[row : row + 16, column : column + 16])
    alone = Segmenter(source, "cpu", scale=1.0).segment([crop])[0]
    np.testing.assert_array_equal(result.mask[row : row + 16, column : column + 16], alone.mask)
    with torch.no_grad():
        one = dense_macs(lambda: segmenter.dense(torch.zeros(1, 3, 16, 16)))
    assert counts == [one * int(tiles.sum())]

    segmenter.entropy_threshold = float(np.log(11))
    np.testing.assert_array_equal(segmenter.segment([frame])[0].mask, plain.mask)
