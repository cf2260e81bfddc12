"""Serialized images read in place equal what rclpy reads, those written what it writes; whatever is odd is refused."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("rclpy")

from rclpy.serialization import deserialize_message, serialize_message  # noqa: E402
from sensor_msgs.msg import CompressedImage, Image  # noqa: E402
from std_msgs.msg import Header  # noqa: E402

from sparserefine_ros.errors import FrameError  # noqa: E402
from sparserefine_ros.node.cdr import CompressedView, ImageView, image_parts, read_message  # noqa: E402
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


@settings(max_examples=100, deadline=None)
@given(
    names,
    names,
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from([(np.uint8, ()), (np.uint8, (3,)), (np.float32, ())]),
)
def test_what_is_written_is_what_rclpy_reads(frame_id, encoding, height, width, kind):
    dtype, channels = kind
    pixels = np.arange(height * 2 * width * int(np.prod(channels))).reshape(height, 2 * width, *channels).astype(dtype)
    pixels = pixels[:, ::2]  # not contiguous
    header = Header(frame_id=frame_id)
    header.stamp.sec, header.stamp.nanosec = -5, 999_999_999
    message = deserialize_message(b"".join(image_parts(header, pixels, encoding)), Image)
    step = pixels.dtype.itemsize * width * int(np.prod(channels))
    assert (message.header, message.encoding) == (header, encoding)
    assert [getattr(message, name) for name in FIELDS[1:3] + FIELDS[4:]] == [height, width, 0, step]
    assert bytes(message.data) == pixels.tobytes()


@settings(max_examples=100, deadline=None)
@given(names, names, st.binary(max_size=40))
def test_compressed_images_are_those_that_rclpy_reads(frame_id, text, data):
    message = CompressedImage(format=text, data=data)
    message.header.frame_id = frame_id
    frame = serialize_message(message)
    view, expected = read_message(frame, CompressedImage), deserialize_message(frame, CompressedImage)
    assert isinstance(view, CompressedView)
    assert (view.header, view.format, bytes(view.data)) == (expected.header, expected.format, bytes(expected.data))


@pytest.mark.parametrize("kind", [Image, CompressedImage])
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_broken_messages_are_refused(kind, data):
    """Cut anywhere, or with any byte changed: refused, or every part of it lies in the message."""
    fields = {"height": 2, "width": 3, "encoding": "mono8", "step": 3} if kind is Image else {"format": "png"}
    frame = bytearray(serialize_message(kind(data=b"abcdef", **fields)))
    cut = data.draw(st.booleans())
    if cut:
        frame = frame[: data.draw(st.integers(0, len(frame) - 5))]  # four bytes of padding may be missing
    else:
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        view = read_message(bytes(frame), kind)
    except FrameError:
        return
    assert not cut and len(view.data) <= len(frame)


@pytest.mark.parametrize("begin", [b"", b"\0\1", b"\0\7\0\0", b"\1\0\0\0"])
def test_other_encodings_are_named(begin: bytes) -> None:
    with pytest.raises(FrameError, match="is not plain CDR"):
        read_message(begin + bytes(60) * (len(begin) == 4), Image)


def test_an_empty_string_may_have_no_zero() -> None:
    body = struct.pack("<iI", 3, 4) + struct.pack("<I", 0) + struct.pack("<I4s", 4, b"png\0") + struct.pack("<I", 2)
    view = read_message(b"\0\1\0\0" + body + b"ab", CompressedImage)
    assert (view.header.frame_id, view.format, bytes(view.data)) == ("", "png", b"ab")
