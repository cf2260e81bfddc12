"""Raw image encodings (sensor_msgs/image_encodings.hpp) and how each becomes RGB.

Shape shorthand: H, W image size; C stored channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

Converter = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Encoding:
    """How one encoding lies in memory, and the way to RGB.

    channels, bits: stored per pixel; 16-bit values are first scaled to 8 bits.
    convert: uint8 [H, W] or [H, W, C] -> uint8 [H, W, 3] RGB.
    even_width: packed 4:2:2 stores pairs of columns.
    """

    channels: int
    convert: Converter
    bits: int = 8
    even_width: bool = False

    @property
    def bytes_per_pixel(self) -> int:
        return self.channels * self.bits // 8


def _colour(code: int) -> Converter:
    return lambda image: cv2.cvtColor(image, code)


def _unchanged(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image)


def _table() -> dict[str, Encoding]:
    table = {
        "rgb8": Encoding(3, _unchanged),
        "bgr8": Encoding(3, _colour(cv2.COLOR_BGR2RGB)),
        "rgba8": Encoding(4, _colour(cv2.COLOR_RGBA2RGB)),
        "bgra8": Encoding(4, _colour(cv2.COLOR_BGRA2RGB)),
        "mono8": Encoding(1, _colour(cv2.COLOR_GRAY2RGB)),
        # The abstract types say nothing of colour; as in OpenCV and rviz, three and four channels are BGR(A).
        "8UC1": Encoding(1, _colour(cv2.COLOR_GRAY2RGB)),
        "8UC3": Encoding(3, _colour(cv2.COLOR_BGR2RGB)),
        "8UC4": Encoding(4, _colour(cv2.COLOR_BGRA2RGB)),
    }
    for name in ("yuv422", "uyvy"):
        table[name] = Encoding(2, _colour(cv2.COLOR_YUV2RGB_UYVY), even_width=True)
    for name in ("yuv422_yuy2", "yuyv"):
        table[name] = Encoding(2, _colour(cv2.COLOR_YUV2RGB_YUY2), even_width=True)
    # OpenCV names a Bayer pattern by the second row's second and third pixel, ROS by the first two rows.
    bayer = {"rggb": "BG", "bggr": "RG", "gbrg": "GR", "grbg": "GB"}
    for pattern, opencv in bayer.items():
        convert = _colour(getattr(cv2, f"COLOR_Bayer{opencv}2RGB"))
        table[f"bayer_{pattern}8"] = Encoding(1, convert)
        table[f"bayer_{pattern}16"] = Encoding(1, convert, bits=16)
    for name in ("rgb", "bgr", "rgba", "bgra", "mono"):
        eight = table[f"{name}8"]
        table[f"{name}16"] = Encoding(eight.channels, eight.convert, bits=16)
    return table


ENCODINGS: dict[str, Encoding] = _table()


@lru_cache(maxsize=1)
def _sixteen_to_eight() -> np.ndarray:
    """[65536] uint8: round(value * 255 / 65535), which is round(value / 257)."""
    return ((np.arange(65536, dtype=np.uint32) + 128) // 257).astype(np.uint8)


def to_eight_bits(image: np.ndarray) -> np.ndarray:
    """uint16 of any shape and byte order -> uint8, rounded to nearest."""
    return _sixteen_to_eight()[image]
