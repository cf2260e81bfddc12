"""`make-bag` and `evaluate` end to end: live node over DDS and segmenter alone must agree to the last digit."""

from __future__ import annotations

import argparse
import io
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import write_decoder_bundle
from rich.console import Console
from rosbags.rosbag2 import StoragePlugin, Writer

from sparserefine_ros.commands import evaluate as evaluate_command
from sparserefine_ros.commands import evaluation_session, make_bag
from sparserefine_ros.commands.evaluation_session import Options, evaluate, parameter_values
from sparserefine_ros.datasets.base import Sample
from sparserefine_ros.datasets.classes import CAMVID, CITYSCAPES
from sparserefine_ros.errors import BagError, DatasetError, ParameterError, ResultError, SparseRefineError
from sparserefine_ros.evaluation import bag_messages as messages
from sparserefine_ros.evaluation import curves, files
from sparserefine_ros.evaluation.bag_writer import IMAGE_TOPIC, START_NS, BagWriter
from sparserefine_ros.evaluation.bags import Bag
from sparserefine_ros.evaluation.metrics import ConfusionMatrix
from sparserefine_ros.segmenter.bundle import Bundle
from sparserefine_ros.segmenter.segmenter import Segmenter

SIZE = (48, 72)
KEYS = {"miou", "iou", "density", "frames", "latency_ms", "stages_ms", "hardware", "versions", "bag", "model", "mode"}


def samples(count: int) -> list[Sample]:
    """Frames with structure, and labels that the random bundle gets right now and then."""
    rng = np.random.default_rng(5)
    result = []
    for i in range(count):
        coarse = rng.uniform(0, 255, (6, 9, 3)).repeat(8, 0).repeat(8, 1)
        image = (0.8 * coarse + rng.uniform(0, 50, coarse.shape)).astype(np.uint8)
        label = rng.integers(0, 11, (6, 9), np.uint8).repeat(8, 0).repeat(8, 1)
        label[:3] = 255
        result.append(Sample(image, label, str(i), START_NS + round(i * 1e9 / 15)))
    return result


@pytest.fixture(scope="module")
def bag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bags") / "drive"
    with BagWriter(path, CAMVID) as writer:
        for sample in samples(6):
            writer.write(sample.image, sample.label, sample.stamp_ns)
    return path


def quiet() -> Console:
    return Console(file=io.StringIO())


def offline(path: Path, bundle: Path, **options: Any) -> dict[str, Any]:
    return evaluate(Options(path, {"model": str(bundle), "device": "cpu"}, offline=True, **options), quiet())


def broken_image(stamp: int) -> bytes:
    """An image that says it is larger than its data."""
    message = messages.deserialize(messages.image_message(samples(1)[0].image, "rgb8", stamp, ""), messages.IMAGE)
    message.height = SIZE[0] * 2
    return messages.serialize(message, messages.IMAGE)


def with_a_broken_frame(path: Path, topic: str = IMAGE_TOPIC) -> Path:
    """Three frames, the second malformed, without ground truth."""
    first, last = samples(2)
    images = [
        messages.image_message(first.image, "rgb8", 1, ""),
        broken_image(2),
        messages.image_message(last.image, "rgb8", 3, ""),
    ]
    with Writer(path, version=8, storage_plugin=StoragePlugin.MCAP) as writer:
        connection = writer.add_connection(topic, messages.IMAGE, typestore=messages.typestore())
        for i, data in enumerate(images):
            writer.write(connection, i, data)
    return path


def test_offline_equals_the_confusion_matrix_computed_directly(bag: Path, tiny_bundle: Path) -> None:
    result = offline(bag, tiny_bundle)
    segmenter, matrix, densities = Segmenter(Bundle.load(tiny_bundle), device="cpu"), ConfusionMatrix(CAMVID), []
    for sample in samples(6):
        segmentation = segmenter.segment([sample.image])[0]
        assert sample.label is not None
        matrix.update(sample.label, segmentation.mask)
        densities.append(segmentation.density)
    assert 0 < matrix.miou() < 1 and 0 < np.mean(densities) < 1
    assert result["miou"] == matrix.miou()
    assert {k: v for k, v in result["iou"].items() if v is not None} == {
        k: v for k, v in matrix.iou().items() if v == v
    }
    assert result["density"] == pytest.approx(np.mean(densities), rel=1e-6)
    assert result["frames"] == {"sent": 6, "received": 6, "processed": 6, "dropped": 0}
    assert set(result["stages_ms"]) >= {"preprocess", "dense", "select", "refine", "merge"}


