"""PointRend: sampling and choice of points against naive versions, subdivision, bundles that run and train it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparserefine_ros.datasets.base import Sample
from sparserefine_ros.datasets.classes import CAMVID
from sparserefine_ros.errors import BundleError, ParameterError, TrainingError
from sparserefine_ros.networks import pointrend as pointrend_module
from sparserefine_ros.networks import points as points_module
from sparserefine_ros.networks.macs import counting_refiner_macs
from sparserefine_ros.networks.pointrend import PointRend
from sparserefine_ros.networks.points import (
    CoarseFine,
    centres,
    most_uncertain,
    sample,
    subdivisions,
    training_points,
    uncertainty,
)
from sparserefine_ros.segmenter.bundle import Bundle, save_network
from sparserefine_ros.segmenter.fitting import check_refiner
from sparserefine_ros.segmenter.preprocess import normalise, resize
from sparserefine_ros.segmenter.segmenter import Segmenter, coarse_and_fine
from sparserefine_ros.sparse import SiteSet
from sparserefine_ros.training import bundle as bundle_module
from sparserefine_ros.training.recipe import Recipe, StageRecipe

K = 3


def random_head(features: int = 5, **args: object) -> PointRend:
    """With a last layer that says something of its own."""
    torch.manual_seed(1)
    head = PointRend(K, features, hidden=7, **args).eval().requires_grad_(False)
    nn.init.normal_(head.predictor.weight)
    return head


def random_maps(batch: int = 2) -> CoarseFine:
    torch.manual_seed(2)
    return CoarseFine(torch.randn(batch, K, 5, 6), (torch.randn(batch, 2, 5, 6), torch.randn(batch, 3, 9, 12)))


def test_points_of_an_uncertain_frame_are_predicted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    head, maps = random_head(), random_maps()
    sites = SiteSet.from_mask(torch.ones(2, 9, 12, dtype=torch.bool))
    expected, rows = head.at_sites(maps, sites), []
    monkeypatch.setattr(pointrend_module, "CHUNK", 50)
    head.register_forward_hook(lambda _, inputs, output: rows.append(len(output)))
    torch.testing.assert_close(head.at_sites(maps, sites), expected)
    assert rows == [50, 50, 8] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_reads_the_same_pixels_of_a_wide_map(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    maps, size = torch.randn(1, 2, 4, 1024).to(dtype), (4, 1024)
    values = sample(maps, centres(torch.arange(4 * 1024), size)[None])
    assert values.dtype == dtype and torch.equal(values[0].T.unflatten(1, size), maps[0])


def bilinear(image: Tensor, x: float, y: float) -> Tensor:
    """[C] of ``image`` [C, h, w], as the four pixels around the point say; beyond the centres, the border's."""
    h, w = image.shape[1:]
    column, row = min(max(x * w - 0.5, 0), w - 1), min(max(y * h - 0.5, 0), h - 1)
    left, top = int(column), int(row)
    right, bottom = min(left + 1, w - 1), min(top + 1, h - 1)
    a, b = column - left, row - top
    upper = (1 - a) * image[:, top, left] + a * image[:, top, right]
    return (1 - b) * upper + b * ((1 - a) * image[:, bottom, left] + a * image[:, bottom, right])


def naive_head(head: PointRend, fine: Tensor, coarse: Tensor) -> Tensor:
    """[K] of one point, by the layers' weights."""
    x = fine
    for layer in head.layers:
        x = (layer.weight @ torch.cat([x, coarse]) + layer.bias).clamp(min=0)
    return head.predictor.weight @ torch.cat([x, coarse]) + head.predictor.bias


