"""Percentiles of stage times over the last frames."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping

import numpy as np

PERCENTILES = (50, 95, 99)


class StageWindow:
    """The stage times of the last `frames` frames, in milliseconds. Thread-safe."""

    def __init__(self, frames: int = 300) -> None:
        self._rows: deque[dict[str, float]] = deque(maxlen=frames)
        self._lock = threading.Lock()

    def add(self, stage_ms: Mapping[str, float]) -> None:
        """One frame's times."""
        with self._lock:
            self._rows.append(dict(stage_ms))

    def values(self) -> dict[str, float]:
        """`dense_p50_ms`, `dense_p95_ms`, ... of every stage, interpolated linearly; empty before the first frame."""
        with self._lock:
            rows = list(self._rows)
        result: dict[str, float] = {}
        for stage in dict.fromkeys(stage for row in rows for stage in row):
            times = np.percentile([row[stage] for row in rows if stage in row], PERCENTILES)
            result |= {f"{stage}_p{p}_ms": float(ms) for p, ms in zip(PERCENTILES, times, strict=True)}
        return result
