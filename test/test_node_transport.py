"""The frame queue, the transport profile, and the signs of lost images."""

from __future__ import annotations

import struct
import xml.etree.ElementTree as ElementTree
from pathlib import Path

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


@pytest.mark.parametrize(
    "environment",
    [
        {"FASTDDS_DEFAULT_PROFILES_FILE": "mine.xml"},
        {"FASTRTPS_DEFAULT_PROFILES_FILE": "mine.xml"},
        {"FASTDDS_BUILTIN_TRANSPORTS": "LARGE_DATA"},
        {"FASTDDS_BUILTIN_TRANSPORTS": "LARGE_DATA?max_msg_size=1MB"},
    ],
)
def test_the_users_choice_stands(environment):
    assert has_profile(environment)
    assert profile_env(environment) == {}
    assert not loses_images("rmw_fastrtps_cpp", environment)


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
    assert "fastdds.xml" in transport.remedy()


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
    assert "% of the images are lost" in watch.complaint(2.0, 1, 0.0)


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
