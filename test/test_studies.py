"""The ablations: their selections, bins and tables against naive counts, a training of one step.

Shape shorthand: K classes, H, W native size, h, w low resolution.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from sparserefine_ros.cli import main
from sparserefine_ros.datasets.base import UNLABELLED, Sample
from sparserefine_ros.datasets.classes import CAMVID
from sparserefine_ros.errors import BundleError, TrainingError
from sparserefine_ros.evaluation.compare import HR, LR, REFINED
from sparserefine_ros.evaluation.metrics import ConfusionMatrix
from sparserefine_ros.networks.refiner import SparseRefiner
from sparserefine_ros.networks.selectors import Prediction
from sparserefine_ros.segmenter.bundle import Bundle
from sparserefine_ros.segmenter.segmenter import Segmenter
from sparserefine_ros.studies import channels, classes, ensemblers, inputs, objects, selectors, threshold
from sparserefine_ros.studies.features import FeatureTap
from sparserefine_ros.studies.objects import count_by_size, region_sizes
from sparserefine_ros.studies.opened import Opened
from sparserefine_ros.studies.report import Setting
from sparserefine_ros.studies.trainings import base_args, recipe_of, run_name
from sparserefine_ros.studies.variants import FeatureTask, Variant, build_variant

CPU = torch.device("cpu")


def scene(seed: int) -> Sample:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 11, (8, 12)).astype(np.uint8).repeat(8, 0).repeat(8, 1)  # [64, 96]
    image = (np.array(CAMVID.palette)[label] * 0.6 + rng.uniform(0, 90, (64, 96, 3))).astype(np.uint8)
    label[:4] = UNLABELLED
    return Sample(image, label, str(seed), seed)


SCENES = [scene(i) for i in range(5)]


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    """The tiny bundle at a threshold that selects about a third of these scenes."""
    plain = Bundle.load(tiny_bundle)
    results = Segmenter(plain, "cpu").segment([s.image for s in SCENES], refine=False)
    value = round(float(np.quantile(np.stack([r.entropy for r in results]), 0.66)), 3)
    stage = {
        "network": "sparserefine", "args": {}, "epochs": 24, "batch": 2, "crop": [48, 72], "scale": [1.0, 1.0],
        "lr": 0.002, "ema": 0.995,
    }  # fmt: skip
    provenance = {"dataset": {"kind": "camvid"}, "refiner": stage}
    return replace(plain, entropy_threshold=value, provenance=provenance)


@pytest.fixture
def setting(bundle: Bundle, tmp_path: Path) -> Setting:
    setting = Setting(bundle, SCENES, None, tmp_path / "runs", CPU, 1, "sparserefine study")
    setting.train = SCENES[:2]
    return setting


def miou(masks: list[np.ndarray]) -> float:
    matrix = ConfusionMatrix(CAMVID)
    for sample, mask in zip(SCENES, masks, strict=True):
        matrix.update(sample.label, mask)
    return matrix.miou()


def test_opened_pipeline_equals_the_segmenter(bundle: Bundle) -> None:
    opened = Opened(bundle, CPU)
    for sample in SCENES[:2]:
        expected = opened.segmenter.segment([sample.image])[0]
        prediction = opened.look(sample)
        selected = torch.from_numpy(expected.entropy > bundle.entropy_threshold)[None]
        np.testing.assert_array_equal(opened.refine(sample, prediction, selected), expected.mask)
        plain = opened.segmenter.segment([sample.image], refine=False)[0]
        unrefined = opened.refine(sample, prediction, torch.zeros_like(selected))
        np.testing.assert_array_equal(unrefined, plain.mask)
        assert not np.array_equal(plain.mask, expected.mask)
    with pytest.raises(BundleError, match="has no refiner"):
        Opened(replace(bundle, refiner=None), CPU)


def test_scores_against_naive_ones() -> None:
    """Three probabilities by hand, in a row of two low-resolution pixels over 2x4 native ones; Sobel by its sums."""
    p = np.array([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25]])
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.normal(size=(1, 3, 2, 4))).float()
    features = torch.tensor([[3.0, 4.0], [0.0, 1.0]]).T[None, :, None]  # [1, 2, 1, 2]: norms 5 and 1
    logits = torch.from_numpy(np.log(p)).float().T[None, :, None]  # [1, 3, 1, 2]
    prediction = Prediction(logits, (2, 4), images, features)

    def spread(values: list[float]) -> np.ndarray:
        return np.array(values)[None].repeat(2, 0).repeat(2, 1)

    expected = {
        "confidence": spread([-0.7, -0.4]),
        "margin": spread([-0.5, -0.05]),
        "entropy": spread([float(-(row * np.log(row)).sum()) for row in p]),
        "feature magnitude": spread([5.0, 1.0]),
    }
    padded = np.pad(images[0].numpy(), ((0, 0), (1, 1), (1, 1)), mode="edge")
    edges = np.zeros((2, 4))
    kernel = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    for row in range(2):
        for column in range(4):
            for colour in padded[:, row : row + 3, column : column + 3]:
                edges[row, column] += (colour * kernel).sum() ** 2 + (colour * kernel.T).sum() ** 2
    expected["image edges (Sobel)"] = edges
    for name, values in expected.items():
        np.testing.assert_allclose(selectors.SCORES[name](prediction, 0).numpy(), values, rtol=1e-4, err_msg=name)
    first, same, other = (selectors.SCORES["random"](prediction, seed) for seed in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_selectors_table_equals_naive_counts(setting: Setting) -> None:
    """Entropy and confidence by sorting, the oracle by comparing; refined by the segmenter's own refiner."""
    report = selectors.study(setting)
    rows = {row["selector"]: row for row in report.data["rows"]}
    opened = Opened(setting.bundle, CPU)
    masks: dict[str, list[np.ndarray]] = {"entropy": [], "confidence": [], selectors.ORACLE: []}
    counts = {name: np.zeros(4) for name in masks}  # selected, selected labelled, wrong, wrong selected
    for sample in SCENES:
        assert sample.label is not None
        result = opened.segmenter.segment([sample.image], refine=False)[0]
        count = int((result.entropy > setting.bundle.entropy_threshold).sum())
        prediction = opened.look(sample)
        confidence = prediction.logits.softmax(1).amax(1)[0].numpy().repeat(2, 0).repeat(2, 1)
        known = sample.label != UNLABELLED
        wrong = known & (result.mask != sample.label)
        surest_last = np.zeros(wrong.size, bool)
        surest_last[np.argsort(confidence.ravel(), kind="stable")[:count]] = True
        chosen = {
            "entropy": result.entropy > setting.bundle.entropy_threshold,
            "confidence": surest_last.reshape(wrong.shape),
            selectors.ORACLE: wrong,
        }
        for name, pixels in chosen.items():
            counts[name] += [pixels.sum(), (pixels & known).sum(), wrong.sum(), (wrong & pixels).sum()]
            masks[name].append(opened.refine(sample, prediction, torch.from_numpy(pixels)[None]))
    assert set(rows) == {*selectors.SCORES, selectors.ORACLE}
    for name, (selected, labelled, wrong_pixels, found) in counts.items():
        row = rows[name]
        assert row["density"] == pytest.approx(selected / (5 * 64 * 96)), name
        assert row["recall"] == pytest.approx(found / wrong_pixels), name
        assert row["precision"] == pytest.approx(found / labelled), name
        assert row["miou"] == pytest.approx(miou(masks[name])), name
    assert {row["density"] for name, row in rows.items() if name != selectors.ORACLE} == {rows["entropy"]["density"]}
    assert rows["random"]["curve"][15] == pytest.approx(0.3, abs=0.05)  # recall of 30 % of the pixels, at random
    assert report.cells[0][-1] == f"{100 * report.data['miou_lr']:.2f}"


