"""Which cameras' frames the model segments next, and together. Imports no ROS.

Cameras take turns as in fair queueing: each has a count of frames served, and the one with the smallest is next,
among equals the one served longest ago. A camera that begins to wait starts no lower than the others are, so that a
late or silent one has no claim on the past. Frames of one size share a batch; a camera joins it only if no waiting
camera of another size has been served less, so batching costs nobody a turn.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from sparserefine_ros.node.frame_queue import FrameQueue
from sparserefine_ros.node.receipt import Receipt

Camera = TypeVar("Camera", bound=Hashable)
Size = tuple[int, int]  # (H, W)


@dataclass(eq=False)
class Line:
    """One camera's waiting frames and its place in the order."""

    queue: FrameQueue
    size: Size | None = None  # of its last frame; None before the first is decoded
    served: int = 0  # frames taken, raised to the others' level when it begins to wait
    turn: int = 0  # number of the last frame taken from it, of all cameras'
    since: float = 0.0  # seconds; when it began to wait

    @property
    def order(self) -> tuple[int, int, float]:
        return self.served, self.turn, self.since


def choose(lines: Sequence[Line], max_batch: int) -> list[Line]:
    """The lines to take a frame from now: the fairest first, then others of its size; empty where none waits."""
    waiting = sorted((line for line in lines if len(line.queue)), key=lambda line: line.order)
    batch = waiting[:1]
    passed_over: int | None = None  # served, of the first that cannot join
    for line in waiting[1:]:
        if len(batch) == max_batch or (passed_over is not None and line.served > passed_over):
            break
        if line.size is not None and line.size == batch[0].size:
            batch.append(line)
        elif passed_over is None:
            passed_over = line.served
    return batch


class Scheduler(Generic[Camera]):
    """Frames in, batches out. Thread-safe: `put` never blocks, so that a subscription callback stays short.

    Args:
        capacity: frames that may wait for each camera; 1 keeps the newest only.
        max_batch: frames in a batch.
        window_s: how long a batch may wait for further cameras, from its first frame's arrival; 0 takes what is there.
        clock: seconds, steady.
    """

    def __init__(
        self, capacity: int, max_batch: int, window_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._capacity, self._max_batch, self._window_s, self._clock = capacity, max_batch, window_s, clock
        self._lines: dict[Camera, Line] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._level = 0  # served, of the first camera of the last batch
        self._turn = 0

    def add(self, camera: Camera) -> None:
        """Lets a camera take part."""
        with self._changed:
            self._lines.setdefault(camera, Line(FrameQueue(self._capacity)))

    def remove(self, camera: Camera) -> int:
        """Forgets a camera; the number of its frames dropped."""
        with self._changed:
            line = self._lines.pop(camera, None)
            self._changed.notify_all()
            return line.queue.clear() if line else 0

    def put(self, camera: Camera, frame: Receipt) -> int:
        """A frame has come; the number of frames dropped for it (this one, where the camera is not known)."""
        with self._changed:
            line = self._lines.get(camera)
            if line is None or self._closed:
                return 1
            if not len(line.queue):
                line.served, line.since = max(line.served, self._level), self._clock()
            dropped = line.queue.put(frame)
            self._changed.notify_all()
            return dropped

    def measured(self, camera: Camera, size: Size) -> None:
        """Tells the size (H, W) of a camera's last frame, which only decoding shows."""
        with self._changed:
            if line := self._lines.get(camera):
                line.size = size

    def take(self) -> list[tuple[Camera, Receipt]]:
        """The next batch, at most one frame of each camera; waits for one. Empty once closed."""
        with self._changed:
            while not self._closed:
                batch = choose(list(self._lines.values()), self._max_batch)
                wait_s = self._patience(batch)
                if batch and wait_s <= 0:
                    return self._served(batch)
                self._changed.wait(wait_s if batch else None)
            return []

    def _patience(self, batch: Sequence[Line]) -> float:
        """Seconds that the batch may still wait for others to join."""
        if not batch or self._window_s <= 0 or len(batch) == self._max_batch:
            return 0.0
        if not any(line.size in (None, batch[0].size) and not len(line.queue) for line in self._lines.values()):
            return 0.0  # whoever could join is here
        return min(line.since for line in batch) + self._window_s - self._clock()

    def _served(self, batch: Sequence[Line]) -> list[tuple[Camera, Receipt]]:
        names = {id(line): camera for camera, line in self._lines.items()}
        self._level = batch[0].served
        taken = []
        for line in batch:
            self._turn += 1
            line.served, line.turn, line.since = line.served + 1, self._turn, self._clock()
            taken.append((names[id(line)], line.queue.get()))
        return taken

    def clear(self) -> dict[Camera, int]:
        """Drops what waits; the number of frames dropped by camera."""
        with self._changed:
            return {camera: line.queue.clear() for camera, line in self._lines.items()}

    def close(self) -> dict[Camera, int]:
        """Wakes `take` for good and drops what waits, as `clear`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        return self.clear()

    def waiting(self, camera: Camera) -> int:
        """Frames of a camera that wait."""
        with self._changed:
            line = self._lines.get(camera)
            return len(line.queue) if line else 0
