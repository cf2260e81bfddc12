"""Image messages to RGB arrays, and results to pictures.

Shape shorthand: H, W image size; C channels.

Needs no ROS: it works on any object with the fields of sensor_msgs/Image or sensor_msgs/CompressedImage.
cv_bridge is not used: its Python side ignores a padded `step` and does not load beside NumPy 2.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from sparserefine_ros.errors import FrameError
from sparserefine_ros.node.compressed import bayer_of, compressed_size
from sparserefine_ros.node.encodings import ENCODINGS, Encoding, to_eight_bits

MAX_PIXELS = 2**26
"""Largest frame accepted, checked before anything is allocated: 67 megapixels (8192 x 8192)."""


def to_rgb(message: Any) -> np.ndarray:
    """The RGB image [H, W, 3] uint8 of a sensor_msgs Image or CompressedImage.

    rgb8 without padding shares the message's memory; every other encoding is converted once.
    Raises FrameError when the message contradicts itself or cannot be decoded.
    """
    return image_to_rgb(message) if hasattr(message, "encoding") else compressed_to_rgb(message)


def image_to_rgb(message: Any) -> np.ndarray:
    """RGB [H, W, 3] uint8 of a raw sensor_msgs/Image (encodings: see ENCODINGS)."""
    encoding = ENCODINGS.get(message.encoding)
    if encoding is None:
        raise FrameError(
            f"encoding {message.encoding!r:.80} is not supported; publish one of {', '.join(ENCODINGS)} "
            "(image_proc or image_transport can convert)"
        )
    height, width, step = message.height, message.width, message.step
    _check_size(height, width)
    if encoding.even_width and width % 2:
        raise FrameError(
            f"{message.encoding} stores pairs of columns, but the width is {width}; crop the image to an even width"
        )
    row = width * encoding.bytes_per_pixel
    if step < row:
        raise FrameError(
            f"step {step} is too small for {width} pixels of {message.encoding}: a row has {row} bytes; "
            "the driver must set step = row length in bytes, padding included"
        )
    data = _bytes(message)
    # The padding of the last row may be left out; anything else means that size and data disagree.
    if data.size not in (step * height, step * (height - 1) + row):
        raise FrameError(
            f"data has {data.size} bytes where step {step} x height {height} = {step * height} are needed; "
            "the image is truncated or its size fields are wrong"
        )
    pixels = _pixels(data, height, width, step, encoding, bool(message.is_bigendian))
    if encoding.bits == 16:
        pixels = to_eight_bits(pixels)
    return encoding.convert(pixels)


def _pixels(data: np.ndarray, height: int, width: int, step: int, encoding: Encoding, big: bool) -> np.ndarray:
    """View of the message's bytes as [H, W] or [H, W, C], whatever the padding; nothing is copied."""
    dtype = np.dtype("u1") if encoding.bits == 8 else np.dtype(">u2" if big else "<u2")
    shape: tuple[int, ...] = (height, width)
    strides: tuple[int, ...] = (step, encoding.bytes_per_pixel)
    if encoding.channels > 1:
        shape, strides = (*shape, encoding.channels), (*strides, dtype.itemsize)
    return np.ndarray(shape, dtype, buffer=data.data, strides=strides)


def compressed_to_rgb(message: Any) -> np.ndarray:
    """RGB [H, W, 3] uint8 of a sensor_msgs/CompressedImage holding a JPEG or a PNG.

    The content decides, not `format`, which every publisher spells in its own way. `format` only tells whether
    a single channel is a Bayer mosaic ("bayer_rggb8; jpeg compressed"). EXIF orientation is ignored: the mask
    must fit the pixels as the camera sent them.
    """
    data = _bytes(message)
    height, width = compressed_size(data, message.format)
    _check_size(height, width)
    bayer = bayer_of(message.format)
    flags = cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(data, flags | (cv2.IMREAD_ANYCOLOR if bayer else cv2.IMREAD_COLOR))
    except cv2.error:
        image = None
    if image is None or image.dtype not in (np.uint8, np.uint16):
        raise FrameError(
            f"compressed image of {data.size} bytes, format {message.format!r:.80}, cannot be decoded; "
            "it is corrupt: check the camera driver or the transport"
        )
    if image.dtype == np.uint16:
        image = to_eight_bits(image)
    if image.ndim == 2:
        return ENCODINGS[f"bayer_{bayer}8" if bayer else "mono8"].convert(image)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _bytes(message: Any) -> np.ndarray:
    """The message's data as uint8 [N], without a copy."""
    return np.frombuffer(message.data, np.uint8) if len(message.data) else np.empty(0, np.uint8)


def _check_size(height: int, width: int) -> None:
    if height <= 0 or width <= 0:
        raise FrameError(f"image size {width} x {height} is empty; height and width must be at least 1")
    if height * width > MAX_PIXELS:
        raise FrameError(
            f"image size {width} x {height} exceeds {MAX_PIXELS} pixels; crop or downsample the image, "
            "or check that the message is not corrupt"
        )


def colourise(mask: np.ndarray, lut: np.ndarray) -> np.ndarray:
    """Class ids [H, W] uint8 to RGB [H, W, 3] through `lut` [256, 3] uint8."""
    return cv2.LUT(cv2.cvtColor(mask, cv2.COLOR_GRAY2RGB), np.ascontiguousarray(lut)[None])


def overlay(image: np.ndarray, colour: np.ndarray, opacity: float) -> np.ndarray:
    """image * (1 - opacity) + colour * opacity, rounded; all [H, W, 3] uint8 RGB, opacity in [0, 1]."""
    return cv2.addWeighted(colour, opacity, image, 1.0 - opacity, 0.0)