def test_threshold_table_equals_the_segmenter(setting: Setting) -> None:
    rows = {row["threshold"]: row for row in threshold.study(setting).data["rows"]}
    own = setting.bundle.entropy_threshold
    assert list(rows)[0] is None and own in rows and list(rows)[-1] == 0.0
    assert not [t for t in rows if t is not None and 0 < abs(t - own) <= 0.05]
    segmenter = Segmenter(setting.bundle, "cpu")
    plain = [r.mask for r in segmenter.segment([s.image for s in SCENES], refine=False)]
    assert rows[None]["miou"] == pytest.approx(miou(plain)) and rows[None]["density"] == 0
    wrong = [(s.label != UNLABELLED) & (s.label != m) for s, m in zip(SCENES, plain, strict=True)]
    for value in (1.3, own, 0.0):
        segmenter.entropy_threshold = value
        results = [segmenter.segment([s.image])[0] for s in SCENES]
        assert rows[value]["miou"] == pytest.approx(miou([r.mask for r in results]), rel=1e-3)  # counted layer by layer
        assert rows[value]["density"] == pytest.approx(np.mean([r.density for r in results]))
        found = sum(int((w & (r.entropy > value)).sum()) for w, r in zip(wrong, results, strict=True))
        assert rows[value]["recall"] == pytest.approx(found / sum(int(w.sum()) for w in wrong))
    assert rows[0.0]["macs_g"] > rows[own]["macs_g"] > rows[None]["macs_g"] > 0