def test_values_at_points_are_bilinear() -> None:
    maps, points = random_maps().fine[1], torch.rand(2, 20, 2)
    points[:, 0], points[:, 1] = torch.tensor([0.0, 1.0]), torch.tensor([0.01, 0.99])
    expected = torch.stack(
        [torch.stack([bilinear(m, *p) for p in ps.tolist()]) for m, ps in zip(maps, points, strict=True)]
    )
    torch.testing.assert_close(sample(maps, points), expected, rtol=1e-4, atol=1e-5)
    at_pixels = sample(maps, centres(torch.arange(9 * 12), (9, 12)).expand(2, -1, -1))
    torch.testing.assert_close(at_pixels, maps.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-5)
    nearest = sample(maps, torch.tensor([[[4.49 / 12, 2.51 / 9]]] * 2), "nearest")
    torch.testing.assert_close(nearest[:, 0], maps[:, :, 2, 4])


def test_uncertain_points_against_sorting() -> None:
    logits = random_maps().coarse
    ordered = logits.sort(1).values
    torch.testing.assert_close(uncertainty(logits), ordered[:, -2] - ordered[:, -1])
    for image, found in zip(logits, most_uncertain(logits, 4), strict=True):
        margin = [float(v.sort().values[-1] - v.sort().values[-2]) for v in image.flatten(1).T]
        assert set(found.tolist()) == set(np.argsort(margin)[:4].tolist())
    assert most_uncertain(logits, 1000).sort().values.tolist() == [list(range(30))] * 2


def test_training_points_are_the_most_uncertain_of_three_times_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    coarse, drawn = random_maps().coarse, []
    rand = torch.rand

    def recorded(*size: int, **kwargs: object) -> Tensor:
        drawn.append(rand(*size, **kwargs))  # type: ignore[call-overload]
        return drawn[-1]

    monkeypatch.setattr(points_module.torch, "rand", recorded)
    points = training_points(coarse, 20)
    candidates, uniform = drawn
    assert candidates.shape == (2, 60, 2) and uniform.shape == (2, 5, 2)
    for image in range(2):
        margins = []
        for x, y in candidates[image].tolist():
            values = bilinear(coarse[image], x, y).sort().values
            margins.append(float(values[-1] - values[-2]))
        expected = {tuple(candidates[image, i].tolist()) for i in np.argsort(margins)[:15]}
        assert {tuple(p) for p in points[image, :15].tolist()} == expected
    assert torch.equal(points[:, 15:], uniform)


@pytest.mark.parametrize(
    ("start", "end", "sizes"),
    [
        ((90, 120), (360, 480), [(180, 240), (360, 480)]),
        ((91, 121), (361, 481), [(182, 242), (361, 481)]),
        ((80, 160), (128, 256), [(128, 256)]),  # a factor of 1.6
        ((8, 8), (8, 8), [(8, 8)]),
    ],
)
def test_sizes_of_subdivision(start: tuple[int, int], end: tuple[int, int], sizes: list[tuple[int, int]]) -> None:
    assert list(subdivisions(start, end)) == sizes


def test_subdivision_that_predicts_every_pixel_is_the_perceptron_at_every_pixel() -> None:
    maps, head, size = random_maps(), random_head(points=1.0), (17, 24)
    rendered, share = head.render(maps, size)
    assert share == pytest.approx((10 * 12 + 17 * 24) / (17 * 24))  # every pixel of both steps
    sites = SiteSet.from_mask(torch.ones(2, *size, dtype=torch.bool))
    rows = rendered.permute(0, 2, 3, 1).reshape(-1, K)
    torch.testing.assert_close(head.at_sites(maps, sites), rows, rtol=1e-4, atol=1e-5)
    for image, row, column in ((0, 0, 0), (1, 16, 23), (1, 7, 11), (0, 9, 2)):
        x, y = (column + 0.5) / 24, (row + 0.5) / 17
        fine = torch.cat([bilinear(m[image], x, y) for m in maps.fine])
        expected = naive_head(head, fine, bilinear(maps.coarse[image], x, y))
        torch.testing.assert_close(rendered[image, :, row, column], expected, rtol=1e-4, atol=1e-4)


