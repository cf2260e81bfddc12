"""The camera behind the lens: blur, exposure, white balance, vignetting, noise. Touches the image, never the labels."""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np

from sparserefine_ros.datasets.street_style import FRAME, Style, generator

REFERENCE_WIDTH = 2048
_BANK = 1 << 23


@lru_cache(maxsize=1)
def _noise_bank() -> np.ndarray:
    """Standard normal numbers times 64, int16: frames read it from different places."""
    return np.round(np.random.default_rng(4242).standard_normal(_BANK, np.float32) * 64).astype(np.int16)


@lru_cache(maxsize=8)
def _vignette(height: int, width: int, strength: float) -> np.ndarray:
    """Fall-off (cos^4-like), by ``strength`` in the corners whatever the shape, [H, W, 3] uint8 with 255 = none."""
    y = (np.arange(height, dtype=np.float32) + 0.5) / width - height / width / 2
    x = (np.arange(width, dtype=np.float32) + 0.5) / width - 0.5
    fall = 255 * (1 - strength * 4 * (x[None] ** 2 + y[:, None] ** 2) / (1 + (height / width) ** 2))
    return np.repeat(fall.astype(np.uint8)[..., None], 3, 2)


def expose(image: np.ndarray, style: Style, frame: int) -> np.ndarray:
    """The rendered scene [H, W, 3] uint8 as the sensor delivers it, same shape."""
    height, width = image.shape[:2]
    sigma = style.blur * max(width / REFERENCE_WIDTH, 0.45)
    image = cv2.GaussianBlur(image, (3, 3), sigma)
    exposure, red, blue, contrast = style.detail
    x = np.arange(256) / 255.0
    curve = []
    for gain in (exposure * red, exposure, exposure * blue):
        y = np.clip(x * gain, 0, None)
        y = y / (1 + np.maximum(y - 0.8, 0) * 0.9)  # shoulder of the tone curve
        curve.append(np.clip(0.5 + (y - 0.5) * contrast, 0.01, 1.0) * 255)
    image = cv2.LUT(image, np.stack(curve, 1).astype(np.uint8)[None])
    image = cv2.multiply(image, _vignette(height, width, style.vignette), scale=1 / 255.0)
    deviation = style.noise * np.sqrt(1.4 + 0.045 * np.arange(256))  # read and shot noise, grey levels
    amount = cv2.LUT(image, np.round(deviation * 16).astype(np.int16)[None])
    bank, need = _noise_bank(), height * width * 3
    offset = int(generator(style.seed, FRAME, frame).integers(_BANK))
    pieces = [bank[offset : offset + need]]
    while sum(map(len, pieces)) < need:
        pieces.append(bank[: need - sum(map(len, pieces))])
    noise = np.concatenate(pieces)
    noise = cv2.multiply(noise.reshape(height, width, 3), amount, scale=1 / 1024.0)
    return cv2.add(image, noise, dtype=cv2.CV_8U)
