"""Frames of one camera on their way from the subscription to the worker."""

from __future__ import annotations

from collections import deque

from sparserefine_ros.node.receipt import Receipt


class FrameQueue:
    """A bounded queue that drops the oldest frame: with one slot, the newest frame wins. The scheduler locks it."""

    def __init__(self, capacity: int = 1) -> None:
        self._frames: deque[Receipt] = deque()
        self._capacity = capacity

    def put(self, frame: Receipt) -> int:
        """Adds a frame; the number of older frames dropped to make room (0 or 1)."""
        dropped = len(self._frames) >= self._capacity
        if dropped:
            self._frames.popleft()
        self._frames.append(frame)
        return int(dropped)

    def get(self) -> Receipt:
        """Takes the oldest frame; IndexError where there is none."""
        return self._frames.popleft()

    def clear(self) -> int:
        """Drops what waits; how many frames that were."""
        dropped = len(self._frames)
        self._frames.clear()
        return dropped

    def __len__(self) -> int:
        return len(self._frames)
