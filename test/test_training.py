"""Training learns, resumes exactly, and its parts do what they say."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from conftest import disk_with
from safetensors.torch import load_file
from torch.nn import functional as F

from sparserefine_ros.cli import main
from sparserefine_ros.datasets.base import UNLABELLED, Sample
from sparserefine_ros.datasets.camvid import CamVid
from sparserefine_ros.datasets.classes import CAMVID
from sparserefine_ros.datasets.splits import load_split
from sparserefine_ros.errors import DatasetError, TrainingError
from sparserefine_ros.networks.compact import CompactSegmenter
from sparserefine_ros.networks.refiner import SparseRefiner
from sparserefine_ros.networks.superpixel import SuperpixelTransformer
from sparserefine_ros.segmenter.bundle import Bundle, find_bundle
from sparserefine_ros.segmenter.preprocess import normalise
from sparserefine_ros.training import bundle as bundle_module
from sparserefine_ros.training.augment import jitter, random_view
from sparserefine_ros.training.dense import DenseTask, class_weights, hardest_cross_entropy
from sparserefine_ros.training.ensembler import EnsemblerTask
from sparserefine_ros.training.loop import _groups, cosine, mixed_precision, poly, train
from sparserefine_ros.training.pretrained import start_encoder
from sparserefine_ros.training.recipe import Recipe, StageRecipe

CPU = torch.device("cpu")
RECIPES = sorted((Path(__file__).parents[1] / "config" / "train").glob("*.yaml"))
TINY = StageRecipe("compact", {"widths": [8, 8, 8, 8], "depths": [1, 1, 1]}, epochs=2, batch=2, crop=(32, 48))


def scene(seed: int) -> Sample:
    """Sky over road with one bright box: colours tell the classes."""
    rng = np.random.default_rng(seed)
    label = np.zeros((48, 64), np.uint8)
    label[24:] = 3
    top, left = rng.integers(8, 30), rng.integers(4, 50)
    label[top : top + 10, left : left + 8] = 8
    colours = np.zeros((256, 3))
    colours[[0, 3, 8]] = (120, 160, 220), (90, 90, 90), (220, 40, 40)
    image = (colours[label] + rng.normal(0, 8, (*label.shape, 3))).clip(0, 255).astype(np.uint8)
    label[0] = UNLABELLED
    return Sample(image, label, str(seed), seed)


SCENES = [scene(i) for i in range(8)]


def task(recipe: StageRecipe, dropout: float = 0.0) -> DenseTask:
    torch.manual_seed(0)
    module = torch.nn.Sequential(CompactSegmenter(11, **recipe.args), torch.nn.Dropout(dropout))
    return DenseTask(module, CAMVID, SCENES, SCENES[:2], recipe, 0.5, CPU)


@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["plain", "random numbers in the network"])
def test_resumed_training_equals_uninterrupted_training(
    dropout: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(task(TINY, dropout), TINY, tmp_path / "whole", "dense", 0, CPU)

    class CutError(Exception):
        pass

    interrupted = task(TINY, dropout)
    monkeypatch.setattr("sparserefine_ros.training.loop.SAVE_EVERY", 0.0)
    original, calls = interrupted.loss, []

    def loss(module: torch.nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 6:
            raise CutError
        return original(module, batch)

    monkeypatch.setattr(interrupted, "loss", loss)
    with pytest.raises(CutError):
        train(interrupted, TINY, tmp_path / "cut", "dense", 0, CPU)
    resumed_task = task(TINY, dropout)
    resumed = train(resumed_task, TINY, tmp_path / "cut", "dense", 0, CPU)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    logs = [
        [json.loads(line) for line in (tmp_path / d / "dense.jsonl").read_text().splitlines()] for d in ("whole", "cut")
    ]
    assert [e["step"] for e in logs[0]] == [4, 8]
    assert logs[0] == logs[1], "the smoothed loss goes on too"


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    once, origin = replace(TINY, epochs=1), {"dataset": {"kind": "camvid"}}
    train(task(once), once, tmp_path, "dense", 0, CPU, origin)
    train(task(once), once, tmp_path, "dense", 0, CPU, origin)
    with pytest.raises(TrainingError, match="another recipe.*remove it"):
        train(task(once), replace(once, lr=0.5), tmp_path, "dense", 0, CPU, origin)
    with pytest.raises(TrainingError, match="another run, with seed 0 where it is 1 here; remove it"):
        train(task(once), once, tmp_path, "dense", 1, CPU, origin)
    with pytest.raises(TrainingError, match="with dataset {'kind': 'camvid'} where it is {'kind': 'street'} here"):
        train(task(once), once, tmp_path, "dense", 0, CPU, {"dataset": {"kind": "street"}})
    fewer = task(once)
    fewer.samples = 7
    with pytest.raises(TrainingError, match="with frames 8 where it is 7 here"):
        train(fewer, once, tmp_path, "dense", 0, CPU, origin)


def test_what_a_killed_run_has_left_goes(tmp_path: Path) -> None:
    left, fresh, others = (tmp_path / name for name in (".dense.0123abcd.part.ckpt", ".dense.0123abce.part.ckpt", ".x"))
    for file in (left, fresh, others):
        file.write_bytes(b"half")
    for file in (left, others):
        os.utime(file, (1000, 1000))
    once = replace(TINY, epochs=1)
    train(task(once), once, tmp_path, "dense", 0, CPU)
    assert not left.exists() and fresh.exists() and others.exists()


def test_ctrl_c_says_where_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted, calls = task(TINY), []
    monkeypatch.setattr("sparserefine_ros.training.loop.SAVE_EVERY", 0.0)
    original = interrupted.loss

    def loss(module: torch.nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(module, batch)

    monkeypatch.setattr(interrupted, "loss", loss)
    with pytest.raises(KeyboardInterrupt, match="^dense goes on from step 3 when the command is given again$"):
        train(interrupted, TINY, tmp_path, "dense", 0, CPU)


def test_the_command_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(RECIPES[0])
    for error, status, line in (
        (KeyboardInterrupt("dense goes on from step 3"), 130, "interrupted: dense goes on from step 3"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device", "dense.safetensors"), 2, "error: [Errno 28] No space left on device"),
    ):

        def fail(*_: object, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(bundle_module, "train_bundle", fail)
        assert main(["train", recipe, "--device", "cpu"]) == status
        [printed] = capsys.readouterr().err.splitlines()
        assert printed.startswith(line)
    for words, message in (
        (["--threads", "0"], "--threads is 0; give 1"),
        (["--seed", "-1"], "seed -1 is out of range"),
    ):
        assert main(["train", recipe, "--device", "cpu", *words]) == 2
        assert message in capsys.readouterr().err


def test_a_disk_that_is_full_when_the_bundle_is_written(tmp_path: Path) -> None:
    module = CompactSegmenter(11, **TINY.args)
    before = bundle_module._save(tmp_path, module, TINY, "dense.safetensors")
    size = (tmp_path / "dense.safetensors").stat().st_size
    with (
        disk_with(size // 2),
        pytest.raises(TrainingError, match="cannot write .*dense.safetensors: .*its training is done"),
    ):
        bundle_module._save(tmp_path, module, TINY, "dense.safetensors")
    assert bundle_module._save(tmp_path, module, TINY, "dense.safetensors") == before


def test_a_disk_that_is_full_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    once = replace(TINY, epochs=1)
    train(task(once), once, tmp_path, "dense", 0, CPU)
    before = (tmp_path / "dense.ckpt").read_bytes()
    state = torch.load(tmp_path / "dense.ckpt", weights_only=True)
    torch.save({**state, "step": 0}, tmp_path / "dense.ckpt")
    unfinished = (tmp_path / "dense.ckpt").read_bytes()
    full = pytest.raises(TrainingError, match=r"cannot write the checkpoint .*dense.ckpt: .*; make room")
    with disk_with(len(before) // 2), full:
        train(task(once), once, tmp_path, "dense", 0, CPU)
    assert (tmp_path / "dense.ckpt").read_bytes() == unfinished
    assert {path.name for path in tmp_path.iterdir()} == {"dense.ckpt", "dense.jsonl"}
    (tmp_path / "dense.ckpt").write_bytes(before[: len(before) // 2])
    with pytest.raises(TrainingError, match=r"cannot read the checkpoint .*dense.ckpt: .*; remove it to start anew"):
        train(task(once), once, tmp_path, "dense", 0, CPU)


def test_a_log_entry_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where nothing is a terminal the line is not broken at 80 characters."""
    once = task(one := replace(TINY, epochs=1))
    monkeypatch.setattr(once, "validate", lambda module: {f"figure_{i}": 0.25 for i in range(12)})
    train(once, one, tmp_path, "dense", 0, CPU)
    [line] = (tmp_path / "dense.jsonl").read_text().splitlines()
    assert len(line) > 160 and line in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("hardest", [1.0, 0.25])
