"""`sparserefine demo` in small: street, bag, live node, report, files."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from sparserefine_ros import cli
from sparserefine_ros.commands import demo
from sparserefine_ros.commands.make_bag import open_source
from sparserefine_ros.datasets.classes import CITYSCAPES
from sparserefine_ros.datasets.splits import STREET_VAL_SEED
from sparserefine_ros.errors import BundleError, ParameterError
from sparserefine_ros.evaluation.bag_writer import START_NS
from sparserefine_ros.evaluation.bags import Bag
from sparserefine_ros.networks.compact import CompactSegmenter
from sparserefine_ros.networks.refiner import SparseRefiner
from sparserefine_ros.segmenter.bundle import Bundle, save_network


def street_bundle(path: Path) -> Path:
    """A bundle of random weights with the street's classes."""
    torch.manual_seed(0)
    dense_args = {"widths": [8, 8, 8, 8], "depths": [1, 1, 1]}
    refiner_args = {"channels": [8, 16], "stride": "floor", "blocks": 1}
    dense, refiner = CompactSegmenter(19, **dense_args), SparseRefiner(19, **refiner_args)
    Bundle(
        path=path, name="tiny19", classes=CITYSCAPES, scale=0.5, native_size=(64, 128),
        dense=save_network(path, dense, "compact", dense_args, "dense.safetensors"),
        refiner=save_network(path, refiner, "sparserefine", refiner_args, "refiner.safetensors"),
        entropy_threshold=1.0,
    ).save()  # fmt: skip
    return path


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return demo.run(parser.parse_args(words))


def test_demo_leaves_bag_masks_picture_and_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rclpy")
    bundle, out = street_bundle(tmp_path / "tiny19"), tmp_path / "out"
    words = ["--model", str(bundle), "--output", str(out), "--frames", "3", "--size", "64x128", "--device", "cpu"]
    assert run(*words) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["frames"] == {"sent": 3, "received": 3, "processed": 3, "dropped": 0}
    assert 0 <= results["miou"] <= 1 and results["frames_scored"] == 3
    assert results["model"] == "tiny19" and results["node_exit_code"] == 0
    street = open_source("street", frames=3, seed=STREET_VAL_SEED, size=(64, 128), rate=demo.CAMERA_HZ)
    with Bag(out / "bag") as bag:
        assert bag.check(CITYSCAPES) == [START_NS + round(i * 1e9 / demo.CAMERA_HZ) for i in range(3)]
        for i, (_, label) in enumerate(bag.labels()):
            np.testing.assert_array_equal(label, street[i].label)
    masks = [f for f in (out / "masks").glob("*.png") if f.stem.isdecimal()]
    assert len(masks) == 3 and cv2.imread(str(masks[0]), cv2.IMREAD_UNCHANGED).shape == (64, 128)
    assert cv2.imread(str(out / "evaluation.png")) is not None
    said = capsys.readouterr().out
    assert "evaluation.png" in said and "3 sent, 3 received, 3 processed, 0 dropped" in said


def test_demo_says_at_once_that_the_bundle_is_missing(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle 'nowhere'"):
        run("--model", "nowhere", "--output", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"), [(["--rate", "-1"], "--rate is -1.0"), (["--frames", "0"], "--frames is 0")]
)
def test_bad_arguments_are_said_before_anything_is_made(tmp_path: Path, words: list[str], message: str) -> None:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    with pytest.raises(ParameterError, match=message):
        demo.run(parser.parse_args(["--output", str(tmp_path / "new"), *words]))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("rate", ["0", "1e-300", "inf", "nan", "1e12"])
def test_rates_that_no_stamps_can_have(tmp_path: Path, rate: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["make-bag", str(tmp_path / "bag"), "--frames", "2", "--rate", rate]) == 2
    assert f"--rate is {float(rate)}; give 0.001 to 1e+06 frames a second" in capsys.readouterr().err
    assert not (tmp_path / "bag").exists()


def test_without_a_terminal_it_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("make_bag", "evaluation_session"):
        monkeypatch.setattr(f"sparserefine_ros.commands.{module}.TOLD_EVERY_S", 0.0)
    assert cli.main(["make-bag", str(tmp_path / "bag"), "--frames", "3", "--size", "32x64"]) == 0
    assert "2 of 3 frames" in capsys.readouterr().out
    assert cli.main(["evaluate", str(tmp_path / "bag"), "--model", "street", "--offline"]) == 0
    assert "2 of 3 frames, 2 masks" in capsys.readouterr().out


def test_the_hint_is_a_command_that_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bag = tmp_path / ("a long name " * 8) / "my bag"
    assert cli.main(["make-bag", str(bag), "--frames", "1", "--size", "32x64"]) == 0
    hint = capsys.readouterr().out.split("next: sparserefine ")[1]
    assert hint.count("\n") == 1
    assert shlex.split(hint) == ["evaluate", str(bag), "--model", "street"]
    assert cli.main([*shlex.split(hint), "--offline"]) == 0


def test_a_demo_of_other_classes_is_refused_before_its_bag_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rclpy")
    assert cli.main(["demo", "--model", "camvid", "--output", str(tmp_path / "out")]) == 2
    assert "--model camvid has the classes of camvid" in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()