def test_classes_table_has_every_class_and_its_share(setting: Setting) -> None:
    rows = {row["class"]: row for row in classes.study(setting).data["rows"]}
    assert list(rows) == [*CAMVID.names, "mean"]
    labels = np.stack([s.label for s in SCENES])
    assert rows["car"]["share"] == pytest.approx((labels == 8).sum() / (labels != UNLABELLED).sum())
    refined = [r.mask for r in Segmenter(setting.bundle, "cpu").segment([s.image for s in SCENES])]
    assert rows["mean"][REFINED] == pytest.approx(miou(refined), rel=1e-3)  # counted frames run layer by layer
    guesses = np.stack(refined)
    both = ((guesses == 8) & (labels == 8)).sum()
    either = ((guesses == 8) & (labels != UNLABELLED)).sum() + (labels == 8).sum() - both
    assert rows["car"][REFINED] == pytest.approx(both / either, rel=1e-3)


def test_regions_are_connected_pixels_of_one_class() -> None:
    label = np.array(
        [
            [0, 0, 1, 1, 255],
            [0, 1, 0, 1, 255],
            [2, 2, 2, 2, 0],
        ],
        np.uint8,
    )
    expected = [[4, 4, 4, 4, 0], [4, 4, 4, 4, 0], [4, 4, 4, 4, 1]]  # corners connect, also 0 at (0, 1) with (1, 2)
    assert region_sizes(label).tolist() == expected


def test_regions_equal_a_flood_fill() -> None:
    rng = np.random.default_rng(1)
    label = rng.integers(0, 3, (13, 17)).astype(np.uint8)
    label[rng.random(label.shape) < 0.1] = UNLABELLED
    sizes, seen = np.zeros(label.shape, int), set()
    for start in np.ndindex(*label.shape):
        if start in seen or label[start] == UNLABELLED:
            continue
        region, open_ = {start}, [start]
        while open_:
            y, x = open_.pop()
            for near in ((y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)):
                inside = 0 <= near[0] < 13 and 0 <= near[1] < 17
                if inside and near not in region and label[near] == label[start]:
                    region.add(near)
                    open_.append(near)
        seen |= region
        for place in region:
            sizes[place] = len(region)
    np.testing.assert_array_equal(region_sizes(label), sizes)


def test_right_pixels_are_counted_by_size() -> None:
    label = np.zeros((40, 40), np.uint8)  # 1600 pixels less the others
    label[2:5, 2:5] = 1  # 9 pixels
    label[10:18, 10:18] = 1  # 64: the second bin
    label[30:38, 0:8] = UNLABELLED
    mask = label.copy()
    mask[2, 2:5] = 0
    mask[10, 10] = 7
    mask[30:38, 0:8] = 3  # nobody knows
    counts = count_by_size(label, {LR: label * 0, REFINED: mask})
    assert counts["regions"].tolist()[:4] == [1, 1, 0, 1]
    assert counts["pixels"].tolist()[:4] == [9, 64, 0, 1600 - 9 - 64 - 64]
    assert counts[LR].tolist()[:4] == [0, 0, 0, 1600 - 9 - 64 - 64]
    assert counts[REFINED].tolist()[:4] == [6, 63, 0, 1600 - 9 - 64 - 64]


def test_objects_table_equals_the_segmenters(setting: Setting) -> None:
    rows = objects.study(setting).data["rows"]
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    labels = np.stack([s.label for s in SCENES])
    known = labels != UNLABELLED
    for name, keywords in ((LR, {"refine": False}), (REFINED, {}), (HR, {"refine": False, "scale": 1.0})):
        masks = [r.mask for r in Segmenter(setting.bundle, "cpu", **keywords).segment([s.image for s in SCENES])]
        right = (np.stack(masks) == labels)[known].mean()
        assert sum(row["share"] * row[name] for row in rows) == pytest.approx(right)