def test_a_batch_without_labels_changes_nothing(hardest: float) -> None:
    one = task(replace(TINY, hardest=hardest))
    images = torch.zeros(2, 32, 48, 3, dtype=torch.uint8)
    loss = one.loss(one.module, (images, torch.full((2, 32, 48), UNLABELLED, dtype=torch.uint8)))
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in one.module.parameters() if p.grad is not None)


def test_a_torch_that_cannot_tell_about_bfloat16_trains_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.4 and 2.5 do not have the question."""
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    with mixed_precision(CPU):
        assert not torch.is_autocast_enabled("cpu")


def test_a_loss_that_is_not_finite_stops_with_a_remedy(tmp_path: Path) -> None:
    broken = task(TINY)
    with torch.no_grad():
        broken.module[0].classifier.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="the loss is nan at step 0; lower lr"):
        train(broken, TINY, tmp_path, "dense", 0, CPU)


def test_a_whole_bundle_learns_the_scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense, calibration, HR baseline and refiner in one run: the refined mask beats the low-resolution one."""
    monkeypatch.setattr(bundle_module, "load_split", lambda *_: (CAMVID, SCENES))
    dense = replace(TINY, epochs=40, scale=(0.5, 1.0), lr=1e-2, ema=0.9, crop=(24, 32), validate_every=40)
    recipe = Recipe(
        "scene", {"kind": "camvid"}, 0.25, dense, native=replace(dense, epochs=2, crop=(48, 64), scale=(1.0, 1.0)),
        refiner=replace(
            dense, network="sparserefine", args={"channels": [8, 16], "stride": "floor", "blocks": 1},
            epochs=25, scale=(1.0, 1.0), crop=(48, 64),
        ),
        ensembler=replace(dense, network="gated", args={}, epochs=2, scale=(1.0, 1.0), crop=(48, 64)),
        recall=0.9,
    )  # fmt: skip
    bundle = bundle_module.train_bundle(recipe, None, tmp_path / "runs", tmp_path / "model", CPU)
    assert Bundle.load(tmp_path / "model") == bundle
    last = json.loads((tmp_path / "runs" / "refiner.jsonl").read_text().splitlines()[-1])
    assert last["miou"] > last["miou_lr"] + 0.02
    assert last["miou"] > 0.8
    assert 0 < last["density"] < 0.6
    assert bundle.calibration["recall"] >= 0.9
    trained = torch.load(tmp_path / "runs" / "refiner.ckpt", weights_only=True)["average"]
    shipped = load_file(tmp_path / "model" / "refiner.safetensors")
    differ = {key for key, value in shipped.items() if not torch.equal(value, trained[f"module.{key}"].to(value.dtype))}
    assert differ and all(key.startswith("ensembler.") for key in differ), "only the ensembler was trained anew"
    assert bundle.provenance["ensembler"]["network"] == "gated"
    for name in ("dense_training.png", "native_training.png", "refiner_training.png", "density_recall.png"):
        assert (tmp_path / "model" / name).stat().st_size > 5_000
    card = (tmp_path / "model" / "README.md").read_text()
    assert card.startswith(f"# {bundle.name}\n") and "| trained from | recipe `scene`, seed 0 |" in card
    assert "| data | kind camvid; frames: 8 train, 8 val |" in card
    assert f"`sparserefine bench bundle {bundle.name} --card`" in card
    corrected = [sample._replace(label=np.where(sample.label == 3, 4, sample.label)) for sample in SCENES]
    monkeypatch.setattr(bundle_module, "load_split", lambda *_: (CAMVID, corrected))
    with pytest.raises(TrainingError, match=r"dense.ckpt was written by another run, with labels .*remove it"):
        bundle_module.train_bundle(recipe, None, tmp_path / "runs", tmp_path / "model", CPU)


