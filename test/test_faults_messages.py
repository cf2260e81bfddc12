"""Hostile messages: fuzzed fields and bytes, truncation; a camera that changes its resolution. docs/faults.md."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("rclpy")

import test_cameras  # noqa: E402
from builtin_interfaces.msg import Time  # noqa: E402
from diagnostic_msgs.msg import DiagnosticArray  # noqa: E402
from rcl_interfaces.msg import Parameter as RosParameter  # noqa: E402
from rcl_interfaces.msg import ParameterType, ParameterValue  # noqa: E402
from rcl_interfaces.srv import SetParameters  # noqa: E402
from rclpy.serialization import serialize_message  # noqa: E402
from ros_client import Client, fill_image, isolated  # noqa: E402
from rosgraph_msgs.msg import Clock  # noqa: E402
from sensor_msgs.msg import Image  # noqa: E402
from std_msgs.msg import Header  # noqa: E402
from test_cameras import Bench  # noqa: E402

from sparserefine_ros.node.encodings import ENCODINGS  # noqa: E402
from sparserefine_ros.node.process import NodeProcess  # noqa: E402
from sparserefine_ros.segmenter.bundle import Bundle  # noqa: E402
from sparserefine_ros.segmenter.segmenter import Segmenter  # noqa: E402

context, make = test_cameras.context, test_cameras.make

GOOD: bytes = serialize_message(fill_image(Image(), Header(frame_id="c"), np.full((4, 6, 3), 9, np.uint8), "rgb8"))
HUGE = struct.pack("<I", 2**32 - 1)
RAISED_MB = 200  # of memory that no sender may make the node take with a few bytes
EXAMPLES = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

fields = st.fixed_dictionaries(
    {},
    optional={
        "encoding": st.one_of(st.sampled_from(sorted(ENCODINGS)), st.text(max_size=20)),
        "height": st.integers(0, 2**32 - 1) | st.integers(0, 8),
        "width": st.integers(0, 2**32 - 1) | st.integers(0, 8),
        "step": st.integers(0, 2**32 - 1) | st.integers(0, 40),
        "is_bigendian": st.integers(0, 255),
        "data": st.binary(max_size=100),
    },
)


@st.composite
def spoilt(draw: Any) -> bytes:
    """A good message, cut, with other bytes in some places, or with more behind."""
    data = bytearray(GOOD)
    for at in draw(st.lists(st.integers(0, len(data) - 4), max_size=4)):
        data[at : at + 4] = draw(st.sampled_from([HUGE, bytes(4), b"\0\0\0\x80"]) | st.binary(min_size=4, max_size=4))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data) + draw(st.binary(max_size=8))


def attacked(bench: Bench, message: bytes) -> None:
    """The message costs at most itself: it is counted, and the frame after it gets its mask."""
    bench.node._receive(bench.camera(""), message)
    bench.settled()
    bench.feed("", 7)
    bench.settled()
    counts = bench.counts("")
    assert set(counts) <= {"received", "processed", "malformed", "stale"}
    assert counts["received"] == counts["processed"] + counts.get("malformed", 0)
    assert bench.masks[""][-1] == 7


def test_fuzzed_fields(make: Callable[..., Bench]) -> None:
    bench = make().start()

    @EXAMPLES
    @given(fields)
    def attack(changes: dict[str, Any]) -> None:
        message = fill_image(Image(), Header(), np.full((4, 6, 3), 9, np.uint8), "rgb8")
        for name, value in changes.items():
            setattr(message, name, value)
        attacked(bench, serialize_message(message))

    attack()
    assert bench.counts("")["malformed"] > 20, "most of them are no images"


def test_fuzzed_bytes(make: Callable[..., Bench]) -> None:
    bench = make().start()
    attack = EXAMPLES(given(spoilt())(lambda message: attacked(bench, message)))
    attack()
    assert bench.counts("")["malformed"] > 20


def test_every_truncation_is_malformed(make: Callable[..., Bench]) -> None:
    bench = make().start()
    for length in range(len(GOOD)):
        bench.node._receive(bench.camera(""), GOOD[:length])
        bench.settled()
    assert bench.counts("") == {"received": len(GOOD), "malformed": len(GOOD)}
    attacked(bench, GOOD)


@pytest.fixture(scope="module")
def running(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[NodeProcess, Client, Any]]:
    """A node of its own process, a client connected to it, and the client's image publisher."""
    log = tmp_path_factory.mktemp("node") / "log.txt"
    parameters = {"model": str(tiny_bundle), "device": "cpu", "threads": 1, "queue": "all", "queue_size": 500}
    parameters |= {"qos_reliability": "reliable", "qos_depth": 500}
    with isolated(log.parent) as domain:
        client = Client(domain)
        with NodeProcess(parameters, {}, {"ROS_DOMAIN_ID": str(domain)}, log) as process:
            client.alive = process.check
            publisher = client.publisher(Image, "image")
            client.listen(Image, "segmentation/mask")
            client.listen(DiagnosticArray, "/diagnostics")
            client.until_matched(
                lambda: send(client, publisher, np.zeros((64, 96, 3), np.uint8)), ["segmentation/mask"]
            )
            yield process, client, publisher
        client.close()


