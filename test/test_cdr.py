"""Serialized images read in place equal deserialized ones; whatever is odd is left to rclpy."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("rclpy")

from rclpy.serialization import deserialize_message, serialize_message  # noqa: E402
from sensor_msgs.msg import CompressedImage, Image  # noqa: E402

from sparserefine_ros.node import cdr  # noqa: E402
from sparserefine_ros.node.cdr import ImageView, read_message  # noqa: E402
from sparserefine_ros.node.conversion import to_rgb  # noqa: E402

FIELDS = ("header", "height", "width", "encoding", "is_bigendian", "step")
names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=9)


def image(**fields: object) -> Image:
    message = Image(**fields)
    message.header.stamp.sec, message.header.stamp.nanosec = -5, 999_999_999
    return message


@settings(max_examples=150, deadline=None)
@given(names, names, st.integers(0, 2**32 - 1), st.integers(0, 255), st.binary(max_size=40))
def test_fields_are_those_that_rclpy_reads(frame_id, encoding, number, flag, data):
    message = image(height=number, width=7, encoding=encoding, is_bigendian=flag, step=number // 2, data=data)
    message.header.frame_id = frame_id
    frame = serialize_message(message)
    view, expected = read_message(frame, Image), deserialize_message(frame, Image)
    assert isinstance(view, ImageView)
    assert [getattr(view, name) for name in FIELDS] == [getattr(expected, name) for name in FIELDS]
    assert bytes(view.data) == bytes(expected.data) == data


def test_pixels_are_not_copied() -> None:
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    frame = serialize_message(image(height=4, width=6, encoding="rgb8", step=18, data=pixels.tobytes()))
    rgb = to_rgb(read_message(frame, Image))
    np.testing.assert_array_equal(rgb, pixels)
    assert np.shares_memory(rgb, np.frombuffer(frame, np.uint8))


def test_big_endian() -> None:
    body = struct.pack(">iI", 3, 4) + struct.pack(">I4s", 4, b"cam\0") + struct.pack(">II", 1, 2)
    body += struct.pack(">I6s", 6, b"mono8\0") + b"\1" + b"\0" + struct.pack(">II", 2, 2) + b"ab"
    view = read_message(b"\0\0\0\0" + body, Image)
    assert isinstance(view, ImageView)
    assert (view.header.stamp.sec, view.header.stamp.nanosec, view.header.frame_id) == (3, 4, "cam")
    assert (view.height, view.width, view.encoding, view.is_bigendian, view.step) == (1, 2, "mono8", 1, 2)
    assert bytes(view.data) == b"ab"


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_broken_messages_are_left_to_rclpy(data):
    frame = bytearray(serialize_message(image(height=2, width=3, encoding="mono8", step=3, data=b"abcdef")))
    if data.draw(st.booleans()):
        frame = frame[: data.draw(st.integers(0, len(frame) - 5))]  # four bytes of padding may be missing
    else:
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    view = cdr._read_image(bytes(frame))  # whatever comes, no other error than rclpy's
    if view is not None:
        assert len(view.data) <= len(frame)


def test_other_types_are_rclpys() -> None:
    frame = serialize_message(CompressedImage(format="png", data=b"1234"))
    assert isinstance(read_message(frame, CompressedImage), CompressedImage)