def test_parameters_reach_the_segmenter(bag: Path, tiny_bundle: Path) -> None:
    texts = {"model": str(tiny_bundle), "device": "cpu", "entropy_threshold": "2", "decoder": "dense", "scale": "0.75"}
    result = evaluate(Options(bag, texts, offline=True), quiet())
    found = (result["entropy_threshold"], result["decoder"], result["scale"], result["stages_ms"]["refine"]["max"])
    assert found == (2.0, "dense", 0.75, 0.0)


def test_live_node_gives_the_same_numbers(bag: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("rclpy")
    parameters = {"model": str(tiny_bundle), "device": "cpu", "threads": "1"}
    options = Options(bag, parameters, rate=0.0, json=tmp_path / "r.json", output=tmp_path / "out", save_masks=True)
    live, alone = evaluate(options, quiet()), offline(bag, tiny_bundle)
    assert live["mode"] == "live" and live["node_exit_code"] == 0 and live["lossless"]
    assert live["frames"] == {"sent": 6, "received": 6, "processed": 6, "dropped": 0}
    assert live["miou"] == alone["miou"] and live["iou"] == alone["iou"]
    assert live["density"] == pytest.approx(alone["density"], abs=1e-6)
    latency = live["latency_ms"]
    assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["max"]
    assert latency["max"] > live["stages_ms"]["dense"]["max"] > 0 and "publish" in live["stages_ms"]
    assert set(json.loads((tmp_path / "r.json").read_text())) >= KEYS
    assert "configured: model tiny" in (tmp_path / "out" / "node.log").read_text()
    assert cv2.imread(str(tmp_path / "out" / "evaluation.png")) is not None
    expected = Segmenter(Bundle.load(tiny_bundle), device="cpu").segment([samples(1)[0].image])[0].mask
    saved = cv2.imread(str(tmp_path / "out" / "masks" / f"{START_NS}.png"), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(saved, expected)
    assert len(list((tmp_path / "out" / "masks").glob("*_color.png"))) == 6


def test_live_node_rejects_a_broken_frame_and_goes_on(tiny_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("rclpy")
    path = with_a_broken_frame(tmp_path / "bag", "front camera/2024-05-01")  # no name to ROS, but to other recorders
    result = evaluate(Options(path, {"model": str(tiny_bundle), "device": "cpu"}, rate=0.0), quiet())
    assert result["bag"]["image_topic"] == "front camera/2024-05-01"
    assert result["frames"] == {"sent": 3, "received": 3, "processed": 2, "dropped": 1}
    assert (result["node_counters"]["malformed"], result["timeouts"], result["miou"]) == (1, 0, None)


def test_offline_leaves_out_a_broken_frame(tiny_bundle: Path, tmp_path: Path) -> None:
    result = offline(with_a_broken_frame(tmp_path / "bag"), tiny_bundle)
    assert result["frames"] == {"sent": 3, "received": 3, "processed": 2, "dropped": 1}
    assert result["node_counters"]["malformed"] == 1 and result["miou"] is None and result["iou"] is None


@pytest.mark.parametrize("option", ["json", "report", "output"])
def test_what_cannot_be_written_is_said_before_the_replay(
    option: str, bag: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(evaluation_session, "segment_bag", lambda *_: pytest.fail("replayed"))
    with pytest.raises(ResultError, match=r"cannot make the folder .*file"):
        offline(bag, tiny_bundle, **{option: tmp_path / "file" / "new"})
    files.check(Path("/dev/null"))  # in a folder that only root may write to
    if option != "output":
        with pytest.raises(ResultError, match="it is a folder; give a file"):
            offline(bag, tiny_bundle, **{option: tmp_path})


@pytest.mark.parametrize(
    ("decoder", "texts", "expected"),
    [
        ("superpixel", {}, "superpixel + sparserefine"),
        ("superpixel", {"refine": "false"}, "superpixel"),
        ("offseg", {"refine": "false"}, "offseg"),
        ("per-pixel", {}, "sparserefine"),
    ],
)
def test_the_decoder_is_named(bag: Path, tmp_path: Path, decoder: str, texts: dict[str, str], expected: str) -> None:
    bundle = write_decoder_bundle(tmp_path / "bundle", decoder)
    assert (
        evaluate(Options(bag, {"model": str(bundle), "device": "cpu", **texts}, offline=True), quiet())["decoder"]
        == expected
    )


def test_an_earlier_picture_is_no_picture_of_this_run(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "evaluation.png").touch()
    with Writer(tmp_path / "bag", version=8, storage_plugin=StoragePlugin.MCAP) as writer:
        connection = writer.add_connection(IMAGE_TOPIC, messages.IMAGE, typestore=messages.typestore())
        writer.write(connection, 1, broken_image(1))
    assert offline(tmp_path / "bag", tiny_bundle, output=tmp_path)["frames"]["processed"] == 0
    assert not (tmp_path / "evaluation.png").exists()


def test_a_label_of_another_size_than_its_jpeg_is_said_before_the_replay(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = samples(1)[0]
    with Writer(tmp_path / "bag", version=8, storage_plugin=StoragePlugin.MCAP) as writer:
        kinds = {"/jpeg": messages.COMPRESSED, "/camera/label": messages.IMAGE}
        topics = {t: writer.add_connection(t, kind, typestore=messages.typestore()) for t, kind in kinds.items()}
        writer.write(topics["/jpeg"], 1, messages.compressed_message(sample.image, "jpeg", 1, ""))
        assert sample.label is not None
        writer.write(topics["/camera/label"], 1, messages.image_message(sample.label[::2, ::2], "mono8", 1, ""))
    monkeypatch.setattr(evaluation_session, "segment_bag", lambda *_: pytest.fail("replayed"))
    with pytest.raises(BagError, match="stamp 1 ns the image is 72x48 but its label 36x24"):
        offline(tmp_path / "bag", tiny_bundle)


def test_curves_hold_no_more_than_their_pixels(bag: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames of 72x48: six of them, or as many as fit, one at least."""
    with Bag(bag) as opened:
        scored = {stamp for stamp, _ in opened.labels()}
        for pixels, expected in ((6 * 72 * 48, 6), (3 * 72 * 48 + 1, 3), (1, 1)):
            monkeypatch.setattr(curves, "PIXELS", pixels)
            assert len(evaluation_session._labelled_samples(opened, scored)) == expected
        assert [s.stamp_ns for s in evaluation_session._labelled_samples(opened, {max(scored)})] == [max(scored)]


def test_node_that_cannot_start_is_quoted(tmp_path: Path) -> None:
    pytest.importorskip("rclpy")
    from sparserefine_ros.node.process import NodeError, NodeProcess

    with (
        pytest.raises(NodeError, match=r"(?s)status 2.*nowhere"),
        NodeProcess({"model": "nowhere"}, {}, {"ROS_AUTOMATIC_DISCOVERY_RANGE": "OFF"}, tmp_path / "log") as node,
    ):
        while True:
            node.check()


def test_sigterm_unwinds_as_ctrl_c_does() -> None:
    """Else the node of a replay, in a session of its own, would go on for ever."""
    code = """
import os, signal
from sparserefine_ros import cli
with cli.unwinding():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    finally:
        print("node stopped")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "node stopped\n")


def test_class_mismatch_is_said_before_the_node_starts(tiny_bundle: Path, tmp_path: Path) -> None:
    with BagWriter(tmp_path / "bag", CITYSCAPES) as writer:
        writer.write(samples(1)[0].image, None, 1)
    with pytest.raises(BagError, match=r"19 classes \(cityscapes\) but the bundle has 11 \(camvid\).*--model"):
        evaluate(Options(tmp_path / "bag", {"model": str(tiny_bundle), "device": "cpu"}), quiet())


def test_without_ros_the_remedy_is_named(bag: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sparserefine_ros.node.replay", raising=False)
    monkeypatch.setitem(sys.modules, "rclpy", None)
    with pytest.raises(SparseRefineError, match=r"rclpy.*source a ROS 2 environment.*--offline"):
        evaluate(Options(bag, {"model": str(tiny_bundle), "device": "cpu"}), quiet())


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"entropy_threshold": "hot"}, "'entropy_threshold' is 'hot'; it must be: auto, 0 to"),
        ({"entropy_threshold": "-1"}, "'entropy_threshold' is -1; it must be: auto, 0 to"),
        ({"decoder": "magic"}, "'decoder' is 'magic'; it must be: auto, sparserefine, superpixel, offseg, dense"),
        ({"colour": "red"}, "unknown parameter 'colour'; the node has decoder, model"),
    ],
)
def test_parameters_are_checked_as_the_node_checks_them(texts: dict[str, str], message: str) -> None:
    with pytest.raises(ParameterError) as caught:
        parameter_values(texts)
    assert message in str(caught.value)


def arguments(module: Any, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rate", "-1"), "--rate is -1.0; give 0 (lossless) or a factor above 0"),
        (("--rate", "nan"), "--rate is nan"),
        (("--rate", "inf"), "--rate is inf"),
        (("--answer-timeout", "0"), "--answer-timeout is 0.0"),
        (("--domain-id", "300"), "--domain-id is 300; give 0 to 101"),
        (("--save-masks",), "--save-masks needs --output DIR"),
    ],
)
def test_bad_options(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ParameterError) as caught:
        evaluate_command.options(arguments(evaluate_command, "bag", *words))
    assert message in str(caught.value)


def test_options_from_the_command_line() -> None:
    options = evaluate_command.options(
        arguments(evaluate_command, "drive", "--wait", "--entropy-threshold", "0.4", "--model", "m")
    )
    assert (options.rate, options.parameters) == (0.0, {"entropy_threshold": "0.4", "model": "m"})
    assert evaluate_command.options(arguments(evaluate_command, "drive")).rate == 1.0


@pytest.mark.parametrize(("given", "file"), [("out", "out/report.html"), ("out/my.html", "out/my.html")])
def test_a_report_is_a_file_or_goes_into_a_folder(given: str, file: str) -> None:
    assert evaluate_command.options(arguments(evaluate_command, "drive", "--report", given)).report == Path(file)


def write_camvid(root: Path) -> None:
    for folder in ("image", "label"):
        (root / "val" / folder).mkdir(parents=True)
    for i, sample in enumerate(samples(3)):
        assert sample.label is not None
        cv2.imwrite(str(root / "val" / "image" / f"{i}.jpg"), sample.image)
        cv2.imwrite(str(root / "val" / "label" / f"{i}.png"), np.where(sample.label == 255, 11, sample.label))


def test_make_bag_from_camvid_resizes_without_mixing_classes(tmp_path: Path) -> None:
    write_camvid(tmp_path)
    words = ["--source", "camvid", "--root", str(tmp_path), "--size", "24x36", "--rate", "4", "--frames", "2"]
    assert make_bag.run(arguments(make_bag, str(tmp_path / "bag"), *words)) == 0
    with Bag(tmp_path / "bag") as read:
        assert read.check(CAMVID) == [START_NS, START_NS + 250_000_000]
        labels = [label for _, label in read.labels()]
        shapes = {(m.height, m.width) for _, m in read.image_messages()}
    assert shapes == {(24, 36)}
    for label, sample in zip(labels, samples(2), strict=True):
        assert sample.label is not None
        np.testing.assert_array_equal(label[2:], sample.label[4::2, ::2])  # 8-pixel blocks survive halving
        assert (label[0] == 255).all()


def test_make_bag_refuses_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="--source camvid needs --root"):
        make_bag.run(arguments(make_bag, str(tmp_path / "bag"), "--source", "camvid"))
    with pytest.raises(ParameterError, match="--frames is 0"):
        make_bag.run(arguments(make_bag, str(tmp_path / "bag"), "--frames", "0"))
    with pytest.raises(ParameterError, match=r"--rate is -2\.0"):
        make_bag.run(arguments(make_bag, str(tmp_path / "bag"), "--rate", "-2"))
    with pytest.raises(SystemExit):
        arguments(make_bag, "bag", "--size", "10by20")
