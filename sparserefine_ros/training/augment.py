"""Random views of a frame: scale, crop, mirror, light.

Shape shorthand: H, W frame size; h, w crop size.
"""

from __future__ import annotations

import cv2
import numpy as np

from sparserefine_ros.datasets.base import UNLABELLED


def random_view(
    image: np.ndarray,
    label: np.ndarray,
    crop: tuple[int, int],
    scale: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """One training view of ``image`` [H, W, 3] uint8 and ``label`` [H, W] uint8: ([h, w, 3], [h, w]).

    Cuts the window first and resizes it after, so that the cost follows the crop and not the frame. Where the window
    is larger than the frame it is padded with grey that carries no label.
    """
    factor = float(np.exp(rng.uniform(np.log(scale[0]), np.log(scale[1]))))
    stretch = float(np.exp(rng.uniform(-0.1, 0.1)))  # aspect ratio
    frame_h, frame_w = label.shape
    win_h, win_w = round(crop[0] / factor), round(crop[1] / (factor * stretch))
    top = _offset(frame_h, win_h, rng)
    left = _offset(frame_w, win_w, rng)
    image = _window(image, top, left, win_h, win_w, 127)
    label = _window(label, top, left, win_h, win_w, UNLABELLED)
    size = (crop[1], crop[0])
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR)
    label = cv2.resize(label, size, interpolation=cv2.INTER_NEAREST_EXACT)
    if rng.random() < 0.5:
        image, label = image[:, ::-1], label[:, ::-1]
    return np.ascontiguousarray(jitter(image, rng)), np.ascontiguousarray(label)


def jitter(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast, colour cast and gamma by one look-up table a channel; uint8 in and out."""
    levels = np.linspace(0.0, 1.0, 256)[:, None]  # [256, 1]
    gain = rng.uniform(0.7, 1.3) * rng.uniform(0.9, 1.1, size=3)
    curve = (levels ** rng.uniform(0.8, 1.25) - 0.5) * gain + 0.5 + rng.uniform(-0.1, 0.1)
    table = (curve.clip(0, 1) * 255).astype(np.uint8)  # [256, 3]
    return cv2.LUT(image, table[None])


def _offset(frame: int, window: int, rng: np.random.Generator) -> int:
    low, high = sorted((0, frame - window))
    return int(rng.integers(low, high + 1))


def _window(array: np.ndarray, top: int, left: int, height: int, width: int, fill: int) -> np.ndarray:
    """Rows top..top+height and columns left..left+width; outside the array is ``fill``."""
    frame_h, frame_w = array.shape[:2]
    y0, y1 = max(top, 0), min(top + height, frame_h)
    x0, x1 = max(left, 0), min(left + width, frame_w)
    inner = array[y0:y1, x0:x1]
    if inner.shape[:2] == (height, width):
        return inner
    out = np.full((height, width, *array.shape[2:]), fill, array.dtype)
    out[y0 - top : y1 - top, x0 - left : x1 - left] = inner
    return out
