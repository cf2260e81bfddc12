"""The frame queue, the transport profile, and the signs of lost images."""

from __future__ import annotations

import struct
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparserefine_ros.node import transport
from sparserefine_ros.node.frame_queue import FrameQueue
from sparserefine_ros.node.transport import Arrivals, config_file, has_profile, loses_images, profile_env, stamp_of

ROOT = Path(__file__).resolve().parents[1]


@given(st.integers(1, 5), st.lists(st.booleans(), max_size=30))
def test_queue_keeps_the_newest_in_order(capacity, steps):
    queue, model, serial = FrameQueue(capacity), [], 0
    for puts in steps:
        if puts:
            frame = serial.to_bytes(2, "big")
            serial += 1
            assert queue.put(frame) == int(len(model) == capacity)
            model = [*model, frame][-capacity:]
        elif model:
            assert queue.get() == model.pop(0)
        assert len(queue) == len(model)


def test_an_empty_queue_says_so():
    queue = FrameQueue(2)
    assert queue.clear() == 0
    queue.put(b"1"), queue.put(b"2")
    assert queue.clear() == 2 and len(queue) == 0
    with pytest.raises(IndexError):
        queue.get()


def test_profile_is_found_and_holds_an_image():
    path = config_file("fastdds.xml")
    assert path == ROOT / "config" / "fastdds.xml"
    space = {"d": "http://www.eprosima.com"}
    tree = ElementTree.parse(path).getroot()
    kinds = {
        t.findtext("d:transport_id", namespaces=space): t for t in tree.iterfind(".//d:transport_descriptor", space)
    }
    used = [e.text for e in tree.iterfind(".//d:participant//d:userTransports/d:transport_id", space)]
    assert sorted(used) == sorted(kinds)
    by_type = {t.findtext("d:type", namespaces=space): t for t in kinds.values()}
    assert set(by_type) == {"SHM", "UDPv4"}, "UDP stays for discovery and other machines"
    image_4k = 3840 * 2160 * 3
    assert int(by_type["SHM"].findtext("d:segment_size", namespaces=space)) >= 2 * image_4k
    assert tree.find(".//d:participant", space).get("is_default_profile") == "true"


def test_missing_file_names_the_places():
    with pytest.raises(FileNotFoundError, match="nothing.xml is in none of: .*config"):
        config_file("nothing.xml")


MINE = str(ROOT / "config" / "fastdds.xml")  # any file that is there
LARGE = {"FASTDDS_BUILTIN_TRANSPORTS": "LARGE_DATA"}


@pytest.mark.parametrize(
    "environment",
    [
        {"FASTDDS_DEFAULT_PROFILES_FILE": MINE},
        {"FASTRTPS_DEFAULT_PROFILES_FILE": MINE},
        {"ROS_DISTRO": "jazzy", "FASTRTPS_DEFAULT_PROFILES_FILE": MINE},
        LARGE,
        {"FASTDDS_BUILTIN_TRANSPORTS": "LARGE_DATA?max_msg_size=1MB", "ROS_AUTOMATIC_DISCOVERY_RANGE": "SUBNET"},
    ],
)
def test_the_users_choice_stands(environment):
    assert has_profile(environment)
    assert profile_env(environment) == {}
    assert not loses_images("rmw_fastrtps_cpp", environment)


@pytest.mark.parametrize(
    "environment",
    [
        {"FASTDDS_DEFAULT_PROFILES_FILE": "/nowhere/fastdds.xml"},
        {"ROS_DISTRO": "humble", "FASTDDS_DEFAULT_PROFILES_FILE": MINE},  # Fast DDS 2 knows the other name alone
        {"ROS_DISTRO": "jazzy", **LARGE},
        {**LARGE, "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"},
        {**LARGE, "ROS_LOCALHOST_ONLY": "1"},
    ],
)
def test_a_choice_that_has_no_effect_is_none(environment):
    assert loses_images("rmw_fastrtps_cpp", environment)
    assert list(profile_env(environment).values()) == [MINE]


def test_profile_for_the_distribution():
    path = str(config_file("fastdds.xml"))
    assert profile_env({}) == {"FASTDDS_DEFAULT_PROFILES_FILE": path}
    assert profile_env({"ROS_DISTRO": "kilted"}) == {"FASTDDS_DEFAULT_PROFILES_FILE": path}
    for old in ("humble", "jazzy"):
        assert profile_env({"ROS_DISTRO": old}) == {"FASTRTPS_DEFAULT_PROFILES_FILE": path}


def test_loss_is_foreseen_for_fast_dds_only():
    for small in ({}, {"FASTDDS_BUILTIN_TRANSPORTS": "UDPv4"}, {"FASTDDS_DEFAULT_PROFILES_FILE": ""}):
        assert loses_images("rmw_fastrtps_cpp", small)
        assert loses_images("rmw_fastrtps_dynamic_cpp", small)
    assert not loses_images("rmw_cyclonedds_cpp", {})
    assert not loses_images("rmw_zenoh_cpp", {})
    assert "fastdds.xml for every process" in transport.remedy()
    assert "fastdds.xml for the process that publishes them too" in transport.remedy(everywhere=False)


