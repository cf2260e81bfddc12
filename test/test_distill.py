"""Distillation: a student comes closer to its own model at full resolution, from frames that nobody labelled."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import disk_with, write_decoder_bundle

from sparserefine_ros.cli import main
from sparserefine_ros.datasets.base import Sample
from sparserefine_ros.datasets.classes import CAMVID, CITYSCAPES
from sparserefine_ros.errors import BagError, DatasetError, TrainingError
from sparserefine_ros.evaluation.bag_writer import BagWriter
from sparserefine_ros.evaluation.bags import Bag
from sparserefine_ros.evaluation.compare import HR, LR, REFINED, compare
from sparserefine_ros.networks.compact import CompactSegmenter
from sparserefine_ros.node.conversion import to_rgb
from sparserefine_ros.segmenter.bundle import Bundle, save_network
from sparserefine_ros.segmenter.segmenter import Segmenter
from sparserefine_ros.training.dense import DenseTask
from sparserefine_ros.training.distill import ENSEMBLER, REPEAT, distill, gap_closed, summary, teach
from sparserefine_ros.training.frames import evenly_spaced, read_frames, split_blocks
from sparserefine_ros.training.loop import train
from sparserefine_ros.training.recipe import StageRecipe

CPU = torch.device("cpu")
DENSE = StageRecipe(
    "compact", {"widths": [8, 8, 8, 8], "depths": [1, 1, 1]}, epochs=25, batch=2, crop=(48, 64), scale=(0.5, 1.0),
    lr=1e-2, ema=0.9, validate_every=100,
)  # fmt: skip
STUDENT = StageRecipe(
    "sparserefine", {"channels": [8, 16], "stride": "floor", "blocks": 1},
    epochs=15, batch=4, scale=(1.0, 1.0), lr=1e-2, ema=0.9, class_weight_power=0.0, validate_every=100,
)  # fmt: skip


def scene(seed: int) -> Sample:
    """Sky over road with one bright box: colours tell the classes."""
    rng = np.random.default_rng(seed)
    label = np.zeros((48, 64), np.uint8)
    label[24:] = 3
    top, left = rng.integers(8, 30), rng.integers(4, 50)
    label[top : top + 10, left : left + 8] = 8
    colours = np.zeros((9, 3))
    colours[[0, 3, 8]] = (120, 160, 220), (90, 90, 90), (220, 40, 40)
    image = (colours[label] + rng.normal(0, 8, (*label.shape, 3))).clip(0, 255).astype(np.uint8)
    return Sample(image, label, str(seed), seed)


SCENES = [scene(i) for i in range(20)]
UNLABELLED_SCENES = [sample._replace(label=None) for sample in SCENES]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A dense segmenter that knows the scenes, to run at a quarter of their size."""
    folder = tmp_path_factory.mktemp("models") / "scenes"
    torch.manual_seed(0)
    task = DenseTask(CompactSegmenter(len(CAMVID), **DENSE.args), CAMVID, SCENES[:8], SCENES[:1], DENSE, 0.25, CPU)
    dense = train(task, DENSE, folder / "runs", "dense", 0, CPU)
    spec = save_network(folder, dense, "compact", DENSE.args, "dense.safetensors")
    Bundle(folder, "scenes", CAMVID, 0.25, (48, 64), spec, provenance={"seed": 0}).save()
    return Bundle.load(folder)


def test_a_student_comes_closer_to_its_teacher(bundle: Bundle, tmp_path: Path) -> None:
    made, held_out = distill(
        bundle, UNLABELLED_SCENES, tmp_path / "new", tmp_path / "runs", CPU, STUDENT, recall=0.9
    )  # fmt: skip
    assert [s.name for s in held_out] == ["2", "7", "12", "17"]
    assert Bundle.load(tmp_path / "new") == made and made.name == "new"
    assert made.calibration["recall"] >= 0.9
    assert made.provenance["seed"] == 0 and made.provenance["distilled"]["frames"] == {"train": 16, "held_out": 4}
    table = compare(made, held_out, "cpu")
    before, after = (table["rows"][name]["agreement"] for name in (LR, REFINED))
    assert table["rows"][HR]["agreement"] == 1
    assert gap_closed(before, after) > 0.4
    assert f"{gap_closed(before, after):.0%} of the gap closed" in summary(table) and "mIoU" not in summary(table)

    again, _ = distill(bundle, SCENES, tmp_path / "new", tmp_path / "runs", CPU, STUDENT, recall=0.9)
    assert again == made  # resumed at its end; labels change nothing
    with pytest.raises(TrainingError, match="holds a run with frames 20, here it is 19"):
        distill(bundle, SCENES[1:], tmp_path / "new", tmp_path / "runs", CPU, STUDENT, recall=0.9)
    others = [sample._replace(image=255 - sample.image) for sample in SCENES]
    with pytest.raises(TrainingError, match="holds a run with pixels .{64}, here it is"):
        distill(bundle, others, tmp_path / "new", tmp_path / "runs", CPU, STUDENT, recall=0.9)


