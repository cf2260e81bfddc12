"""The procedural street: a drive through a 3-D scene with exact labels, 19 Cityscapes classes, any size."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from sparserefine_ros.datasets.base import Sample
from sparserefine_ros.datasets.classes import CITYSCAPES, ClassList
from sparserefine_ros.datasets.street_blocks import Block, make_block
from sparserefine_ros.datasets.street_render import Renderer
from sparserefine_ros.datasets.street_sensor import expose
from sparserefine_ros.datasets.street_style import make_style
from sparserefine_ros.datasets.street_traffic import make_traffic
from sparserefine_ros.datasets.street_view import FAR, make_view
from sparserefine_ros.errors import DatasetError

SMALLEST = 16
LONGEST_S = 1e7  # of a drive, 116 days: some 1e8 m, where places are still exact and below the 1e9 m that mean never


class Street:
    """A drive of ``frames`` images of (height, width) ``size`` at ``fps`` Hz.

    Frame i is a pure function of (seed, i, fps, size): random access, any order, any number of threads. The same scene
    at another size has the same labels, sampled at that size's pixel centres. Seeds differ in street, weather, season,
    traffic and camera. Other versions of OpenCV round a texture otherwise, and up to one label in a thousand with it.

    Raises DatasetError for arguments out of range, IndexError for a frame that the drive does not have.
    """

    classes: ClassList = CITYSCAPES

    def __init__(
        self, frames: int = 100, seed: int = 0, size: tuple[int, int] = (1024, 2048), fps: float = 10.0
    ) -> None:
        if frames < 1:
            raise DatasetError(f"a street of {frames} frames; give at least 1")
        if not 0 <= seed < 1 << 31:
            raise DatasetError(f"street seed {seed}; give a number from 0 to 2147483647")
        if len(size) != 2 or min(size) < SMALLEST or max(size) > 8192:
            raise DatasetError(f"street size {tuple(size)}; give (height, width), each from {SMALLEST} to 8192 pixels")
        if not (math.isfinite(fps) and fps > 0):
            raise DatasetError(f"street at {fps} frames a second; give a finite rate above 0")
        if frames / fps > LONGEST_S:
            raise DatasetError(
                f"a street of {frames} frames at {fps:g} a second takes {frames / fps:g} s; give at most {LONGEST_S:g}"
            )
        self.frames, self.seed, self.size, self.fps = int(frames), int(seed), (int(size[0]), int(size[1])), float(fps)
        self.style = make_style(self.seed)
        self._renderer = Renderer(self.style)
        self._block = lru_cache(maxsize=8)(self._make_block)

    def __len__(self) -> int:
        return self.frames

    def _make_block(self, k: int) -> Block:
        return make_block(self.style, k)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.frames:
            raise IndexError(f"frame {index} of a street of {self.frames} frames; give 0 to {self.frames - 1}")
        time = index / self.fps
        view = make_view(self.style, time, self.size)
        first = math.floor((view.camera.s - 5.0) / self.style.block)
        last = math.floor((view.camera.s + FAR) / self.style.block)
        blocks = [self._block(k) for k in range(first, last + 1)]
        image, label = self._renderer.render(view, blocks, make_traffic(self.style, time))
        image = expose(image, self.style, index)
        name = f"street_{self.seed:04d}_{index:06d}"
        return Sample(np.ascontiguousarray(image), label, name, round(index * 1e9 / self.fps))
