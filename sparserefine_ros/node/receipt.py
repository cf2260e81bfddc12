"""When a frame was taken, by its stamp, or when it came, where the stamp cannot be believed."""

from __future__ import annotations

from dataclasses import dataclass

OLDEST_S = 5.0
"""No camera is so late: its clock and the node's are not synchronised, or a bag is replayed without /clock."""
NEWEST_S = -0.1
"""A stamp a little ahead of the node's clock is a coarse /clock; further ahead, the clocks differ."""


@dataclass(frozen=True)
class Receipt:
    """A serialized frame and its age when it came.

    age_s: seconds since its stamp, at least 0; 0 where the stamp is not `believed`.
    at: when it came, seconds of a steady clock.
    """

    data: memoryview
    age_s: float
    at: float
    believed: bool

    def latency_ms(self, now: float) -> float:
        """Milliseconds from stamp to `now`, a time of the same steady clock."""
        return (self.age_s + now - self.at) * 1e3


def received(data: memoryview, stamp_ns: int | None, now_ns: int, at: float) -> Receipt:
    """The receipt of a frame with that stamp; `now_ns` is the node's clock, which may be /clock, `at` a steady one.

    The stamp counts only here, at arrival: what follows is measured by the steady clock, as /clock ticks coarsely.
    """
    age_s = None if not stamp_ns else (now_ns - stamp_ns) / 1e9
    if age_s is None or not NEWEST_S <= age_s <= OLDEST_S:
        return Receipt(data, 0.0, at, believed=False)
    return Receipt(data, max(0.0, age_s), at, believed=True)


DISBELIEF = (
    "stamps are far from the node's clock, so latencies count from receipt; synchronise the camera's clock, "
    "or with a bag use_sim_time and --clock"
)