def test_a_repeated_network_learns_to_do_with_less(bundle: Bundle, tmp_path: Path) -> None:
    """It starts as the teacher, is closer to it than low resolution at once, and closer still after training."""
    new, runs = tmp_path / "new", tmp_path / "runs"
    before, held_out = distill(bundle, UNLABELLED_SCENES, tmp_path / "before", runs, CPU, "repeat", recall=0.95)
    recipe = replace(REPEAT, epochs=6, lr=1e-3, ema=0.9, validate_every=100)
    after, same = distill(bundle, UNLABELLED_SCENES, new, runs, CPU, recipe, recall=0.95)
    assert held_out == same and before.entropy_threshold == after.entropy_threshold
    assert before.refiner is not None and after.refiner is not None
    assert before.refiner.args == {} and after.refiner.args == {"own": {"network": "compact", "args": DENSE.args}}
    assert "ensembler" not in after.provenance["distilled"]
    closed = []
    for made in (before, after):
        rows = compare(made, held_out, "cpu")["rows"]
        closed.append(gap_closed(rows[LR]["agreement"], rows["LR + repeat"]["agreement"]))
    assert 0 < closed[0] < closed[1] and closed[1] > 0.6
    again, _ = distill(bundle, UNLABELLED_SCENES, new, runs, CPU, recipe, recall=0.95)
    assert again == after  # resumed at its end


def test_a_branch_trained_anew_has_a_gate_of_its_own(bundle: Bundle, tmp_path: Path) -> None:
    """Who removes the branch's checkpoint, as its error says, must not get the gate of the branch before."""
    once, twice = replace(STUDENT, epochs=1), replace(STUDENT, epochs=2)
    runs = tmp_path / "runs"
    distill(bundle, SCENES, tmp_path / "new", runs, CPU, once)
    (runs / "refiner.ckpt").unlink()
    with pytest.raises(TrainingError, match=r"ensembler.ckpt was written by another run, with refiner .*remove it"):
        distill(bundle, SCENES, tmp_path / "new", runs, CPU, twice)
    (runs / "ensembler.ckpt").unlink()
    mended, _ = distill(bundle, SCENES, tmp_path / "new", runs, CPU, twice)
    fresh, _ = distill(bundle, SCENES, tmp_path / "fresh", tmp_path / "others", CPU, twice)
    assert mended.refiner == fresh.refiner


def test_what_cannot_be_read_costs_itself_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture of a folder, and labels that nobody needs."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for sample in SCENES[:3]:
        cv2.imwrite(str(folder / f"{sample.name}.png"), sample.image[..., ::-1])
    (folder / "1.png").write_text("no picture")
    assert [frame.name for frame in read_frames(folder, CAMVID, to_rgb, 10)] == ["0", "2"]
    assert "frame left out: cannot decode" in caplog.text
    label = SCENES[0].label
    assert label is not None
    half, unknown = label[::2, ::2], np.where(label == 3, 77, label).astype(np.uint8)
    with BagWriter(tmp_path / "bag", CAMVID) as bag:
        for sample in SCENES[:4]:
            bag.write(sample.image, sample.label, 10 + sample.stamp_ns)
    theirs = dict(zip(range(10, 14), (label, half, unknown, np.full_like(label, 255)), strict=True))
    monkeypatch.setattr(Bag, "labels", lambda bag: theirs.items())  # as another tool writes them
    labels = [frame.label for frame in read_frames(tmp_path / "bag", CAMVID, to_rgb, 10)]
    assert [found is not None for found in labels] == [True, False, False, True]
    assert caplog.text.count("another size, or ids of no class") == 2