@pytest.mark.parametrize(("flag", "order"), [(1, "<"), (0, ">")])
def test_stamp_in_both_byte_orders(flag, order):
    frame = bytes([0, flag, 0, 0]) + struct.pack(f"{order}iI", 1_700_000_000, 250_000_000) + b"rest"
    assert stamp_of(frame) == 1_700_000_000_250_000_000


def test_stamp_of_a_real_message():
    pytest.importorskip("rclpy")
    from rclpy.serialization import serialize_message
    from sensor_msgs.msg import Image

    message = Image()
    message.header.stamp.sec, message.header.stamp.nanosec = 12, 345
    assert stamp_of(serialize_message(message)) == 12_000_000_345


def test_stamp_of_too_few_bytes():
    assert stamp_of(b"\0\1\0\0\1\2\3") is None


def arrivals(stamps_ms: list[float]) -> Arrivals:
    result = Arrivals(silence_s=3.0)
    for stamp in stamps_ms:
        result.arrived(round(stamp * 1e6), stamp / 1e3)
    return result


def test_regular_arrival_is_no_loss():
    jitter = [0, 2, -1, 3, 1, -2, 0, 1, 2, -3]
    watch = arrivals([33.3 * i + j for i, j in enumerate(jitter * 3)])
    assert watch.loss() < 0.2
    assert watch.complaint(1.0, 1, 0.0) == ""


def test_gaps_between_stamps_are_loss():
    kept = [i for i in range(60) if i % 6 in (0, 1)]  # two of six arrive
    watch = arrivals([33.0 * i for i in kept])
    assert watch.loss() == pytest.approx(1 - 2 / 6, abs=0.03)
    assert "% of the images seem lost" in watch.complaint(2.0, 1, 0.0)


@pytest.mark.parametrize(
    "stamps",
    [
        [1000 / 15 * i + 35 * (i % 15 == 7) for i in range(60)],  # one frame in fifteen is late
        np.cumsum(np.random.default_rng(0).normal(0, 3.5, 60) + 1000 / 30).tolist(),  # stamped on arrival, 5 ms jitter
        np.cumsum(np.random.default_rng(1).normal(0, 2.1, 60) + 1000 / 60).tolist(),
    ],
)
def test_uneven_stamps_are_no_loss(stamps):
    assert arrivals(stamps).complaint(stamps[-1] / 1e3, 1, 0.0) == ""


def numbered(received: list[int], stamps_ms: Callable[[int], float]) -> Arrivals:
    """Frames that bear their publisher's numbers."""
    result, lost = Arrivals(), 0
    for before, number in zip([received[0] - 1, *received], received, strict=False):
        lost += number - before - 1
        result.arrived(round(stamps_ms(number) * 1e6), number / 30, lost)
    return result


def test_the_publishers_numbers_are_believed_before_stamps():
    pairs = numbered(list(range(60)), lambda i: 66 * (i // 2) + 3 * (i % 2))  # HDR: two frames, then a pause
    assert pairs.loss() == 0 and pairs.complaint(2.0, 1, 0.0) == ""
    third = numbered(list(range(0, 180, 3)), lambda i: 33 * i)  # evenly lost: stamps cannot tell
    assert third.loss() == pytest.approx(2 / 3) and arrivals([99.0 * i for i in range(60)]).loss() == 0
    assert third.complaint(6.0, 1, 0.0) == "67 % of the images are lost before they arrive"
    assert numbered([5, 90], lambda i: 33 * i).loss() == pytest.approx(84 / 85), "two frames can be enough"
    assert numbered([5, 8], lambda i: 33 * i).loss() == 0
    long_ago = numbered([0, *range(100, 170)], lambda i: 33 * i)
    assert long_ago.loss() == 0 and long_ago.complaint(5.7, 1, 0.0) == ""


def test_few_frames_say_nothing():
    assert arrivals([0, 33, 500, 533]).loss() == 0.0


def test_silence_is_told_only_while_somebody_publishes():
    watch = arrivals([0, 100, 200])
    assert watch.complaint(2.0, 1, 0.0) == ""
    assert watch.complaint(7.2, 2, 0.0) == "no image for 7 s although 2 publisher(s) offer the topic"
    assert watch.complaint(7.2, 0, 0.0) == ""
    never = Arrivals()
    assert never.complaint(4.0, 1, 2.0) == ""
    assert "no image for 6 s" in never.complaint(8.0, 1, 2.0)


def test_advice_does_not_need_the_file_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "share_folders", list)
    assert "=config/fastdds.xml of this package's source for every process" in transport.remedy()
