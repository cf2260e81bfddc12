"""What every source of frames gives: images and labels by index.

Shape shorthand: H, W image height and width in pixels.
"""

from __future__ import annotations

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


class FrameSource(Protocol):
    """A random-access sequence of samples that share one class list."""

    classes: ClassList

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...
