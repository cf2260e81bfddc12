"""Metrics and calibration against torchmetrics, hand-made counts and a brute-force curve."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional as F
from torchmetrics.classification import MulticlassCalibrationError, MulticlassJaccardIndex

from sparserefine_ros.cli import main
from sparserefine_ros.datasets.base import UNLABELLED, Sample
from sparserefine_ros.datasets.classes import CAMVID, CITYSCAPES, ClassList
from sparserefine_ros.evaluation.calibration import calibrate_bundle, density_recall, four_digits
from sparserefine_ros.evaluation.compare import HR, LR, REFINED, compare, markdown, save_json
from sparserefine_ros.evaluation.metrics import ConfusionMatrix
from sparserefine_ros.evaluation.reliability import calibration_error, fit_temperature
from sparserefine_ros.networks.macs import counting_refiner_macs, dense_macs
from sparserefine_ros.networks.refiner import SparseRefiner
from sparserefine_ros.segmenter.bundle import Bundle
from sparserefine_ros.segmenter.head import Head
from sparserefine_ros.segmenter.refining import Sparse
from sparserefine_ros.segmenter.segmenter import Segmenter


def test_iou_equals_torchmetrics() -> None:
    rng = np.random.default_rng(0)
    matrix, reference = ConfusionMatrix(CAMVID), MulticlassJaccardIndex(11, average="none", ignore_index=UNLABELLED)
    for _ in range(3):
        label = rng.integers(0, 11, (40, 50)).astype(np.uint8)
        guess = np.where(rng.random((40, 50)) < 0.6, label, rng.integers(0, 11, (40, 50))).astype(np.uint8)
        label[rng.random((40, 50)) < 0.1] = UNLABELLED
        matrix.update(label, guess)
        reference.update(torch.from_numpy(guess).long(), torch.from_numpy(label).long())
    np.testing.assert_allclose(list(matrix.iou().values()), reference.compute().numpy(), rtol=1e-6)
    assert matrix.miou() == pytest.approx(reference.compute().mean().item(), rel=1e-6)


def test_absent_classes_and_unlabelled_predictions() -> None:
    classes = ClassList("abc", ("a", "b", "c"), ((0, 0, 0), (1, 1, 1), (2, 2, 2)))
    matrix = ConfusionMatrix(classes)
    assert np.isnan(matrix.miou()) and np.isnan(matrix.accuracy())
    matrix.update(np.array([[0, 0, 1, 255]], np.uint8), np.array([[0, 255, 0, 2]], np.uint8))
    iou = matrix.iou()
    assert iou["a"] == pytest.approx(1 / 3)  # hit 1; missed 1 (predicted unlabelled), false 1
    assert iou["b"] == 0 and np.isnan(iou["c"])
    assert matrix.miou() == pytest.approx(1 / 6) and matrix.accuracy() == pytest.approx(1 / 3)


def test_classes_of_one_name_each_count_in_the_mean() -> None:
    matrix = ConfusionMatrix(ClassList("twice", ("other", "road", "other"), ((0, 0, 0),) * 3))
    matrix.update(np.array([[0, 1, 2, 2]], np.uint8), np.array([[0, 1, 1, 2]], np.uint8))
    assert matrix.miou() == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)


def test_ids_and_shapes_that_do_not_fit() -> None:
    matrix = ConfusionMatrix(CAMVID)
    with pytest.raises(ValueError, match="class id 18, but 'camvid' has 11"):
        matrix.update(np.full((2, 2), 18, np.uint8), np.zeros((2, 2), np.uint8))
    with pytest.raises(ValueError, match=r"\(2, 2\) and prediction \(2, 3\)"):
        matrix.update(np.zeros((2, 2), np.uint8), np.zeros((2, 3), np.uint8))


def test_class_lists() -> None:
    assert (len(CAMVID), len(CITYSCAPES)) == (11, 19)
    lut = CITYSCAPES.lut()
    assert lut[13].tolist() == [0, 0, 142] and lut[UNLABELLED].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="2 names but 1 colours"):
        ClassList("x", ("a", "b"), ((0, 0, 0),))


@pytest.fixture
def samples(frame: np.ndarray) -> list[Sample]:
    rng = np.random.default_rng(3)
    frames = [frame, np.ascontiguousarray(frame[:, ::-1]), 255 - frame]
    labels = [rng.integers(0, 11, (8, 12)).repeat(8, 0).repeat(8, 1).astype(np.uint8) for _ in frames]
    labels[0][:5] = UNLABELLED
    return [Sample(f, label, str(i), i) for i, (f, label) in enumerate(zip(frames, labels, strict=True))]


def test_density_recall_curve_equals_brute_force(tiny_bundle: Path, samples: list[Sample]) -> None:
    segmenter = Segmenter(Bundle.load(tiny_bundle), "cpu")
    curve = density_recall(segmenter, samples)
    results = [segmenter.segment([s.image], refine=False)[0] for s in samples]
    for index in (0, 400, 1400, 2400, 3300):
        threshold = curve.thresholds[index]
        chosen = [r.entropy > threshold for r in results]
        known = [s.label != UNLABELLED for s in samples]
        wrong = [k & (r.mask != s.label) for k, r, s in zip(known, results, samples, strict=True)]
        hit = sum(int((c & w).sum()) for c, w in zip(chosen, wrong, strict=True))
        assert curve.density[index] == pytest.approx(np.mean(chosen), abs=1e-3)
        assert curve.recall[index] == pytest.approx(hit / sum(int(w.sum()) for w in wrong), abs=1e-3)
        picked = sum(int((c & k).sum()) for c, k in zip(chosen, known, strict=True))
        assert curve.precision[index] == pytest.approx(hit / max(picked, 1), abs=1e-3)
    assert curve.density[0] == curve.recall[0] == 1
    assert (np.diff(curve.density) <= 0).all() and (np.diff(curve.recall) <= 0).all()
    threshold = curve.threshold_for(0.8)
    assert curve.at(threshold)["recall"] >= 0.8 > curve.at(threshold + 0.01)["recall"]


def test_a_confident_network_has_a_threshold_too() -> None:
    """Its errors may lie among entropies of thousandths: 0, which refines everything, is no answer."""
    rng = np.random.default_rng(0)
    label = np.zeros((300, 400), np.uint8)
    mask = (rng.random(label.shape) < 0.04).astype(np.uint8)  # so many are wrong
    entropy = np.exp(rng.normal(np.log(np.where(mask, 4e-3, 1e-5)), 1.5)).astype(np.float32)
    entropy[rng.random(label.shape) < 0.3] = 0
    sure = SimpleNamespace(
        classes=CITYSCAPES, segment=lambda images, refine: [SimpleNamespace(mask=mask, entropy=entropy)]
    )
    curve = density_recall(sure, [Sample(np.zeros((*label.shape, 3), np.uint8), label, "0", 0)])
    threshold = four_digits(curve.threshold_for(0.5))
    found = float((entropy[mask == 1] > threshold).mean())
    assert threshold > 1e-4 and found == pytest.approx(0.5, abs=0.01)
    for at in (threshold, 2e-4, 5e-3, 0.0):
        assert curve.at(at)["recall"] == pytest.approx(float((entropy[mask == 1] > at).mean()), abs=0.01)
        assert curve.at(at)["density"] == pytest.approx(float((entropy > at).mean()), abs=0.01)


def test_a_refiners_work_is_told_by_frames_that_have_some(tiny_bundle: Path) -> None:
    """A frame without a selected pixel says nothing of what a pixel costs."""
    bundle = Bundle.load(tiny_bundle)
    plain, noisy = np.zeros((64, 96, 3), np.uint8), np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    low = Segmenter(bundle, "cpu", refine=False)
    entropy = [low.segment([image])[0].entropy for image in (plain, noisy)]
    between = replace(bundle, entropy_threshold=float((entropy[0].max() + entropy[1].max()) / 2))
    assert entropy[0].max() < entropy[1].max()
    tables = [
        compare(between, [Sample(image, None, str(i), i) for i, image in enumerate(images)], "cpu")
        for images in ([noisy] * 2 + [plain] * 6, [plain] * 6 + [noisy] * 2, [plain] * 8)
    ]
    work = [table["rows"][REFINED]["macs_g"] - table["rows"][LR]["macs_g"] for table in tables]
    assert work[0] > 0 and work[1] == pytest.approx(work[0]) and np.isnan(work[2])


def test_calibration_is_written_into_the_bundle(
    tiny_bundle: Path, tmp_path: Path, samples: list[Sample], capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(tiny_bundle, tmp_path / "tiny"))
    before = Bundle.load(path).entropy_threshold
    calibrate_bundle(Bundle.load(path), samples, recall=0.5, device="cpu")
    said = capsys.readouterr().out  # both take minutes on many frames
    assert "fitting the temperature" in said and "measuring density and recall" in said
    bundle = Bundle.load(path)
    assert bundle.temperature == 1.0, "a refiner that learnt behind another temperature must not see this one"
    assert bundle.entropy_threshold == bundle.calibration["threshold"] != before
    assert bundle.calibration["recall"] == pytest.approx(0.5, abs=0.02)
    assert (path / "density_recall.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="no labelled pixel"):
        density_recall(Segmenter(bundle, "cpu"), [s._replace(label=None) for s in samples])


def test_command_calibrates_an_imported_bundle_on_a_folder(
    tiny_bundle: Path, tmp_path: Path, samples: list[Sample], capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(tiny_bundle, tmp_path / "tiny"))  # as imported: without a data set in its provenance
    words = ["calibrate", str(path), "--recall", "0.5", "--device", "cpu"]
    assert main(words) == 2
    assert "'tiny' does not say what it was trained on; give labelled frames with --data" in capsys.readouterr().err
    root = tmp_path / "frames"
    (root / "image").mkdir(parents=True)
    (root / "label").mkdir()
    for sample in samples:
        cv2.imwrite(str(root / "image" / f"{sample.name}.png"), sample.image[..., ::-1])
    for names, message in ((CAMVID.names[::-1], "ids must mean the same"), (CAMVID.names, "no labelled pixel in")):
        classes = {"name": "mine", "names": list(names), "palette": [list(colour) for colour in CAMVID.palette]}
        (root / "classes.yaml").write_text(yaml.safe_dump(classes))
        assert main([*words, "--data", str(root)]) == 2
        assert message in capsys.readouterr().err
    for sample in samples:
        assert sample.label is not None
        cv2.imwrite(str(root / "label" / f"{sample.name}.png"), sample.label)
    assert main([*words, "--data", str(root)]) == 0
    found = Bundle.load(path)
    again = Path(shutil.copytree(tiny_bundle, tmp_path / "again"))
    expected = calibrate_bundle(Bundle.load(again), samples, 0.5, "cpu")
    assert found.entropy_threshold == expected.entropy_threshold and found.calibration == expected.calibration


def test_temperature_is_fitted_where_no_refiner_depends_on_it(
    tiny_bundle: Path, tmp_path: Path, samples: list[Sample]
) -> None:
    path = Path(shutil.copytree(tiny_bundle, tmp_path / "tiny"))
    original = Bundle.load(path)
    replace(original, refiner=None).save()
    calibrated = calibrate_bundle(Bundle.load(path), samples, recall=0.5, device="cpu")
    bundle = Bundle.load(path)
    assert bundle.temperature == calibrated.temperature == bundle.calibration["temperature"] != 1
    assert bundle.calibration["nll"] < bundle.calibration["nll_at_temperature_1"]
    tempered, plain = Segmenter(bundle, "cpu"), Segmenter(replace(bundle, temperature=1.0), "cpu")
    x = torch.rand(1, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(tempered.dense(x) * bundle.temperature, plain.dense(x))
    image = samples[0].image
    assert np.array_equal(tempered.segment([image])[0].mask, plain.segment([image])[0].mask)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_the_fitted_temperature_undoes_a_wrong_one(temperature: float) -> None:
    """Labels drawn from softmax(z): the best temperature for z * T is T."""
    generator = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(200_000, 5, generator=generator)
    labels = torch.multinomial(z.softmax(1), 1, generator=generator)[:, 0]
    assert fit_temperature(z * temperature, labels) == pytest.approx(temperature, rel=0.02)
    assert calibration_error(z, labels) < 0.005


def test_calibration_error_by_hand() -> None:
    """Two pixels of confidence 0.9, one right; two of 0.6, both right: (2 |0.9 - 0.5| + 2 |0.6 - 1|) / 4."""
    logits = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]]).log()
    assert calibration_error(logits, torch.tensor([0, 1, 0, 0])) == pytest.approx(0.4)
    generator = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(5000, 7, generator=generator), torch.randint(7, (5000,), generator=generator)
    reference = MulticlassCalibrationError(7, n_bins=15)(logits.softmax(1), labels)
    assert calibration_error(logits, labels) == pytest.approx(float(reference), abs=1e-4)


def test_attention_counts_on_the_cpu() -> None:
    q, k, v = torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 7, 8), torch.zeros(2, 3, 7, 8)
    assert dense_macs(lambda: F.scaled_dot_product_attention(q, k, v)) == 2 * 3 * 5 * 7 * (8 + 8)


def test_refiner_macs_are_pairs_times_channels() -> None:
    refiner = SparseRefiner(5, (4, 8), "floor", blocks=1)
    pyramid = refiner.pyramid(torch.ones(1, 2, 2, dtype=torch.bool))
    with counting_refiner_macs(refiner) as counts:
        refiner(torch.randn(4, 3), torch.randn(4, 5), pyramid)
    fine, coarse, strided = 4 * 4, 1, 4  # each of 2x2 sites sees all four; one coarse site; its window holds all four
    unet = fine * (3 * 4 + 4 * 4 + 4 * 4) + strided * 4 * 8 + coarse * 2 * 8 * 8 + strided * 8 * 4
    unet += fine * (8 * 4 + 4 * 4) + 4 * 8 * 4  # after the skip: two convolutions and the projected shortcut
    heads = 4 * (4 * 5 + 12 * 64 + 64 * 2 + 5 * 64 + 64 * 5)
    assert sum(counts) == unet + heads


def test_refiner_macs_are_the_same_whoever_runs_classifier_and_ensembler(tiny_bundle: Path) -> None:
    segmenter = Segmenter(Bundle.load(tiny_bundle), "cpu", entropy_threshold=0.0)
    assert isinstance(segmenter.refiner, SparseRefiner)
    frame = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    totals = []
    assert isinstance(segmenter.refining, Sparse)
    for head in (segmenter.head, Head(segmenter.refiner)):  # in C where there is a compiler, and in torch
        segmenter.head = head
        segmenter.refining.graphed = lambda *_: pytest.fail("a graph has no layers")  # type: ignore[assignment]
        with counting_refiner_macs(segmenter.refiner) as counts:
            segmenter.segment([frame])
        totals.append(sum(counts))
    assert totals[0] == totals[1]
    k, c = len(segmenter.classes), segmenter.refiner.classifier.in_features
    assert 24 * 32 * (c * k + 2 * (k + 1) * 64 + 64 * 2 + k * 64 + 64 * k) in counts


def test_comparison_scores_all_three_in_one_run(tiny_bundle: Path, samples: list[Sample], tmp_path: Path) -> None:
    bundle = Bundle.load(tiny_bundle)
    table = compare(bundle, samples * 2, "cpu")
    for name, arguments in ((HR, {"refine": False, "scale": 1.0}), (LR, {"refine": False}), (REFINED, {})):
        matrix, segmenter = ConfusionMatrix(bundle.classes), Segmenter(bundle, "cpu", **arguments)
        for s in samples * 2:
            assert s.label is not None
            matrix.update(s.label, segmenter.segment([s.image])[0].mask)
        assert table["rows"][name]["miou"] == matrix.miou()
        assert table["rows"][name]["ms"] > 0
    assert table["ratios"][LR]["macs"] == pytest.approx(0.25, rel=0.01)
    assert table["ratios"][REFINED]["macs"] > table["ratios"][LR]["macs"]
    full, low = (Segmenter(bundle, "cpu", refine=False, scale=scale) for scale in (1.0, None))
    same = [(full.segment([s.image])[0].mask == low.segment([s.image])[0].mask).mean() for s in samples]
    assert table["rows"][LR]["agreement"] == pytest.approx(np.mean(same)) and 0.01 < np.mean(same) < 0.99
    assert table["rows"][HR]["agreement"] == 1
    text = markdown(table)
    assert f"| {REFINED} | {100 * table['rows'][REFINED]['miou']:.2f} |" in text and "| bicyclist |" in text
    save_json(table, tmp_path / "table.json")
    assert json.loads((tmp_path / "table.json").read_text())["rows"][LR]["miou"] == table["rows"][LR]["miou"]


def test_saved_figures_are_valid_json_whatever_they_hold(tmp_path: Path) -> None:
    """JSON knows neither NaN nor infinity, wherever they stand."""
    save_json({"a": [1.0, float("nan"), {"b": (float("inf"), np.float64("nan"))}], "c": None}, tmp_path / "x.json")
    assert "NaN" not in (tmp_path / "x.json").read_text() and "Infinity" not in (tmp_path / "x.json").read_text()
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1.0, None, {"b": [None, None]}], "c": None}


def test_comparison_without_a_refiner_has_two_rows(tiny_bundle: Path, samples: list[Sample]) -> None:
    bundle = Bundle.load(tiny_bundle)
    both, whole = compare(replace(bundle, refiner=None), samples, "cpu"), compare(bundle, samples, "cpu")
    assert list(both["rows"]) == [HR, LR] and list(both["ratios"]) == [LR]
    assert [both["rows"][name]["miou"] for name in (HR, LR)] == [whole["rows"][name]["miou"] for name in (HR, LR)]
    assert REFINED not in markdown(both)


def test_what_was_not_measured_is_a_dash(tiny_bundle: Path, samples: list[Sample]) -> None:
    """The first frames warm up; frames of nobody's have no labels."""
    table = compare(Bundle.load(tiny_bundle), [samples[0]._replace(label=None)], "cpu")
    text = markdown(table)
    [row] = [line for line in text.splitlines() if line.startswith(f"| {LR} |")]
    assert row.startswith(f"| {LR} | – | ") and row.endswith(" | – | – |")
    assert "nan" not in text and "after 3 frames" in text and '"as HR": share' in text and " 1 frame of " in text