def test_ensemblers_table_equals_naive_choices(setting: Setting) -> None:
    report = ensemblers.study(setting)
    opened = Opened(setting.bundle, CPU)
    masks: dict[str, list[np.ndarray]] = {"direct": [], "entropy": [], "residual": [], "gated": [], "oracle": []}
    for sample in SCENES:
        assert sample.label is not None
        prediction = opened.look(sample)
        selected = opened.uncertain(prediction)
        flat, y1, y2 = opened.predictions(sample, prediction, selected)
        y1, y2 = y1.double().numpy(), y2.double().numpy()
        p1, p2 = (np.exp(y) / np.exp(y).sum(1, keepdims=True) for y in (y1, y2))
        e1, e2 = (-(p * np.log(p)).sum(1) for p in (p1, p2))
        c1, c2 = y1.argmax(1), y2.argmax(1)
        truth = sample.label.ravel()[flat]
        choices = {
            "direct": c2,
            "entropy": np.where(e1 < e2, c1, c2),
            "residual": (y1 + y2).argmax(1),
            "oracle": np.where((c1 == truth) & (c2 != truth), c1, c2),
        }
        for name, choice in choices.items():
            mask = opened.initial_mask(prediction)[0].numpy().copy()
            mask.ravel()[flat] = choice
            masks[name].append(mask)
        masks["gated"].append(opened.segmenter.segment([sample.image])[0].mask)
    assert [row["ensembler"].split(":")[0] for row in report.data["rows"]] == list(masks)
    for row, (name, made) in zip(report.data["rows"], masks.items(), strict=True):
        assert row["miou"] == pytest.approx(miou(made), rel=1e-3), name
        assert row["gain"] == pytest.approx(row["miou"] - report.data["miou_lr"])
    assert report.data["rows"][-1]["miou"] > report.data["rows"][0]["miou"]


def test_variants_read_what_they_say(bundle: Bundle) -> None:
    base = base_args(bundle)
    assert base["channels"] == [8, 16] and base["ensembler"] == "gated" and not base["context"]
    shapes = {}
    for variant in (*inputs.variants(base), *channels.variants(base)):
        refiner = build_variant(variant, 11, 5)
        unet = refiner.unet
        shapes[variant.label] = unet.layers[0].in_features if variant.pointnet else unet.stem.weight.shape[1]
    assert list(shapes.values())[:3] == [3, 3 + 11, 3 + 5]
    widths = [v.args["channels"] for v in channels.variants(base)]
    assert widths == [[4, 8], [8, 16], [16, 32], [8, 16]]
    names = [run_name(v) for v in (*inputs.variants(base), *channels.variants(base))]
    assert len(set(names)) == len(names) - 1  # the paper's refiner is in both tables, and trained once
    assert names[0] == names[4] == "unet8-16-gated"


def test_pointnet_sees_no_neighbours() -> None:
    torch.manual_seed(0)
    refiner = build_variant(Variant("", {"channels": [8, 16]}, pointnet=True), 4, 0).eval()
    pyramid = refiner.pyramid(torch.ones(1, 4, 5, dtype=torch.bool))
    pixels, initial = torch.randn(20, 3), torch.randn(20, 4)
    whole = refiner(pixels, initial, pyramid).refined
    pixels[1:] += 1
    np.testing.assert_allclose(refiner(pixels, initial, pyramid).refined[0].detach(), whole[0].detach(), rtol=1e-5)
    layers = refiner.unet.layers
    expected = pixels
    for i in range(0, len(layers), 3):  # Linear, norm of running statistics 0 and 1, ReLU
        expected = (expected @ layers[i].weight.T / math.sqrt(1 + layers[i + 1].eps)).clamp_min(0)
    torch.testing.assert_close(refiner.features(pixels, pyramid), expected, rtol=1e-4, atol=1e-5)


