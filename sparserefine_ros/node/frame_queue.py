"""Frames on their way from the subscription to the worker."""

from __future__ import annotations

import threading
from collections import deque


class FrameQueue:
    """A bounded queue that drops the oldest frame: with one slot, the newest frame wins.

    `put` never blocks, so a subscription callback stays short; `get` waits. Thread-safe.
    """

    def __init__(self, capacity: int = 1) -> None:
        self._frames: deque[bytes] = deque()
        self._capacity = capacity
        self._changed = threading.Condition()
        self._closed = False

    def put(self, frame: bytes) -> int:
        """Adds a frame; the number of older frames dropped to make room (0 or 1)."""
        with self._changed:
            if self._closed:
                return 1
            dropped = len(self._frames) >= self._capacity
            if dropped:
                self._frames.popleft()
            self._frames.append(frame)
            self._changed.notify()
            return int(dropped)

    def get(self) -> bytes | None:
        """The oldest waiting frame; waits for one. None once the queue is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or bool(self._frames))
            return None if self._closed else self._frames.popleft()

    def close(self) -> None:
        """Wakes `get` for good; what still waits is discarded."""
        with self._changed:
            self._closed = True
            self._frames.clear()
            self._changed.notify_all()

    def __len__(self) -> int:
        return len(self._frames)
