"""Serialized images read in place, and written at once.

rclpy's `deserialize_message` copies a frame twice, 1 to 2 ms for 2 megapixels, and ends the process with a segmentation
fault on some broken ones: whoever may publish could stop the node. The pixels of a serialized image can be used where
they are, once every length is found to lie inside the message. Results are written as they go over the wire: rclpy,
given an Image, fills a second one in C first.

CDR: 4 bytes of encapsulation (00 01 little-endian, 00 00 big-endian), then the fields, each aligned to its size
counted from there; strings and sequences begin with their length.
"""

from __future__ import annotations

import struct
import sys
import warnings
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header

from sparserefine_ros.errors import FrameError

# Nobody writes into a frame; torch cannot know.
warnings.filterwarnings("ignore", "The given NumPy array is not writable")


Frame: TypeAlias = bytes | memoryview
"""A serialized message."""


@dataclass(frozen=True)
class ImageView:
    """The fields of a sensor_msgs/Image; `data` lies in the serialized message."""

    header: Header
    height: int
    width: int
    encoding: str
    is_bigendian: int
    step: int
    data: memoryview


@dataclass(frozen=True)
class CompressedView:
    """The fields of a sensor_msgs/CompressedImage; `data` lies in the serialized message."""

    header: Header
    format: str
    data: memoryview


def read_message(frame: Frame, kind: type[Image | CompressedImage]) -> ImageView | CompressedView:
    """The fields of a message of type `kind`; FrameError for what is no complete one in plain CDR."""
    if len(frame) < 4 or frame[0] != 0 or frame[1] > 1:
        raise FrameError(
            f"serialized {kind.__name__} begins with bytes {frame[:4].hex(' ') or '(none)'}, which is not plain CDR "
            "(00 00 or 00 01); check the sender's middleware"
        )
    order = "<" if frame[1] else ">"
    try:
        header, at = _header(frame, order)
        return _image(frame, header, at, order) if kind is Image else _compressed(frame, header, at, order)
    except (struct.error, IndexError, ValueError, AssertionError) as error:
        raise FrameError(
            f"serialized {kind.__name__} of {len(frame)} bytes is truncated or corrupt ({error}); check the transport"
        ) from error


def image_parts(header: Header, image: np.ndarray, encoding: str) -> tuple[bytes, np.ndarray]:
    """The serialized sensor_msgs/Image of ``image`` ([H, W] or [H, W, C]), with that header: what stands before its
    pixels, and the pixels, contiguous; where they were already, without a copy."""
    image = np.ascontiguousarray(image)
    big = sys.byteorder == "big"
    order, begin = (">", b"\0\0\0\0") if big else ("<", b"\0\1\0\0")
    fields = struct.pack(f"{order}iI", header.stamp.sec, header.stamp.nanosec) + _text(header.frame_id, order)
    fields = _padded(fields) + struct.pack(f"{order}II", *image.shape[:2]) + _text(encoding, order)
    fields = _padded(fields + bytes([big])) + struct.pack(f"{order}II", image.nbytes // len(image), image.nbytes)
    return begin + fields, image


def _text(text: str, order: str) -> bytes:
    data = text.encode() + b"\0"
    return struct.pack(f"{order}I", len(data)) + data


def _padded(fields: bytes) -> bytes:
    return fields + bytes(-len(fields) % 4)


def _header(frame: Frame, order: str) -> tuple[Header, int]:
    header = Header()
    header.stamp.sec, header.stamp.nanosec = struct.unpack_from(f"{order}iI", frame, 4)
    header.frame_id, at = _string(frame, 12, order)
    return header, at


def _image(frame: Frame, header: Header, at: int, order: str) -> ImageView:
    at = _aligned(at)
    height, width = struct.unpack_from(f"{order}II", frame, at)
    encoding, at = _string(frame, at + 8, order)
    is_bigendian, at = frame[at], _aligned(at + 1)
    (step,) = struct.unpack_from(f"{order}I", frame, at)
    return ImageView(header, height, width, encoding, is_bigendian, step, _bytes(frame, at + 4, order))


def _compressed(frame: Frame, header: Header, at: int, order: str) -> CompressedView:
    text, at = _string(frame, _aligned(at), order)
    return CompressedView(header, text, _bytes(frame, _aligned(at), order))


def _string(frame: Frame, at: int, order: str) -> tuple[str, int]:
    """The string at `at`, and where it ends; ValueError where it is none. Its length counts the closing zero."""
    (length,) = struct.unpack_from(f"{order}I", frame, at)
    end = at + 4 + length
    if length == 0:  # not by the book, but some middleware writes empty strings so
        return "", end
    if end > len(frame) or frame[end - 1]:
        raise ValueError(f"{length} bytes at {at} are no string")
    return str(frame[at + 4 : end - 1], "utf-8"), end


def _bytes(frame: Frame, at: int, order: str) -> memoryview:
    """The sequence of bytes at `at`; ValueError where it does not lie in the frame."""
    (size,) = struct.unpack_from(f"{order}I", frame, at)
    if at + 4 + size > len(frame):
        raise ValueError(f"{size} bytes of data, {len(frame) - at - 4} there")
    return memoryview(frame)[at + 4 : at + 4 + size]


def _aligned(at: int) -> int:
    return (at + 3) // 4 * 4  # the 4 bytes of encapsulation do not shift it
