"""Serialized images read in place.

`deserialize_message` copies a frame twice, 1 to 2 ms for 2 megapixels; the pixels of a serialized sensor_msgs/Image can
be used where they are. Only what is plain and complete is read here, everything else is left to rclpy and its errors.

CDR: 4 bytes of encapsulation (00 01 little-endian, 00 00 big-endian), then the fields, each aligned to its size
counted from there; strings and sequences begin with their length.
"""

from __future__ import annotations

import struct
import warnings
from dataclasses import dataclass
from typing import Any

from rclpy.serialization import deserialize_message
from sensor_msgs.msg import Image
from std_msgs.msg import Header

# Nobody writes into a frame; torch cannot know.
warnings.filterwarnings("ignore", "The given NumPy array is not writable")


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


def read_message(frame: bytes, kind: type) -> Any:
    """An object with the fields of `kind`, a message type; raises what `deserialize_message` raises."""
    view = _read_image(frame) if kind is Image else None
    return deserialize_message(frame, kind) if view is None else view


def _read_image(frame: bytes) -> ImageView | None:
    """None for anything but a complete sensor_msgs/Image in plain CDR."""
    if len(frame) < 4 or frame[0] != 0 or frame[1] > 1:
        return None
    order = "<" if frame[1] else ">"
    try:
        header = Header()
        header.stamp.sec, header.stamp.nanosec = struct.unpack_from(f"{order}iI", frame, 4)
        header.frame_id, at = _string(frame, 12, order)
        at = _aligned(at)
        height, width = struct.unpack_from(f"{order}II", frame, at)
        encoding, at = _string(frame, at + 8, order)
        is_bigendian, at = frame[at], _aligned(at + 1)
        step, size = struct.unpack_from(f"{order}II", frame, at)
    except (struct.error, IndexError, ValueError, AssertionError):
        return None
    data = memoryview(frame)[at + 8 : at + 8 + size]
    if len(data) != size:
        return None
    return ImageView(header, height, width, encoding, is_bigendian, step, data)


def _string(frame: bytes, at: int, order: str) -> tuple[str, int]:
    """The string at `at`, and where it ends; ValueError where it is none. Its length counts the closing zero."""
    (length,) = struct.unpack_from(f"{order}I", frame, at)
    end = at + 4 + length
    if not length or end > len(frame) or frame[end - 1]:
        raise ValueError("not a string")
    return frame[at + 4 : end - 1].decode(), end


def _aligned(at: int) -> int:
    return (at + 3) // 4 * 4  # the 4 bytes of encapsulation do not shift it
