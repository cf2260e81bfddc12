"""The node as a process of its own, over real DDS: mask values, headers, bad frames, live parameters, exits."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import write_decoder_bundle

pytest.importorskip("rclpy")

from diagnostic_msgs.msg import DiagnosticArray  # noqa: E402
from rcl_interfaces.srv import DescribeParameters  # noqa: E402
from ros_client import LATCHED, Client, double, fill_image, isolated, text  # noqa: E402
from sensor_msgs.msg import CompressedImage, Image  # noqa: E402
from std_msgs.msg import Header, String  # noqa: E402

from sparserefine_ros.datasets.classes import CAMVID  # noqa: E402
from sparserefine_ros.networks.boundaries import draw_boundaries  # noqa: E402
from sparserefine_ros.node.conversion import overlay  # noqa: E402
from sparserefine_ros.node.process import NodeProcess  # noqa: E402
from sparserefine_ros.segmenter.bundle import Bundle  # noqa: E402
from sparserefine_ros.segmenter.segmenter import Segmenter  # noqa: E402


def pixels(message: Image) -> np.ndarray:
    kind = {"mono8": "u1", "rgb8": "u1", "32FC1": "f4"}[message.encoding]
    image = np.frombuffer(message.data, kind).reshape(message.height, message.width, -1)
    assert message.step == image[0].nbytes
    return image[..., 0] if image.shape[2] == 1 else image


@pytest.fixture(scope="module")
def domain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with isolated(tmp_path_factory.mktemp("log")) as number:
        yield number


@pytest.fixture(scope="module")
def offline(tiny_bundle: Path) -> Segmenter:
    return Segmenter(Bundle.load(tiny_bundle), device="cpu")


@pytest.fixture(scope="module")
def running(
    domain: int, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, Client, Any]]:
    """One node for most tests, a client connected to it, and the client's image publisher."""
    parameters = {"model": str(tiny_bundle), "device": "cpu", "threads": "1", "queue": "all"}
    parameters |= {"qos_reliability": "reliable", "qos_depth": "20"}  # bursts must not be lost on the way
    environment = {"ROS_DOMAIN_ID": str(domain)}
    client = Client(domain)
    log = tmp_path_factory.mktemp("node") / "log.txt"
    with NodeProcess(parameters, {"image": "/camera/image_raw"}, environment, log) as process:
        client.alive = process.check
        publisher = client.publisher(Image, "/camera/image_raw")
        client.listen(Image, "segmentation/mask")
        client.listen(DiagnosticArray, "segmentation/timing")
        client.listen(Image, "segmentation/confidence")
        client.listen(DiagnosticArray, "/diagnostics")
        topics = ("segmentation/mask", "segmentation/timing", "segmentation/confidence")
        blank = np.zeros((64, 96, 3), np.uint8)
        client.until_matched(lambda: send(client, publisher, blank), topics)
        client.until(lambda: client.got["/diagnostics"], "diagnostics")
        yield process, client, publisher
        process.check()
    client.close()
    said = log.read_text()
    assert "terminate called" not in said and "Traceback" not in said, said  # __exit__ has checked for status 0


def send(client: Client, publisher: Any, image: np.ndarray, encoding: str = "rgb8", **changes: Any) -> Header:
    header = client.header()
    message = fill_image(Image(), header, image, encoding)
    for name, value in changes.items():
        setattr(message, name, value)
    publisher.publish(message)
    return header


def timing(client: Client, header: Header) -> dict[str, str]:
    return {row.key: row.value for row in client.answer("segmentation/timing", header).status[0].values}