def send(client: Client, publisher: Any, image: np.ndarray) -> Header:
    header = client.header()
    publisher.publish(fill_image(Image(), header, image, "rgb8"))
    return header


def counters(client: Client) -> dict[str, str]:
    client.got["/diagnostics"].clear()
    client.until(lambda: len(client.got["/diagnostics"]) > 1, "diagnostics")  # the first may be on its way already
    return {row.key: row.value for row in client.got["/diagnostics"][-1].status[0].values}


def peak_mb(process: NodeProcess) -> float:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def test_hostile_bytes_over_dds(running: Any, frame: np.ndarray) -> None:
    """As a publisher can send them that is no ROS: nothing of the native stack ends the process either."""
    process, client, publisher = running
    hostile = [GOOD[:length] for length in range(4, len(GOOD), 5)]
    hostile += [GOOD[:at] + HUGE + GOOD[at + 4 :] for at in range(4, len(GOOD) - 60, 4)]
    hostile += [b"\xff" * 100, b"\0\1\0\0" + HUGE * 20, b"\0\0" + GOOD[2:], bytes(40)]
    before, peak = counters(client), peak_mb(process)
    for message in hostile:
        publisher.publish(message)
    client.answer("segmentation/mask", send(client, publisher, frame))
    after = counters(client)
    new = {name: int(after[name]) - int(before[name]) for name in ("received", "processed", "malformed")}
    assert new["received"] == len(hostile) + 1 == new["processed"] + new["malformed"]
    assert new["malformed"] > len(hostile) / 2 and new["processed"] >= 1
    assert after["failed"] == before["failed"]
    assert peak_mb(process) - peak < RAISED_MB


def test_what_rclpy_itself_fails_at(running: Any, frame: np.ndarray) -> None:
    """A parameter of a type that does not exist, a /clock before 1970: rclpy raises, and the node goes on."""
    process, client, publisher = running
    service = client.node.create_client(SetParameters, "segment/set_parameters")
    client.until(service.service_is_ready, "set_parameters")
    unheard_of = RosParameter(name="overlay_opacity", value=ParameterValue(type=77))
    for _ in range(300):
        service.call_async(SetParameters.Request(parameters=[unheard_of]))  # rclpy gives no answer
    client.until(lambda: "the node goes on: ValueError: 77 is not" in process.log.read_text(), "a complaint")
    clock = client.node.create_publisher(Clock, "/clock", 10)

    def refused() -> bool:
        clock.publish(Clock(clock=Time(sec=-1)))  # the first may be lost: the other side has yet to match
        return "ValueError: Seconds value must not be negative" in process.log.read_text()

    for on in (True, False):
        use = ParameterValue(type=ParameterType.PARAMETER_BOOL, bool_value=on)
        assert client.set("use_sim_time", use).successful
        if on:
            client.until(clock.get_subscription_count, "a subscriber of /clock")
            client.until(refused, "another")
    client.answer("segmentation/mask", send(client, publisher, frame))


def test_the_resolution_changes_in_mid_stream(running: Any, tiny_bundle: Path, frame: np.ndarray) -> None:
    """The next mask has the new size and the values of that image; the process stays."""
    _, client, publisher = running
    offline = Segmenter(Bundle.load(tiny_bundle), device="cpu")
    large = np.tile(frame, (2, 1, 1))
    for image in (frame, np.ascontiguousarray(frame[:33, :47]), large, frame):
        mask = client.answer("segmentation/mask", send(client, publisher, image))
        assert (mask.height, mask.width) == image.shape[:2]
        expected = offline.segment([image])[0].mask
        np.testing.assert_array_equal(np.frombuffer(mask.data, np.uint8).reshape(image.shape[:2]), expected)