def test_train_on_a_folder_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line, three classes; then what its bundle is measured on must have the same."""
    root, recipe = tmp_path / "yard", tmp_path / "yard.yaml"
    ids = np.full(256, UNLABELLED, np.uint8)
    ids[[0, 3, 8]] = 0, 1, 2
    for i, sample in enumerate(SCENES):
        for kind, pixels in (("image", sample.image[..., ::-1]), ("label", ids[sample.label])):
            file = root / ("train" if i < 6 else "val") / kind / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            if i != 5 or kind == "image":  # frames without a label are left out
                cv2.imwrite(str(file), pixels)
    classes = {"name": "yard", "names": ["sky", "ground", "box"], "palette": [[0, 0, 255], [90, 90, 90], [255, 0, 0]]}
    (root / "classes.yaml").write_text(yaml.safe_dump(classes))
    stage = {"epochs": 1, "batch": 2, "crop": [24, 32], "scale": [0.5, 1.0]}
    tiny = {"channels": [8, 16], "stride": "floor", "blocks": 1}
    stages = {
        "dense": {"network": "compact", "args": TINY.args, **stage},
        "refiner": {"network": "sparserefine", "args": tiny, **stage},
    }
    recipe.write_text(json.dumps({"name": "yard", "dataset": {"kind": "folder"}, "scale": 0.5, **stages}))
    monkeypatch.chdir(tmp_path)
    words = ["train", str(recipe), "--device", "cpu", "--threads", "1"]
    assert main(words) == 2
    assert "with classes.yaml, train/ and val/ with --data" in capsys.readouterr().err
    assert main([*words, "--data", str(root)]) == 0
    bundle = Bundle.load("models/yard")
    assert bundle.classes.names == ("sky", "ground", "box") and bundle.refiner is not None
    assert bundle.provenance["frames"] == {"train": 5, "val": 2}
    assert bundle.provenance["dataset"] == {"kind": "folder", "classes": ["sky", "ground", "box"]}
    measure = ["bench", "bundle", "models/yard", "--data", str(root), "--device", "cpu", "--card"]
    assert main(measure) == 0
    assert "2 frames of 64x48" in Path("models/yard/README.md").read_text()
    (root / "classes.yaml").write_text(yaml.safe_dump({**classes, "names": ["ground", "sky", "box"]}))
    capsys.readouterr()
    assert main(measure) == 2 and "ids must mean the same" in capsys.readouterr().err
    with pytest.raises(TrainingError, match="written by another run, with dataset"):
        bundle_module.train_bundle(Recipe.load(recipe), root, tmp_path / "runs" / "yard", bundle.path, CPU)
    for sample in (root / "val" / "label").iterdir():
        sample.unlink()
    with pytest.raises(DatasetError, match="no frame in .*val has a label"):
        load_split({"kind": "folder"}, "val", root)
    (root / "train").rename(root / "image")
    with pytest.raises(DatasetError, match="train has no folder image"):
        load_split({"kind": "folder"}, "refiner", root)


def test_an_ensembler_learns_while_the_branch_stays() -> None:
    """Its loss is that of the blended logits of the selected pixels; what trains is the running copy it is given."""
    torch.manual_seed(0)
    dense, refiner = CompactSegmenter(11, **TINY.args).eval(), SparseRefiner(11, (8, 16), "floor", blocks=1)
    branch = copy.deepcopy(refiner.state_dict())
    recipe = replace(TINY, network="gated", args={}, crop=(48, 64), class_weight_power=0.0)
    with torch.no_grad():
        dense.classifier.weight *= 100  # a random network is else equally unsure of all pixels
    trained = EnsemblerTask(refiner, dense, CAMVID, SCENES, SCENES[:2], recipe, 0.5, 1.0, CPU)
    images, lows, labels = batch = trained.batch(np.random.default_rng(0))
    loss = trained.loss(trained.module, batch)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in (trained.module.gate[2].weight, trained.module.fuse[0].weight))
    assert all(p.grad is None for part in (refiner.unet, refiner.classifier) for p in part.parameters())
    for key, value in refiner.state_dict().items():
        if not key.startswith("ensembler."):
            assert torch.equal(value, branch[key]), f"{key}: running statistics stay, too"

    logits = dense(normalise(lows)).float()
    p = logits.softmax(1)
    selected = F.interpolate((-(p * p.log()).sum(1, keepdim=True) > 1.0).float(), (48, 64), mode="nearest")[:, 0] > 0
    assert 0.05 < float(selected.float().mean()) < 0.95
    y1 = F.interpolate(logits, (48, 64), mode="nearest").permute(0, 2, 3, 1)[selected]
    y2 = refiner(normalise(images).permute(0, 2, 3, 1)[selected], y1, refiner.pyramid(selected)).refined
    expected = F.cross_entropy(trained.module(y1, y2), labels[selected].long(), ignore_index=UNLABELLED)
    torch.testing.assert_close(loss, expected)


def test_cosine_schedule() -> None:
    assert cosine(0, 100, 0.1) == pytest.approx(0.1)
    assert cosine(9, 100, 0.1) == pytest.approx(1.0)
    assert cosine(55, 100, 0.1) == pytest.approx(0.5)
    assert cosine(99, 100, 0.1) < 0.001


def test_poly_schedule() -> None:
    assert poly(0, 100, 0.1) == pytest.approx(0.1)
    assert poly(10, 100, 0.1) == 1.0
    assert poly(55, 100, 0.1) == pytest.approx(0.5**0.9)
    assert 0 < poly(99, 100, 0.1) < 0.02


def test_encoder_and_biases_have_their_own_settings() -> None:
    module = torch.nn.ModuleDict({"encoder": torch.nn.Linear(2, 3), "head": torch.nn.Linear(3, 4)})
    recipe = replace(TINY, lr=1.0, encoder_lr=0.25, weight_decay=0.05)
    found = {p: (g["peak"], g["weight_decay"]) for g in _groups(module, recipe) for p in g["params"]}
    expected = {"encoder.weight": (0.25, 0.05), "encoder.bias": (0.25, 0.0)}
    expected |= {"head.weight": (1.0, 0.05), "head.bias": (1.0, 0.0)}
    assert {name: found[p] for name, p in module.named_parameters()} == expected


def test_hardest_pixels_are_those_of_highest_loss() -> None:
    """Losses of five labelled pixels by hand; 40 % of them are the two highest."""
    probability = torch.tensor([0.9, 0.2, 0.5, 0.8, 0.1, 0.01])
    logits = torch.stack([probability, 1 - probability]).log().view(1, 2, 2, 3)
    labels = torch.zeros(1, 2, 3, dtype=torch.uint8)
    labels[0, 1, 2] = UNLABELLED  # the surest mistake does not count
    expected = -(np.log(0.2) + np.log(0.1)) / 2
    assert float(hardest_cross_entropy(logits, labels, torch.ones(2), 0.4)) == pytest.approx(expected)
    assert float(hardest_cross_entropy(logits, torch.full_like(labels, UNLABELLED), torch.ones(2), 0.4)) == 0


def test_class_weights_are_median_over_frequency() -> None:
    label = np.array([[0] * 6 + [1] * 3 + [2] * 1], np.uint8)
    sample = Sample(np.zeros((1, 10, 3), np.uint8), label, "", 0)
    assert class_weights([sample], 4, 1.0).tolist() == pytest.approx([0.5, 1.0, 3.0, 1.0])
    assert class_weights([sample], 4, 0.0).tolist() == [1.0] * 4
    with pytest.raises(TrainingError, match="not one pixel of the 1 training frames has a class"):
        class_weights([sample._replace(label=np.full((1, 10), UNLABELLED, np.uint8))], 4, 1.0)


def test_views_keep_image_and_label_together() -> None:
    rng = np.random.default_rng(0)
    sample = SCENES[0]
    assert sample.label is not None
    image = np.repeat(40 + 20 * sample.label[..., None], 3, 2).astype(np.uint8)  # shows the label, so both move alike
    for scale in ((0.5, 0.6), (1.0, 1.0), (1.5, 2.0), (0.2, 0.3)):
        view, label = random_view(image, sample.label, (40, 56), scale, rng)
        assert view.shape == (40, 56, 3) and label.shape == (40, 56)
        assert set(np.unique(label)) <= {0, 3, 8, UNLABELLED}
        road, sky = view[label == 3].mean(), view[label == 0].mean()
        assert road > sky  # light changes, order stays
    padded = random_view(image, sample.label, (400, 400), (1.0, 1.0), rng)[1]
    assert (padded == UNLABELLED).mean() > 0.7


def test_views_move_image_and_label_by_the_same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A box has its centre at the same place in both, however cut, scaled and mirrored."""
    monkeypatch.setattr("sparserefine_ros.training.augment.jitter", lambda image, rng: image)
    label = np.zeros((120, 160), np.uint8)
    label[44:77, 61:104] = 1
    image = np.repeat(200 * label[..., None], 3, 2)
    image[..., 1] = np.arange(160)
    mirrored, shifts = [], []
    for seed in range(60):
        view, seen = random_view(image, label, (90, 130), (0.4, 2.0), np.random.default_rng(seed))
        inside = seen == 1
        if not inside.any() or inside[[0, -1]].any() or inside[:, [0, -1]].any():
            continue  # cut off
        weight = view[..., 0] * cv2.dilate(inside.astype(np.uint8), np.ones((7, 7))).astype(float)  # without padding
        rows, columns = np.mgrid[: view.shape[0], : view.shape[1]]
        mirrored.append(bool(np.polyfit(columns[inside], view[..., 1][inside], 1)[0] < 0))
        shift = [(where * weight).sum() / weight.sum() - where[inside].mean() for where in (rows, columns)]
        shifts.append((shift[0], -shift[1] if mirrored[-1] else shift[1]))
    assert len(shifts) > 30 and 0.2 < np.mean(mirrored) < 0.8
    assert np.abs(shifts).max() < 0.51  # a label is rounded to pixels
    assert np.abs(np.mean(shifts, 0)).max() < 0.08


