"""What the node knows about itself, as diagnostic messages."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue


@dataclass
class Counters:
    """Frames since configure: received = processed + dropped + malformed + failed + those waiting or in work."""

    received: int = 0
    processed: int = 0
    dropped: int = 0  # replaced by a newer frame before their turn came
    malformed: int = 0  # could not be converted
    failed: int = 0  # the segmenter raised an error
    unrefined: int = 0  # processed, but without refinement for lack of memory
    stale: int = 0  # processed, but older than a frame of the same camera published before
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, **amounts: int) -> None:
        """Adds to the named counters; callback and worker both count."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)

    def values(self) -> dict[str, int]:
        """All counters at one moment."""
        with self._lock:
            return {name: value for name, value in vars(self).items() if not name.startswith("_")}


@dataclass(frozen=True)
class FrameReport:
    """The last processed frame: selected pixels over all, threshold in nats, milliseconds by stage."""

    density: float
    entropy_threshold: float
    stage_ms: Mapping[str, float]

    def key_values(self) -> dict[str, str]:
        rows = {"density": f"{self.density:.6f}", "entropy_threshold": f"{self.entropy_threshold:.6g}"}
        rows.update({f"{stage}_ms": f"{ms:.3f}" for stage, ms in self.stage_ms.items()})
        return rows


LEVELS: dict[str, bytes] = {
    "ok": DiagnosticStatus.OK,
    "warn": DiagnosticStatus.WARN,
    "error": DiagnosticStatus.ERROR,
}


def diagnostics(
    stamp_or_header: Any, name: str, level: str, message: str, hardware: str, values: Mapping[str, object]
) -> DiagnosticArray:
    """A DiagnosticArray with one status; takes a header as it is, or a time to put into a new one."""
    array = DiagnosticArray()
    if hasattr(stamp_or_header, "frame_id"):
        array.header = stamp_or_header
    else:
        array.header.stamp = stamp_or_header
    array.status = [status(name, level, message, hardware, values)]
    return array


def status(name: str, level: str, message: str, hardware: str, values: Mapping[str, object]) -> DiagnosticStatus:
    """One line of the diagnostics."""
    rows = [KeyValue(key=key, value=str(value)) for key, value in values.items()]
    return DiagnosticStatus(level=LEVELS[level], name=name, message=message, hardware_id=hardware, values=rows)


def judge(complaint: str, before: Mapping[str, int], now: Mapping[str, int], publishers: int) -> tuple[str, str]:
    """(level, message) from what was counted since the last diagnostics."""
    new = {name: now[name] - before.get(name, 0) for name in now}
    if new["failed"]:
        return "error", f"{new['failed']} frame(s) failed in the segmenter; see the node's log"
    if new["malformed"]:
        return "warn", f"{new['malformed']} malformed frame(s) skipped; see the node's log"
    if new["unrefined"]:
        return "warn", f"out of memory: {new['unrefined']} frame(s) segmented without refinement"
    if complaint:
        return "warn", complaint
    if publishers == 0:
        return "warn", "waiting: nobody publishes the image topic"
    return "ok", "segmenting" if now["processed"] or new["received"] else "waiting for the first image"
