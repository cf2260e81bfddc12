"""How long each stage of a frame takes, without waiting for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

STAGES = ("preprocess", "dense", "select", "refine", "merge")


class StageClock:
    """Milliseconds by stage. On a GPU they are those of its own stream, which is not waited for until they are read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = self._now()
        yield
        self._spans.append((stage, start, self._now()))

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    @property
    def ms(self) -> dict[str, float]:
        """All stages; 0 for those left out. On a GPU only once it is done with them."""
        result = dict.fromkeys(STAGES, 0.0)
        for stage, start, end in self._spans:
            result[stage] += start.elapsed_time(end) if self.device.type == "cuda" else (end - start) * 1e3
        return result