def test_jitter_is_monotone_and_seeded() -> None:
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, 2)
    out = jitter(ramp, np.random.default_rng(1))
    assert (np.diff(out.astype(int), axis=1) >= 0).all() and out.std() > 20
    np.testing.assert_array_equal(out, jitter(ramp, np.random.default_rng(1)))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_load(path: Path) -> None:
    recipe = Recipe.load(path)
    assert recipe.name == path.stem
    assert not recipe.native or (recipe.dense and recipe.dense.args == recipe.native.args)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2", "cannot read"),
        ("- 1", "holds list"),
        ("{name: x, dataset: {kind: camvid}, scale: 0.5}", "no section 'dense'"),
        ("{name: x, dataset: {}, scale: 0.5, bundle: b}", "takes bundle 'b' as it is; give a refiner"),
        ("dense: {network: a, speed: 3}\nrefiner: {network: b}", "unknown key 'speed'; known are network"),
        ("dense: {network: a}", "missing"),
        ("dense: {network: a, schedule: step}\nrefiner: {network: b}", "schedule 'step' is unknown; choose cosine"),
        ("dense: {network: a, hardest: 0}\nrefiner: {network: b}", "hardest 0 is out of range; give a share"),
        ("dense: {network: a, lr: 1e-3}", "lr '1e-3' is out of range; give a number above 0, as in 0.001"),
        ("dense: {network: a, epochs: 0}", "epochs 0 is out of range; give a whole number from 1 on"),
        ("dense: {network: a, batch: 0}", "batch 0 is"),
        ("dense: {network: a, validate_every: 0}", "validate_every 0 is"),
        ("dense: {network: a, crop: 32}", r"crop 32 is out of range; give \[height, width\]"),
        ("dense: {network: a, crop: [0, 4]}", r"crop \(0, 4\) is"),
        ("dense: {network: a, scale: [2, 1]}", r"scale \(2, 1\) is out of range; give \[smallest, largest\]"),
        ("dense: {network: a, scale: [1.0]}", r"scale \(1.0,\) is"),
        ("dense: {network: a, ema: 1}", "ema 1 is"),
        ("dense: {network: a, warmup: 2}", "warmup 2 is"),
        ("dense: {network: a, args: []}", r"args \[\] is out of range; give a mapping"),
        ("{name: x, dataset: {}, scale: 2, dense: {network: a}}", "scale 2 is out of range; give a number above 0"),
        ("{name: x, dataset: {}, scale: half, dense: {network: a}}", "scale 'half' is"),
        ("{name: x, dataset: {}, scale: 1, recall: 2, dense: {network: a}}", "recall 2 is"),
        ("{name: x, dataset: {}, scale: 1, seed: -1, dense: {network: a}}", "seed -1 is out of range; give a whole"),
        ("{name: 5, dataset: {}, scale: 1, dense: {network: a}}", "name 5 is"),
        ("{name: x, dataset: {}, scale: 1, dense: {network: a}, native: {network: b}}", "section 'native' has other"),
        (
            "{name: x, dataset: {}, scale: 1, dense: {network: a}, ensembler: {network: gated}}",
            "'ensembler' trains 'gat",
        ),
        (
            "{name: x, dataset: {}, scale: 1, bundle: b, refiner: {network: a, args: {ensembler: residual}}, "
            "ensembler: {network: gated}}",
            "only gated has something to learn",
        ),
    ],
)
def test_broken_recipes(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(TrainingError, match=message):
        Recipe.load(tmp_path / "r.yaml")


@pytest.fixture
def camvid(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for kind in ("image", "label"):
            (tmp_path / split / kind).mkdir(parents=True)
        for i in (2, 1):
            image = np.full((6, 8, 3), (10 * i, 0, 200), np.uint8)  # BGR: red
            cv2.imwrite(str(tmp_path / split / "image" / f"f{i}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 100])
            cv2.imwrite(str(tmp_path / split / "label" / f"f{i}.png"), np.array([[i, 11] * 4] * 6, np.uint8))
    return tmp_path


def test_camvid_reader(camvid: Path) -> None:
    data = CamVid(camvid, "val")
    assert [s.name for s in (data[0], data[1])] == ["f1", "f2"]
    assert data[1].stamp_ns == round(1e9 / 15)
    image, label = data[1].image, data[1].label
    assert label is not None and label[0].tolist() == [2, UNLABELLED] * 4
    np.testing.assert_allclose(image[0, 0], (200, 0, 20), atol=3)  # RGB
    classes, samples = load_split({"kind": "camvid"}, "train", camvid)
    assert classes is CAMVID and len(samples) == 2


def test_camvid_reader_says_what_is_wrong(camvid: Path) -> None:
    with pytest.raises(DatasetError, match="no frames in .*nowhere"):
        CamVid(camvid / "nowhere")
    cv2.imwrite(str(camvid / "val" / "label" / "f1.png"), np.zeros((12, 16), np.uint8))
    with pytest.raises(DatasetError, match="f1.png is 16x12, its frame 8x6; resize the labels"):
        CamVid(camvid, "val")[0]
    cv2.imwrite(str(camvid / "val" / "label" / "f1.png"), np.full((6, 8), 30, np.uint8))
    with pytest.raises(DatasetError, match="largest id 30.*0-11"):
        CamVid(camvid, "val")[0]
    (camvid / "val" / "label" / "f2.png").unlink()
    with pytest.raises(DatasetError, match="1 of 2 frames have no label"):
        CamVid(camvid, "val")
    with pytest.raises(DatasetError, match="'ade'.*camvid, street"):
        load_split({"kind": "ade"}, "train", None)
    with pytest.raises(DatasetError, match="street has train_drives 0; give a whole number from 1 on"):
        load_split({"kind": "street"}, "train", None)
    with pytest.raises(DatasetError, match="--data"):
        load_split({"kind": "camvid"}, "train", None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_drives": 0}, "val_drives 0; give a whole number from 1 on"),  # was those of train
        ({"train_drives": 0}, "train_drives 0; give"),
        ({"frames": None}, "frames None; give"),
        ({"refiner_drives": -1}, "refiner_drives -1; give a whole number from 0 on"),
        ({"train_drives": 990, "refiner_drives": 11}, "1001 train_drives and refiner_drives; give at most 1000"),
        ({"size": 64}, r"size 64; give \[height, width\]"),
    ],
)
def test_a_street_without_frames_is_refused(changes: dict[str, object], message: str) -> None:
    street = {"kind": "street", "train_drives": 1, "val_drives": 1, "frames": 1, "size": [32, 64], **changes}
    with pytest.raises(DatasetError, match=message):
        load_split(street, "val", None)


def test_a_network_that_cannot_be_built_is_named_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle_module, "load_split", lambda *_: (CAMVID, SCENES))
    recipe = Recipe("scene", {"kind": "camvid"}, 0.25, replace(TINY, network="nope"))
    with pytest.raises(TrainingError, match="recipe 'scene': unknown network 'nope'; known are compact"):
        bundle_module.train_bundle(recipe, None, tmp_path / "runs", tmp_path / "model", CPU)
    recipe = replace(recipe, dense=TINY, refiner=replace(TINY, network="sparserefine", args={"width": 3}))
    with pytest.raises(TrainingError, match="recipe 'scene': network 'sparserefine' does not take these arguments"):
        bundle_module.train_bundle(recipe, None, tmp_path / "runs", tmp_path / "model", CPU)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("module", "prefix"),
    [
        (lambda: CompactSegmenter(4, depths=(2, 2, 3), offsets=True), ""),
        (lambda: SuperpixelTransformer(4, channels=16, grid=(3, 4)), "encoder.model."),
    ],
    ids=["compact", "superpixel"],
)
def test_a_network_starts_from_another_bundles_encoder(module: Callable[[], torch.nn.Module], prefix: str) -> None:
    """All of the encoder comes from the bundle, nothing else changes."""
    torch.manual_seed(0)
    before = module()
    torch.manual_seed(0)
    after = module()
    start_encoder(after, "street")
    source = load_file(find_bundle("street") / "dense.safetensors")
    taken = {key: value for key, value in source.items() if key.split(".")[0] in CompactSegmenter.PARTS}
    assert {key.split(".")[0] for key in taken} == set(CompactSegmenter.PARTS)
    for key, value in before.state_dict().items():
        expected = taken.pop(key.removeprefix(prefix), value) if key.startswith(prefix) else value
        assert torch.equal(after.state_dict()[key], expected), key
    assert not taken


def test_an_encoder_that_does_not_fit_is_refused() -> None:
    with pytest.raises(TrainingError, match="bundle 'street' has other widths or depths.*'stem'"):
        start_encoder(CompactSegmenter(4, widths=(8, 16, 16, 16)), "street")
    with pytest.raises(TrainingError, match="no compact encoder; leave the recipe's key 'encoder' out"):
        start_encoder(torch.nn.Conv2d(3, 4, 1), "street")
