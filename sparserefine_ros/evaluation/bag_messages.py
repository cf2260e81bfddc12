"""ROS 2 messages as bags hold them, read and written without ROS: rosbags' type store plus the label messages it lacks.

Shape shorthand: H, W image height and width in pixels.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from sparserefine_ros.errors import BagError

IMAGE = "sensor_msgs/msg/Image"
COMPRESSED = "sensor_msgs/msg/CompressedImage"
LABEL_INFO = "vision_msgs/msg/LabelInfo"

RAW_ENCODINGS = ("rgb8", "bgr8")
COMPRESSED_ENCODINGS = ("jpeg", "png")
JPEG_QUALITY = 95

# vision_msgs is not among the types that rosbags brings (vision_msgs 4: LabelInfo.msg, VisionClass.msg).
_VISION_CLASS = "uint16 class_id\nstring class_name\n"
_LABEL_INFO = "std_msgs/Header header\nvision_msgs/VisionClass[] class_map\nfloat32 threshold\n"


@lru_cache(maxsize=1)
def typestore() -> Typestore:
    """The message types of ROS 2 kilted and vision_msgs; images are the same in every distribution since foxy."""
    store = get_typestore(Stores.ROS2_KILTED)
    store.register(get_types_from_msg(_VISION_CLASS, "vision_msgs/msg/VisionClass"))
    store.register(get_types_from_msg(_LABEL_INFO, LABEL_INFO))
    return store


def serialize(message: Any, msgtype: str) -> bytes:
    """CDR bytes, little-endian, as they go over the wire."""
    return bytes(typestore().serialize_cdr(message, msgtype))


def deserialize(data: bytes, msgtype: str) -> Any:
    """The message in CDR bytes; raises BagError where the bytes are not one."""
    try:
        return typestore().deserialize_cdr(data, msgtype)
    except Exception as error:  # truncated bytes surface as anything from struct.error to MemoryError
        raise BagError(f"{len(data)} bytes do not hold a {msgtype} ({error}); record the bag again") from error


def stamp_ns(data: bytes | bytearray | memoryview) -> int:
    """Header stamp, in nanoseconds, of any serialised message that begins with a std_msgs/Header.

    CDR: 4 bytes of encapsulation (the second names the byte order), then int32 sec and uint32 nanosec.
    """
    if len(data) < 12:
        raise BagError(f"a message of {len(data)} bytes is too short for a header; record the bag again")
    seconds, nanoseconds = struct.unpack_from("<iI" if data[1] & 1 else ">iI", data, 4)
    return int(seconds) * 1_000_000_000 + int(nanoseconds)


def header(stamp: int, frame_id: str) -> Any:
    """std_msgs/Header with a stamp in nanoseconds."""
    types = typestore().types
    time = types["builtin_interfaces/msg/Time"](sec=stamp // 1_000_000_000, nanosec=stamp % 1_000_000_000)
    return types["std_msgs/msg/Header"](stamp=time, frame_id=frame_id)


def image_message(pixels: np.ndarray, encoding: str, stamp: int, frame_id: str) -> bytes:
    """Serialised sensor_msgs/Image of ``pixels`` ([H, W] or [H, W, 3] uint8, already in ``encoding``'s order)."""
    pixels = np.ascontiguousarray(pixels)
    height, width = pixels.shape[:2]
    message = typestore().types[IMAGE](
        header=header(stamp, frame_id),
        height=height,
        width=width,
        encoding=encoding,
        is_bigendian=0,
        step=pixels.strides[0],
        data=pixels.reshape(-1),
    )
    return serialize(message, IMAGE)


def compressed_message(image: np.ndarray, encoding: str, stamp: int, frame_id: str) -> bytes:
    """Serialised sensor_msgs/CompressedImage of an RGB image [H, W, 3], ``encoding`` jpeg or png."""
    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY] if encoding == "jpeg" else [cv2.IMWRITE_PNG_COMPRESSION, 1]
    done, data = cv2.imencode(".jpg" if encoding == "jpeg" else ".png", image[..., ::-1], options)
    if not done:
        raise BagError(f"cannot encode an image of shape {image.shape} as {encoding}; give [H, W, 3] uint8")
    message = typestore().types[COMPRESSED](
        header=header(stamp, frame_id),
        # image_transport's way to say: an rgb8 camera, compressed with the channels in OpenCV's order
        format=f"rgb8; {encoding} compressed bgr8",
        data=data.reshape(-1),
    )
    return serialize(message, COMPRESSED)


def label_array(message: Any, topic: str) -> np.ndarray:
    """[H, W] uint8 class ids of a sensor_msgs/Image (mono8 or 8UC1), its row padding removed."""
    if message.encoding not in ("mono8", "8UC1"):
        raise BagError(
            f"{topic} has encoding {message.encoding!r}; ground truth is mono8: one class id a pixel, 255 ignored"
        )
    height, width, step = int(message.height), int(message.width), int(message.step)
    if height * width == 0 or step < width or message.data.size < height * step:
        raise BagError(
            f"{topic} has a {width}x{height} image with step {step} and {message.data.size} bytes; "
            f"step must be at least the width and the data height * step bytes"
        )
    return np.ascontiguousarray(message.data[: height * step].reshape(height, step)[:, :width])