def test_subdivision_predicts_the_most_uncertain_and_leaves_the_others_bilinear() -> None:
    """Two steps with 4 points each, by hand."""
    maps, head = random_maps(1), random_head(points=4 / (20 * 24))
    rendered, share = head.render(maps, (20, 24))
    assert share == pytest.approx(8 / (20 * 24))
    expected = maps.coarse
    for size in ((10, 12), (20, 24)):
        expected = F.interpolate(expected, size, mode="bilinear", align_corners=False)
        ordered = expected[0].sort(0).values
        for flat in (ordered[-1] - ordered[-2]).flatten().argsort()[:4].tolist():
            row, column = divmod(flat, size[1])
            point = torch.tensor([[[(column + 0.5) / size[1], (row + 0.5) / size[0]]]])
            expected[0, :, row, column] = head.at(maps, point)[0, 0]
    torch.testing.assert_close(rendered, expected, rtol=1e-4, atol=1e-5)


def test_an_untrained_head_is_the_coarse_prediction() -> None:
    maps = random_maps()
    rendered, _ = PointRend(K, 5, points=1 / 8).render(maps, (10, 12))
    torch.testing.assert_close(rendered, F.interpolate(maps.coarse, (10, 12), mode="bilinear"), rtol=1e-4, atol=1e-5)


def write(source: Path, path: Path, head: PointRend, args: dict[str, object]) -> Bundle:
    bundle = bundle_module.copy_dense(Bundle.load(source), path)
    replace(bundle, refiner=save_network(path, head, "pointrend", args, "refiner.safetensors")).save()
    return Bundle.load(path)


@pytest.mark.parametrize("where", ["subdivision", "entropy"])
def test_a_bundle_runs_it(tiny_bundle: Path, frame: np.ndarray, tmp_path: Path, where: str) -> None:
    args = {"features": 16, "hidden": 7, "points": 0.05, "where": where}
    torch.manual_seed(3)
    head = PointRend(11, **args)
    nn.init.normal_(head.predictor.weight)
    segmenter = Segmenter(write(tiny_bundle, tmp_path, head, args), "cpu")
    head = segmenter.refiner  # weights as they were stored
    with counting_refiner_macs(head) as counts:
        results = segmenter.segment([frame, np.ascontiguousarray(frame[::-1])])
    plain = segmenter.segment([frame], refine=False)[0]
    with torch.inference_mode():
        maps = coarse_and_fine(segmenter.dense, normalise(torch.from_numpy(resize(frame, (32, 48)))[None]))
        logits, _ = head.render(maps, (64, 96))
        dense = head.at(maps, centres(torch.arange(64 * 96), (64, 96))[None])[0].argmax(1).view(64, 96)
    if where == "subdivision":
        points = 2 * round(0.05 * 64 * 96)  # strides 4 to 2 to 1
        expected = logits[0].argmax(0)
    else:
        selected = torch.from_numpy(plain.entropy > segmenter.entropy_threshold)
        points = int(selected.sum())
        expected = torch.where(selected, dense, torch.from_numpy(plain.mask).long())
    assert (results[0].mask == expected.numpy()).mean() > 0.999  # a tie may fall the other way by rounding
    assert results[0].density == pytest.approx(points / (64 * 96), abs=1e-6)
    per_point = 7 * (16 + 11) + 2 * 7 * (7 + 11) + 11 * (7 + 11)
    assert sum(counts) == per_point * round(64 * 96 * sum(r.density for r in results))
    assert (results[0].mask != plain.mask).any()