def test_mask_and_confidence_equal_the_offline_segmenter(running: Any, offline: Segmenter, frame: np.ndarray) -> None:
    _, client, publisher = running
    expected = offline.segment([frame])[0]
    assert 0.02 < expected.density < 0.98, "the frame must exercise both branches"
    header = send(client, publisher, frame)
    mask = client.answer("segmentation/mask", header)
    assert mask.header == header
    assert mask.encoding == "mono8" and mask.is_bigendian == (sys.byteorder == "big")
    np.testing.assert_array_equal(pixels(mask), expected.mask)
    confidence = client.answer("segmentation/confidence", header)
    assert confidence.header == header
    np.testing.assert_array_equal(pixels(confidence), expected.confidence)
    report = timing(client, header)
    assert float(report["density"]) == pytest.approx(expected.density, abs=1e-6)
    assert float(report["entropy_threshold"]) == 1.0
    stages = {"decode_ms", "preprocess_ms", "dense_ms", "select_ms", "refine_ms", "merge_ms", "publish_ms"}
    assert stages <= set(report) and all(float(report[s]) >= 0 for s in stages)


def test_sizes_and_encodings_may_change_from_frame_to_frame(
    running: Any, offline: Segmenter, frame: np.ndarray
) -> None:
    _, client, publisher = running
    gray = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    padded = np.zeros((64, 96 * 3 + 13), np.uint8)
    padded[:, : 96 * 3] = frame.reshape(64, -1)
    cropped = np.ascontiguousarray(frame[:47, :61])
    cases = [
        (gray, "mono8", {}, np.repeat(gray[..., None], 3, 2)),
        (np.ascontiguousarray(frame[..., ::-1]), "bgr8", {}, frame),
        (padded, "rgb8", {"width": 96}, frame),
        (cropped, "rgb8", {}, cropped),
        ((gray.astype(">u2") * 257), "mono16", {"is_bigendian": 1}, np.repeat(gray[..., None], 3, 2)),
    ]
    for image, encoding, changes, rgb in cases:
        header = send(client, publisher, image, encoding, **changes)
        answer = client.answer("segmentation/mask", header)
        np.testing.assert_array_equal(pixels(answer), offline.segment([rgb])[0].mask, err_msg=encoding)


def counters(client: Client) -> dict[str, str]:
    """The diagnostics' values as of now; what was sent must have been answered."""
    client.got["/diagnostics"].clear()
    client.until(lambda: len(client.got["/diagnostics"]) > 1, "diagnostics")  # the first may be on its way already
    return {row.key: row.value for row in client.got["/diagnostics"][-1].status[0].values}


def test_bad_frames_are_counted_and_cost_only_themselves(running: Any, frame: np.ndarray) -> None:
    process, client, publisher = running
    data = fill_image(Image(), Header(), frame, "rgb8").data
    bad: list[dict[str, Any]] = [
        {"encoding": "rgb9"},
        {"step": 5},
        {"data": data[:100]},
        {"height": 0, "width": 0, "data": data[:0]},
        {"height": 2**31, "width": 2**31},
    ]
    before = counters(client)
    # A good frame after each bad one: the node must still be there.
    for changes in bad:
        send(client, publisher, frame, **changes)
        client.answer("segmentation/mask", send(client, publisher, frame))
    publisher.publish(b"\0\1\0\0rubbish that is no message")
    client.answer("segmentation/mask", send(client, publisher, frame))
    after = counters(client)
    names = ("received", "processed", "malformed", "dropped", "failed")
    assert {name: int(after[name]) - int(before[name]) for name in names} == {
        "received": 12, "processed": 6, "malformed": 6, "dropped": 0, "failed": 0,
    }  # fmt: skip
    assert after["model"].startswith("model tiny (sparserefine, 11 classes) on cpu")
    said = process.log.read_text()
    assert "'rgb9' is not supported" in said and "bgr8" in said, "the first bad frame's value and remedy are logged"