def test_an_untrained_student_is_low_resolution(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    still = replace(STUDENT, epochs=1, lr=1e-12)
    monkeypatch.setattr("sparserefine_ros.training.distill.ENSEMBLER", replace(ENSEMBLER, lr=1e-12))
    made, held_out = distill(bundle, UNLABELLED_SCENES[:5], tmp_path / "new", tmp_path / "runs", CPU, still)
    segmenter = Segmenter(made, "cpu")
    low, refined = (segmenter.segment([held_out[0].image], refine=refine)[0] for refine in (False, True))
    assert refined.density > 0.05
    np.testing.assert_array_equal(refined.mask, low.mask)


def test_agreement_is_with_the_dense_network_at_full_size(bundle: Bundle) -> None:
    taught = teach(bundle, UNLABELLED_SCENES[:2], CPU)
    full = Segmenter(bundle, "cpu", refine=False, scale=1.0)
    for sample in taught:
        assert sample.label is not None
        np.testing.assert_array_equal(sample.label, full.segment([sample.image])[0].mask)
    assert gap_closed(0.8, 0.95) == pytest.approx(0.75)
    assert gap_closed(0.8, 0.7) == pytest.approx(-0.5)
    assert np.isnan(gap_closed(1.0, 1.0))


def test_command_on_a_bag_without_training(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with BagWriter(tmp_path / "bag", CAMVID) as bag:
        for sample in SCENES:
            bag.write(sample.image, sample.label, 10 + sample.stamp_ns)
    output = tmp_path / "made"
    arguments = ["distill", "--model", str(bundle.path), "--frames", str(tmp_path / "bag"), "--output", str(output)]
    where = ["--device", "cpu", "--runs", str(tmp_path / "runs")]
    assert main([*arguments, "--training-free", *where]) == 0
    text = capsys.readouterr().out
    assert "4 held-out frames" in text and "of the gap closed" in text
    assert "mIoU: HR dense" in text and "LR + bilateral" in text and "SparseRefine" not in text
    made = Bundle.load(output)
    assert made.refiner is not None and made.refiner.network == "bilateral"
    card = (output / "README.md").read_text()
    assert f"| distilled from | bundle scenes, dense weights sha256 `{made.dense.sha256}` |" in card
    assert "| licence | of the dense weights: none found with the checkpoint" in card
    assert "bilateral; nothing was trained; the threshold is from 16 frames without labels, 4 held out |" in card
    assert "bench bundle" not in card, "nobody knows what it was trained on"
    assert 0 < Segmenter(made, "cpu").segment([SCENES[0].image])[0].density < 1
    assert main([*arguments, "--training-free", "--refiner", "repeat", *where]) == 0
    assert "LR + repeat" in capsys.readouterr().out
    made = Bundle.load(output)
    assert made.refiner is not None and made.refiner.network == "repeat"


def test_a_network_that_cannot_be_repeated_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_decoder_bundle(tmp_path / "superpixel", "superpixel")
    for sample in SCENES[:5]:
        cv2.imwrite(str(tmp_path / f"{sample.name}.png"), sample.image[..., ::-1])
    arguments = ["distill", "--model", str(source), "--frames", str(tmp_path), "--output", str(tmp_path / "made")]
    arguments += ["--device", "cpu", "--runs", str(tmp_path / "runs"), "--training-free", "--refiner", "repeat"]
    assert main(arguments) == 2
    assert re.search(r"--refiner repeat is not for model .*not known at single sites; leave", capsys.readouterr().err)


def test_the_card_repeats_the_licence_and_replaces_none(bundle: Bundle, tmp_path: Path) -> None:
    source = replace(bundle, path=Path(shutil.copytree(bundle.path, tmp_path / "source")))
    (source.path / "README.md").write_text("# scenes\n\n| | |\n|---|---|\n| licence | CC-BY-4.0 (its | link) |\n")
    card = tmp_path / "made" / "README.md"
    distill(source, UNLABELLED_SCENES, card.parent, tmp_path / "runs", CPU, "bilateral")
    assert "| licence | CC-BY-4.0 (its | link) |" in card.read_text()
    card.write_text("mine")
    distill(source, UNLABELLED_SCENES, card.parent, tmp_path / "runs", CPU, "bilateral")
    assert card.read_text() == "mine"


def test_frames_of_bags_and_folders(tmp_path: Path) -> None:
    with BagWriter(tmp_path / "bag", CAMVID) as bag:
        for sample in SCENES[:7]:
            bag.write(sample.image, sample.label, 10 + sample.stamp_ns)
    found = read_frames(tmp_path / "bag", CAMVID, to_rgb, 3)
    assert [s.stamp_ns for s in found] == [10, 12, 14]
    for sample, frame in zip((SCENES[0], SCENES[2], SCENES[4]), found, strict=True):
        np.testing.assert_array_equal(frame.image, sample.image)
        assert frame.label is not None
        np.testing.assert_array_equal(frame.label, sample.label)
    assert all(s.label is None for s in read_frames(tmp_path / "bag", CITYSCAPES, to_rgb, 3))

    for folder in (tmp_path / "plain", tmp_path / "nested" / "image"):
        folder.mkdir(parents=True)
        for sample in SCENES[:4]:
            cv2.imwrite(str(folder / f"{sample.name}.png"), sample.image[..., ::-1])
    for folder in (tmp_path / "plain", tmp_path / "nested"):
        found = read_frames(folder, CAMVID, to_rgb, 2)
        assert [(s.name, s.label) for s in found] == [("0", None), ("2", None)]
        np.testing.assert_array_equal(found[1].image, SCENES[2].image)


def test_whole_blocks_are_held_out() -> None:
    train_at, held_at = split_blocks(100)
    assert held_at == [*range(10, 15), *range(35, 40), *range(60, 65), *range(85, 90)]
    assert sorted(train_at + held_at) == list(range(100))
    assert split_blocks(5) == ([0, 1, 3, 4], [2])
    assert evenly_spaced(10, 4) == [0, 2, 5, 7]
    assert evenly_spaced(3, 10) == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nowhere", DatasetError, "there are no frames at .*nowhere"),
        ("empty", DatasetError, "no .jpg, .jpeg, .png files in .*empty"),
        ("broken.mcap", BagError, "cannot read the bag"),
        ("text", DatasetError, "not one picture of .*text can be used: cannot decode .*a.png"),
    ],
)
def test_frames_that_are_none(tmp_path: Path, name: str, error: type[Exception], message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.png").write_text("no picture")
    (tmp_path / "broken.mcap").write_text("no bag")
    with pytest.raises(error, match=message):
        read_frames(tmp_path / name, CAMVID, to_rgb, 10)


def test_what_cannot_be_distilled(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new, runs = tmp_path / "new", tmp_path / "runs"
    with pytest.raises(TrainingError, match="runs at scale 1.*give --scale"):
        distill(replace(bundle, scale=1.0), SCENES, new, runs, CPU)
    with pytest.raises(TrainingError, match="4 frames are too few"):
        distill(bundle, SCENES[:4], new, runs, CPU)
    with pytest.raises(TrainingError, match="would replace the one it comes from"):
        distill(bundle, SCENES, bundle.path, runs, CPU)
    assert not new.exists() and not runs.exists()
    other = Path(shutil.copytree(bundle.path, tmp_path / "other"))
    with pytest.raises(TrainingError, match="other holds a bundle that was not distilled; remove it or give another"):
        distill(bundle, SCENES, other, runs, CPU, "bilateral")
    assert Bundle.load(other) == replace(bundle, path=other)
    arguments = ["distill", "--model", str(bundle.path), "--frames", str(tmp_path)]
    for option, value in (("--recall", "0"), ("--scale", "1.5"), ("--epochs", "0"), ("--limit", "-1")):
        assert main([*arguments, option, value]) == 2
        assert f"{option}" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", '{"dense": "ab', "[]", "\udcff"])
def test_what_says_what_was_trained_may_be_broken(bundle: Bundle, tmp_path: Path, content: str) -> None:
    (tmp_path / "distill.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(TrainingError, match=f"cannot read {tmp_path}/distill.json, .*or remove {tmp_path} to start"):
        distill(bundle, SCENES, tmp_path / "new", tmp_path, CPU, STUDENT)


def test_a_bundle_stays_whole_while_the_next_is_trained(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = tmp_path / "new"
    made, _ = distill(bundle, SCENES, new, tmp_path / "runs", CPU, "bilateral")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sparserefine_ros.training.distill._train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distill(replace(bundle, scale=0.5), SCENES, new, tmp_path / "runs", CPU, STUDENT)
    assert Bundle.load(new) == made and Segmenter(made, "cpu").segment([SCENES[0].image])


def test_a_full_disk_leaves_no_half_of_it(bundle: Bundle, tmp_path: Path) -> None:
    with disk_with(100), pytest.raises(OSError, match=f"'{tmp_path}/distill.json'"):
        distill(bundle, SCENES, tmp_path / "new", tmp_path, CPU, STUDENT)
    assert not any(tmp_path.iterdir())


def test_summary_where_low_resolution_says_what_full_does() -> None:
    rows = {HR: {"agreement": 1.0}, LR: {"agreement": 1.0}, REFINED: {"agreement": 1.0, "density": 0.1}}
    text = summary({"frames": 3, "rows": {name: {**row, "miou": float("nan")} for name, row in rows.items()}})
    assert "100.00% refined; there is no gap to close" in text and "nan" not in text