def test_what_does_not_fit_is_named(tiny_bundle: Path, frame: np.ndarray, tmp_path: Path) -> None:
    bundle = write(tiny_bundle, tmp_path, PointRend(11, 9), {"features": 9})
    with pytest.raises(
        BundleError, match="has 16 fine features, refiner 'pointrend' was built for 9; take the refiner"
    ):
        Segmenter(bundle, "cpu")
    with pytest.raises(ValueError, match="has 3 fine features, pointrend was built for 9; write features: 3"):
        PointRend(11, 9)(torch.zeros(2, 3), torch.zeros(2, 11))
    with pytest.raises(ValueError, match="classes is 1; give a whole number from 2"):
        PointRend(1, 9)
    bundle = write(tiny_bundle, tmp_path, PointRend(11, 16), {"features": 16})
    segmenter = Segmenter(bundle, "cpu")
    assert segmenter.refiner is not None
    with pytest.raises(ParameterError, match="'pointrend' reads features of the dense segmenter; set runtime to torch"):
        check_refiner(bundle, segmenter.refiner, segmenter.dense, bundle.dense, "onnxruntime (cpu)")
    with pytest.raises(BundleError, match="network 'compact' does not show; networks that do: compact, hrnet"):
        check_refiner(bundle, segmenter.refiner, nn.Conv2d(3, 11, 1), bundle.dense, "torch")
    with pytest.raises(ValueError, match="where is 'all'"):
        PointRend(11, 9, where="all")
    with pytest.raises(ValueError, match="points 0, "):
        PointRend(11, 9, points=0)


def scene(seed: int) -> Sample:
    """Sky over road, with thin bright poles that low resolution blurs."""
    rng = np.random.default_rng(seed)
    label = np.zeros((48, 64), np.uint8)
    label[24:] = 3
    for column in rng.choice(60, 4, replace=False):
        label[8:40, column : column + 3] = 2
    colours = np.zeros((4, 3))
    colours[[0, 2, 3]] = (120, 160, 220), (220, 40, 40), (90, 90, 90)
    image = (colours[label] + rng.normal(0, 8, (*label.shape, 3))).clip(0, 255).astype(np.uint8)
    return Sample(image, label, str(seed), seed)


def test_training_over_the_dense_network_of_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense network and the threshold are the other bundle's, untouched; the head beats the coarse prediction."""
    scenes = [scene(i) for i in range(8)]
    monkeypatch.setattr(bundle_module, "load_split", lambda *_: (CAMVID, scenes))
    dense = StageRecipe(
        "compact", {"widths": [8, 8, 8, 8], "depths": [1, 1, 1]}, epochs=20, batch=2, crop=(24, 32), scale=(0.5, 0.5),
        lr=1e-2, ema=0.9, validate_every=20,
    )  # fmt: skip
    cpu = torch.device("cpu")
    source = bundle_module.train_bundle(
        Recipe("source", {"kind": "camvid"}, 0.5, dense), None, tmp_path / "runs", tmp_path / "source", cpu
    )
    head = replace(
        dense, network="pointrend", args={"features": 16, "hidden": 32, "train_points": 0.1, "points": 0.1},
        epochs=15, crop=(48, 64), scale=(1.0, 1.0),
    )  # fmt: skip
    recipe = Recipe("pointed", {"kind": "camvid"}, 0.5, bundle=str(tmp_path / "source"), refiner=head)
    bundle = bundle_module.train_bundle(recipe, None, tmp_path / "runs", tmp_path / "pointed", cpu)
    assert Bundle.load(tmp_path / "pointed") == bundle
    assert bundle.dense == source.dense and bundle.entropy_threshold == source.entropy_threshold
    last = json.loads((tmp_path / "runs" / "refiner.jsonl").read_text().splitlines()[-1])
    assert last["miou"] > last["miou_lr"] + 0.01
    assert last["density"] == pytest.approx(2 * 0.1, abs=1e-3)
    with pytest.raises(TrainingError, match="scale 0.4, but bundle .* has 0.5"):
        bundle_module.train_bundle(replace(recipe, scale=0.4), None, tmp_path / "runs", tmp_path / "x", cpu)
    with pytest.raises(TrainingError, match="no training for refiner 'patches'; choose one of sparserefine, pointrend"):
        patches = replace(recipe, refiner=StageRecipe("patches"))
        bundle_module.train_bundle(patches, None, tmp_path / "runs", tmp_path / "x", cpu)
    with pytest.raises(TrainingError, match="would replace the one it comes from"):
        bundle_module.train_bundle(recipe, None, tmp_path / "runs", tmp_path / "source", cpu)