def test_live_threshold_changes_the_density(running: Any, offline: Segmenter, frame: np.ndarray) -> None:
    _, client, publisher = running
    limit = math.log(len(CAMVID))
    try:
        for threshold in (0.0, 0.6, limit):
            result = client.set("entropy_threshold", double(threshold))
            assert result.successful, result.reason
            offline.entropy_threshold = threshold
            expected = offline.segment([frame])[0]
            header = send(client, publisher, frame)
            report = timing(client, header)
            assert float(report["entropy_threshold"]) == pytest.approx(threshold, rel=1e-5)
            assert float(report["density"]) == pytest.approx(expected.density, abs=1e-6)
            np.testing.assert_array_equal(pixels(client.answer("segmentation/mask", header)), expected.mask)
    finally:
        offline.entropy_threshold = 1.0
        assert client.set("entropy_threshold", text("auto")).successful
    assert float(timing(client, send(client, publisher, frame))["entropy_threshold"]) == 1.0


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("entropy_threshold", double(9.0), ["9.0", "5.5413"]),
        ("entropy_threshold", double(2.5), ["2.5", "11 classes", "2.398"]),  # within the table, above log 11
        ("entropy_threshold", double(-0.1), ["-0.1"]),
        ("entropy_threshold", double(math.nan), ["nan"]),
        ("entropy_threshold", text("low"), ["'low'", "auto"]),
        ("overlay_opacity", double(1.5), ["1.5", "1.0"]),
        ("model", text("street"), ["read-only", "model"]),
    ],
)
def test_bad_live_values_are_refused_with_the_reason(running: Any, name: str, value: Any, words: list[str]) -> None:
    _, client, _ = running
    result = client.set(name, value)
    assert not result.successful
    for word in words:
        assert word in result.reason
    assert client.get("entropy_threshold") == text("auto")


def test_parameters_are_described(running: Any) -> None:
    _, client, _ = running
    request = DescribeParameters.Request(names=["entropy_threshold", "queue"])
    threshold, queue = client.call(DescribeParameters, "segment/describe_parameters", request).descriptors
    assert "nats" in threshold.description
    assert threshold.floating_point_range[0].to_value == 5.5413
    assert queue.additional_constraints == "newest, all"


def test_pictures_fit_the_mask(running: Any, offline: Segmenter, frame: np.ndarray) -> None:
    _, client, publisher = running
    expected = offline.segment([frame])[0]
    colour = CAMVID.lut()[expected.mask]
    wanted = {"color": colour, "overlay": overlay(frame, colour, 0.5), "entropy": expected.entropy}
    topics = {name: f"segmentation/{name}" for name in wanted}
    for topic in topics.values():
        client.listen(Image, topic)
    header = client.until_matched(lambda: send(client, publisher, frame), list(topics.values()))
    for name, image in wanted.items():
        answer = client.answer(topics[name], header)
        np.testing.assert_array_equal(pixels(answer), image, err_msg=name)
        assert answer.header == header
        client.node.destroy_subscription(client.subscriptions.pop(topics[name]))