def test_features_are_what_the_classifier_reads(setting: Setting) -> None:
    bundle = setting.bundle
    dense = Segmenter(bundle, "cpu", refine=False).dense
    torch.manual_seed(0)
    refiner = build_variant(Variant("", base_args(bundle), features=True), 11, FeatureTap(dense).channels).eval()
    task = FeatureTask(refiner, dense, CAMVID, SCENES, SCENES, recipe_of(bundle, 1), 0.5, 0.0, CPU)
    logits = task.dense(torch.randn(1, 3, 32, 48))
    tap = task.tap.latest
    assert tap is not None and tap.shape[1] == FeatureTap(dense).channels == 8
    again = torch.nn.functional.interpolate(dense.classifier(tap), (32, 48), mode="bilinear", align_corners=False)
    torch.testing.assert_close(again, logits)
    images = torch.randint(0, 256, (1, 64, 96, 3), dtype=torch.uint8)
    sites = refiner.pyramid(torch.rand(1, 64, 96) < 0.1).levels[0]
    rows = task.inputs(images, sites)
    place = sites.sites[7]
    y, x = (int(place[i + 1]) * tap.shape[i + 2] // (64, 96)[i] for i in (0, 1))
    torch.testing.assert_close(rows[7, 3:], tap[0, :, y, x])
    assert rows.shape == (len(sites), 11)
    with pytest.raises(TrainingError, match="no 1x1 classifier"):
        FeatureTask(
            refiner, torch.nn.Conv2d(3, 11, 1), CAMVID, SCENES, SCENES, recipe_of(bundle, 1), 0.5, 0.0, CPU
        )  # fmt: skip


@pytest.fixture
def camvid(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for kind in ("image", "label"):
            (tmp_path / "data" / split / kind).mkdir(parents=True)
        for i, sample in enumerate(SCENES[:2]):
            cv2.imwrite(str(tmp_path / "data" / split / "image" / f"{i}.jpg"), sample.image)
            label = np.where(sample.label == UNLABELLED, 11, sample.label)
            cv2.imwrite(str(tmp_path / "data" / split / "label" / f"{i}.png"), label)
    return tmp_path / "data"


def test_one_command_trains_one_step_and_writes_all(
    bundle: Bundle, camvid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(bundle.path, tmp_path / "tiny"))
    replace(bundle, path=model).save()
    out, runs = tmp_path / "out", tmp_path / "runs"
    arguments = [
        "study",
        "inputs",
        "--model",
        str(model),
        "--data",
        str(camvid),
        "--epochs",
        "1",
        "--device",
        "cpu",
    ]
    arguments += ["--out", str(out), "--runs", str(runs), "--threads", "1"]
    assert main(arguments) == 0
    first = json.loads((out / "inputs.json").read_text())
    assert first["budget"] == {
        "epochs": 1, "batch": 2, "crop": [32, 48], "ema": 0.98, "steps": 1, "train_frames": 2,
    }  # fmt: skip
    rows = {row["label"]: row for row in first["rows"]}
    assert list(rows) == ["RGB", "RGB, logits", "RGB, features"] and first["frames"] == 2
    args = {"channels": [8, 16], "stride": "floor", "blocks": 1}
    parameters = sum(p.numel() for p in SparseRefiner(11, **args).parameters())
    assert rows["RGB"]["params_m"] == pytest.approx(parameters / 1e6)
    for label, more in (("RGB, logits", 11), ("RGB, features", 8)):  # columns of the stem: 3x3 kernels to 8 channels
        assert rows[label]["params_m"] == pytest.approx((parameters + 9 * more * 8) / 1e6)
    text = (out / "inputs.md").read_text()
    assert "sparserefine study inputs --model tiny --data PATH_TO_DATA --epochs 1 --threads 1" in text
    assert str(tmp_path) not in text and "1 steps of 2 crops of 48x32" in text
    assert (out / "inputs.png").stat().st_size > 5_000
    logs = sorted(runs.rglob("*.ckpt"))
    stamps = [log.stat().st_mtime_ns for log in logs]
    assert len(logs) == 3
    assert main(arguments) == 0  # nothing left to train
    assert [log.stat().st_mtime_ns for log in logs] == stamps
    assert json.loads((out / "inputs.json").read_text()) == first
    capsys.readouterr()
    assert main([*arguments[:-1], "0"]) == 2
    assert "--threads is 0; give 1 or more" in capsys.readouterr().err


def test_a_study_of_a_part_of_the_frames_replaces_none_of_all(
    bundle: Bundle, camvid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace(bundle, path=Path(shutil.copytree(bundle.path, tmp_path / "tiny"))).save()
    monkeypatch.chdir(tmp_path)
    words = ["study", "threshold", "--model", str(tmp_path / "tiny"), "--data", str(camvid), "--device", "cpu"]
    assert main([*words, "--frames", "1"]) == 2
    assert "say with --out where it shall go" in capsys.readouterr().err and not Path("docs").exists()
    assert main([*words, "--frames", "1", "--out", "part"]) == 0
    assert (
        "sparserefine study threshold --model tiny --data PATH_TO_DATA --frames 1 --out FOLDER"
        in (tmp_path / "part" / "threshold.md").read_text()
    )


def test_a_bundle_without_a_trained_refiner_has_no_recipe(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="has no refiner of `sparserefine train`; choose camvid or street"):
        recipe_of(replace(bundle, provenance={}), 4)
