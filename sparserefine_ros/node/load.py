"""Cameras of a steady rate and a listener, to measure a live node with. Single-threaded, spun by `run`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray
from rclpy.qos import QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
from sensor_msgs.msg import Image

from sparserefine_ros.evaluation.bag_messages import stamp_ns
from sparserefine_ros.memory import keep_large_buffers
from sparserefine_ros.node.peer import Peer
from sparserefine_ros.node.process import NodeError
from sparserefine_ros.node.refusal import offer
from sparserefine_ros.node.status import Counters

RESULTS = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)
COUNTERS = Counters().values()
STAMP_AT = 4  # in a serialized message that begins with a header, after CDR's encapsulation
DISCOVERY_TIMEOUT_S = 120.0
SETTLE_S = 0.3
LAST_S = 1.5  # after the last frame: its mask, and the counters, which come once a second


@dataclass
class LoadLog:
    """What one run saw, by stamp in ns."""

    sent: list[int] = field(default_factory=list)
    camera: dict[int, str] = field(default_factory=dict)  # which sent it
    strays: int = 0  # masks that came on another camera's topic
    masks: dict[int, int] = field(default_factory=dict)  # when each came, ns of the same clock
    timing: dict[int, dict[str, float]] = field(default_factory=dict)  # what the node says: density, dense_ms, ...
    late_s: float = 0.0  # how far the cameras fell behind their rate at worst
    counters: dict[str, dict[str, int]] = field(default_factory=dict)  # by camera: received, processed, dropped, ...


class Camera(Peer):
    """Publishes on `image`, listens to the mask and the timings of the node `segment`.

    ``names``: of several cameras, as the node's parameter `cameras` has them; they take turns at even distances.
    ``reliable``: as asked by a node that must not lose a frame; else best effort, as cameras publish.
    ``keep`` takes the stamp in ns of every mask and the mask, a serialized sensor_msgs/Image.
    """

    def __init__(
        self,
        domain_id: int,
        environment: Mapping[str, str],
        reliable: bool = False,
        keep: Callable[[int, bytes], None] = lambda stamp, mask: None,
        names: Sequence[str] = ("",),
    ) -> None:
        keep_large_buffers()
        super().__init__("camera", domain_id, environment)
        self._keep, self._names = keep, names
        self.log = LoadLog()
        make, qos = self.node.create_subscription, RESULTS if reliable else qos_profile_sensor_data
        self._images, self._results = [], []
        for name in names:
            base = f"{name}/" if name else ""
            self._images.append(self.node.create_publisher(Image, f"{base}image", qos))
            on_mask = partial(self._on_mask, name)
            self._results.append(make(Image, f"{base}segmentation/mask", on_mask, RESULTS, raw=True))
            self._results.append(make(DiagnosticArray, f"{base}segmentation/timing", self._on_timing, RESULTS))
        self._diagnostics = make(DiagnosticArray, "/diagnostics", self._on_diagnostics, RESULTS)

    def ready(self, alive: Callable[[], None]) -> None:
        """Waits until the node takes images and gives masks. ``alive`` raises if it has died."""
        deadline = time.monotonic() + DISCOVERY_TIMEOUT_S
        ends = [image.get_subscription_count for image in self._images]
        ends += [result.get_publisher_count for result in self._results]
        while not all(count() for count in ends):
            alive()
            if time.monotonic() > deadline:
                raise NodeError(f"after {DISCOVERY_TIMEOUT_S:.0f} s the node has not taken our topics")
            self.spin_until(time.monotonic() + 0.1)
        self.spin_until(time.monotonic() + SETTLE_S)

    def run(self, frames: Iterable[bytes], rate_hz: float, tick: Callable[[float], None]) -> LoadLog:
        """Sends a copy of each of the serialized ``frames``, stamped as it leaves; waits a little for the last mask.

        A copy, since a driver has just written what it stamps and sends: the image lies in the caches. Each camera
        sends at ``rate_hz``; the first frame is the first camera's, the second the second's.
        ``tick`` is called after each frame with the seconds since the start; what it raises ends the run.
        """
        start = time.monotonic()
        for i, frame in enumerate(frames):
            due = start + i / (rate_hz * len(self._names))
            self.spin_until(due)
            self.log.late_s = max(self.log.late_s, time.monotonic() - due)
            camera = i % len(self._names)
            message = bytearray(frame)
            self._stamp(message, self._names[camera])
            offer(self._images[camera], message)  # what DDS refuses is lost, as a driver's frame would be
            tick(time.monotonic() - start)
        self.spin_until(time.monotonic() + LAST_S)
        return self.log

    def _stamp(self, message: bytearray, camera: str) -> None:
        now = time.time_ns()
        self.log.sent.append(now)
        self.log.camera[now] = camera
        stamp = (now // 10**9).to_bytes(4, "little") + (now % 10**9).to_bytes(4, "little")
        message[STAMP_AT : STAMP_AT + len(stamp)] = stamp

    def _on_mask(self, camera: str, message: bytes) -> None:
        stamp = stamp_ns(message)
        self.log.strays += self.log.camera.get(stamp) != camera
        self.log.masks[stamp] = time.time_ns()
        self._keep(stamp, message)

    def _on_timing(self, message: Any) -> None:
        stamp = message.header.stamp.sec * 10**9 + message.header.stamp.nanosec
        self.log.timing[stamp] = {row.key: float(row.value) for row in message.status[0].values}

    def _on_diagnostics(self, message: Any) -> None:
        for status in message.status:
            camera = status.name.rpartition(": camera ")[2]
            if camera in self._names:
                self.log.counters[camera] = {row.key: int(row.value) for row in status.values if row.key in COUNTERS}