def test_the_mask_as_png(running: Any, offline: Segmenter, frame: np.ndarray) -> None:
    _, client, publisher = running
    topic = "segmentation/mask/compressed"
    client.listen(CompressedImage, topic)
    header = client.until_matched(lambda: send(client, publisher, frame), [topic])
    answer = client.answer(topic, header)
    assert answer.header == header and answer.format == "mono8; png compressed "
    decoded = cv2.imdecode(np.frombuffer(answer.data, np.uint8), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(decoded, offline.segment([frame])[0].mask)
    client.node.destroy_subscription(client.subscriptions.pop(topic))


def test_outputs_at_a_scale(running: Any, offline: Segmenter, frame: np.ndarray) -> None:
    _, client, publisher = running
    expected = offline.segment([frame])[0]
    assert client.set("output_scale", double(0.5)).successful
    try:
        header = send(client, publisher, frame)
        for topic, image in (("mask", expected.mask), ("confidence", expected.confidence)):
            np.testing.assert_array_equal(pixels(client.answer(f"segmentation/{topic}", header)), image[1::2, 1::2])
    finally:
        assert client.set("output_scale", double(1.0)).successful


def test_a_budget_that_no_threshold_can_keep(running: Any, offline: Segmenter, frame: np.ndarray) -> None:
    """Dense masks, told in timing and diagnostics; without the budget all is as before."""
    process, client, publisher = running
    assert client.set("latency_budget_ms", double(0.001)).successful
    try:
        header = send(client, publisher, frame)
        mask, report = pixels(client.answer("segmentation/mask", header)), timing(client, header)
        np.testing.assert_array_equal(mask, offline.segment([frame], refine=False)[0].mask)
        assert float(report["density"]) == 0 and math.isinf(float(report["entropy_threshold"]))
        assert float(report["latency_ms"]) >= float(report["segment_ms"]) > 0
        values = counters(client)
        assert "latency budget of 0.001 ms" in values["degraded"] and "stay dense" in values["degraded"]
        assert values["latency_counts_from"].startswith("receipt"), "the client's stamps are of another year"
        assert float(values["latency_p95_ms"]) > 0
        assert client.got["/diagnostics"][-1].status[0].level == b"\1"
        assert "latency budget of 0.001 ms" in process.log.read_text()
        refused = client.set("budget_threshold_max", double(0.5))
        assert not refused.successful and "1 to 0.5 nats" in refused.reason
    finally:
        assert client.set("latency_budget_ms", double(0.0)).successful
    header = send(client, publisher, frame)
    np.testing.assert_array_equal(pixels(client.answer("segmentation/mask", header)), offline.segment([frame])[0].mask)
    assert counters(client)["degraded"] == ""


def test_a_generous_budget_changes_nothing(running: Any, offline: Segmenter, frame: np.ndarray) -> None:
    _, client, publisher = running
    assert client.set("latency_budget_ms", double(60000.0)).successful
    try:
        header = send(client, publisher, frame)
        np.testing.assert_array_equal(
            pixels(client.answer("segmentation/mask", header)), offline.segment([frame])[0].mask
        )
        assert float(timing(client, header)["entropy_threshold"]) == 1.0
        values = counters(client)
        assert (values["latency_budget_ms"], values["budget_threshold"], values["degraded"]) == ("60000", "1", "")
        assert float(values["budget_threshold_max"]) == pytest.approx((1 + math.log(11)) / 2, rel=1e-5)
    finally:
        assert client.set("latency_budget_ms", double(0.0)).successful


def test_a_subscriber_that_gets_nothing_is_told_why_in_diagnostics(running: Any) -> None:
    process, client, _ = running
    subscription = client.node.create_subscription(Image, "segmentation/mask", lambda message: None, LATCHED)
    values = counters(client)
    assert "incompatible QoS on /segmentation/mask" in values["degraded"]
    assert "qos_overrides./segmentation/mask.publisher.durability to transient_local" in values["degraded"]
    assert "incompatible QoS on /segmentation/mask" in process.log.read_text()
    client.node.destroy_subscription(subscription)
    client.until(lambda: counters(client)["degraded"] == "", "the mismatch to go")


def test_class_names_are_latched(running: Any) -> None:
    _, client, _ = running
    late = client.listen(String, "segmentation/label_info_json", LATCHED)
    client.until(lambda: late, "label_info_json")
    content = json.loads(late[0].data)
    assert [row["class_name"] for row in content["class_map"]] == list(CAMVID.names)
    assert [tuple(row["color"]) for row in content["class_map"]] == list(CAMVID.palette)
    assert [row["class_id"] for row in content["class_map"]] == list(range(len(CAMVID)))
    assert content["unlabeled"] == 255


def test_compressed_images_in_a_namespace_and_sigterm(
    domain: int, tiny_bundle: Path, offline: Segmenter, frame: np.ndarray, tmp_path: Path
) -> None:
    parameters = {
        "model": str(tiny_bundle), "device": "cpu", "threads": "1", "decoder": "dense",
        "image_transport": "compressed", "qos_reliability": "reliable",
    }  # fmt: skip
    client = Client(domain, "/robot/front")
    log = tmp_path / "log.txt"
    remap = {"__ns": "/robot/front"}
    with NodeProcess(parameters, remap, {"ROS_DOMAIN_ID": str(domain)}, log) as process:
        client.alive = process.check
        publisher = client.publisher(CompressedImage, "image/compressed")
        client.listen(Image, "segmentation/mask")
        png = cv2.imencode(".png", frame[..., ::-1])[1].tobytes()

        def shoot() -> Header:
            header = client.header()
            publisher.publish(CompressedImage(header=header, format="rgb8; png compressed bgr8", data=png))
            return header

        header = client.until_matched(shoot, ["segmentation/mask"])
        mask = client.answer("segmentation/mask", header)
        assert mask.header == header
        np.testing.assert_array_equal(pixels(mask), offline.segment([frame], refine=False)[0].mask)
        client.alive = lambda: None
        os.kill(process.pid, signal.SIGTERM)
        client.until(lambda: process._process.poll() is not None, "exit")
        assert process._process.returncode == 0
    client.close()
    said = log.read_text()
    assert "terminate called" not in said and "Traceback" not in said, said


def test_superpixels_are_drawn_while_somebody_looks(domain: int, tmp_path: Path, frame: np.ndarray) -> None:
    bundle = write_decoder_bundle(tmp_path / "s", "superpixel")
    parameters = {
        "decoder": "superpixel", "model": str(bundle), "device": "cpu", "threads": "1", "qos_reliability": "reliable",
    }  # fmt: skip
    client = Client(domain)
    process = NodeProcess(parameters, {}, {"ROS_DOMAIN_ID": str(domain)}, tmp_path / "log.txt")
    with process:
        client.alive = process.check
        publisher = client.publisher(Image, "/image")
        client.listen(Image, "segmentation/superpixels")
        client.until_matched(lambda: send(client, publisher, frame), ("segmentation/superpixels",))
        drawn = client.answer("segmentation/superpixels", send(client, publisher, frame))
    client.close()
    ids = Segmenter(Bundle.load(bundle), "cpu").superpixels(frame)
    assert drawn.encoding == "rgb8"
    np.testing.assert_array_equal(pixels(drawn), draw_boundaries(frame, ids))


def corrupt(bundle: Path, folder: Path) -> Path:
    shutil.copytree(bundle, folder)
    weights = bytearray((folder / "refiner.safetensors").read_bytes())
    weights[-1] ^= 0xFF
    (folder / "refiner.safetensors").write_bytes(bytes(weights))
    return folder


def test_start_up_fails_with_one_clear_line_and_no_topic(domain: int, tiny_bundle: Path, tmp_path: Path) -> None:
    good = f"model:={tiny_bundle}"
    cases = {
        "missing bundle": (["model:=nowhere"], ["nowhere", "model.yaml"]),
        "corrupt weights": ([f"model:={corrupt(tiny_bundle, tmp_path / 'bad')}"], ["refiner.safetensors", "sha256"]),
        "threshold above log K": ([good, "entropy_threshold:=2.5"], ["2.5", "2.398", "11 classes"]),
        "unknown choice": ([good, "precision:=fp64"], ["'fp64'", "fp32, fp16, bf16"]),
    }
    environment = {**os.environ, "ROS_DOMAIN_ID": str(domain)}
    client = Client(domain)
    seen: set[str] = set()
    running = {}
    for name, (parameters, _) in cases.items():
        command = [sys.executable, "-m", "sparserefine_ros.node.main", "--ros-args", "-r", "__ns:=/failing"]
        command += [part for p in parameters for part in ("-p", p)]
        running[name] = subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def ended() -> bool:
        seen.update(topic for topic, _ in client.node.get_topic_names_and_types())
        return all(process.poll() is not None for process in running.values())

    client.until(ended, "the failing nodes to exit")
    client.close()
    assert not [topic for topic in seen if topic.startswith("/failing/segmentation")]
    for name, process in running.items():
        out, err = process.communicate()
        assert process.returncode == 2, f"{name}: {out}{err}"
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, f"{name}: {err}"
        assert "Traceback" not in err, f"{name}: {err}"
        for word in cases[name][1]:
            assert word in lines[0], f"{name}: {lines[0]}"
