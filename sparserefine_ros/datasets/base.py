"""What every source of frames gives: images and labels by index.

Shape shorthand: H, W image height and width in pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple, Protocol

import numpy as np

from sparserefine_ros.datasets.classes import ClassList

UNLABELLED = 255
"""The class id of pixels that nobody labelled: ignored by losses and metrics (vision_msgs uses the same value)."""


class Sample(NamedTuple):
    """One camera frame and, where known, its ground truth."""

    image: np.ndarray  # [H, W, 3] uint8, RGB
    label: np.ndarray | None  # [H, W] uint8, class ids, UNLABELLED where ignored
    name: str
    stamp_ns: int  # nanoseconds since the start of the drive


def digest(arrays: Iterable[np.ndarray | None]) -> str:
    """SHA-256 of images or labels, in their order: names of frames may be the same in two recordings."""
    result = hashlib.sha256()
    for array in arrays:
        if array is not None:
            result.update(repr(array.shape).encode())
            result.update(np.ascontiguousarray(array).data)
    return result.hexdigest()


class FrameSource(Protocol):
    """A random-access sequence of samples that share one class list."""

    classes: ClassList

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...
