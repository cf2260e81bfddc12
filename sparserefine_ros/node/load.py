"""A camera of a steady rate and a listener, to measure a live node with. Single-threaded, spun by `run`."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import Image

from sparserefine_ros.evaluation.bag_messages import stamp_ns
from sparserefine_ros.node.memory import keep_large_buffers
from sparserefine_ros.node.process import NodeError
from sparserefine_ros.node.refusal import offer

RESULTS = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)
STAMP_AT = 4  # in a serialized message that begins with a header, after CDR's encapsulation
DISCOVERY_TIMEOUT_S = 120.0
SETTLE_S = 0.3


@dataclass
class LoadLog:
    """What one run saw, by stamp in ns."""

    sent: list[int] = field(default_factory=list)
    masks: dict[int, int] = field(default_factory=dict)  # when each came, ns of the same clock
    timing: dict[int, dict[str, float]] = field(default_factory=dict)  # what the node says: density, dense_ms, ...
    late_s: float = 0.0  # how far the camera fell behind its rate at worst


class Camera:
    """Publishes on `image`, listens to the mask and the timings of the node `segment`.

    ``reliable``: as asked by a node that must not lose a frame; else best effort, as cameras publish.
    ``keep`` takes the stamp in ns of every mask and the mask, a serialized sensor_msgs/Image.
    ``environment`` must be set before the first participant of the process exists: it names the transport profile.
    """

    def __init__(
        self,
        domain_id: int,
        environment: Mapping[str, str],
        reliable: bool = False,
        keep: Callable[[int, bytes], None] = lambda stamp, mask: None,
    ) -> None:
        os.environ.update(environment)
        keep_large_buffers()
        self._keep = keep
        self.log = LoadLog()
        self._context = Context()
        # no handler of ours: Ctrl-C stays Python's KeyboardInterrupt
        rclpy.init(context=self._context, domain_id=domain_id, signal_handler_options=SignalHandlerOptions.NO)
        self._node = Node("camera", context=self._context, enable_rosout=False)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self._node)
        self._images = self._node.create_publisher(Image, "image", RESULTS if reliable else qos_profile_sensor_data)
        self._masks = self._node.create_subscription(Image, "segmentation/mask", self._on_mask, RESULTS, raw=True)
        self._timing = self._node.create_subscription(DiagnosticArray, "segmentation/timing", self._on_timing, RESULTS)

    def __enter__(self) -> Camera:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executor.shutdown()
        self._node.destroy_node()
        self._context.try_shutdown()

    def ready(self, alive: Callable[[], None]) -> None:
        """Waits until the node takes images and gives masks. ``alive`` raises if it has died."""
        deadline = time.monotonic() + DISCOVERY_TIMEOUT_S
        ends = (self._images.get_subscription_count, self._masks.get_publisher_count, self._timing.get_publisher_count)
        while not all(count() for count in ends):
            alive()
            if time.monotonic() > deadline:
                raise NodeError(f"after {DISCOVERY_TIMEOUT_S:.0f} s the node has not taken our topics")
            self._executor.spin_once(timeout_sec=0.1)
        self._spin_until(time.monotonic() + SETTLE_S)

    def run(self, frames: Iterable[bytes], rate_hz: float, tick: Callable[[float], None]) -> LoadLog:
        """Sends the serialized ``frames``, each stamped, in place, as it leaves; then waits a little for the last mask.

        ``tick`` is called after each frame with the seconds since the start; what it raises ends the run.
        """
        start = time.monotonic()
        for i, frame in enumerate(frames):
            due = start + i / rate_hz
            self._spin_until(due)
            self.log.late_s = max(self.log.late_s, time.monotonic() - due)
            self._stamp(frame)
            offer(self._images, frame)  # what DDS refuses is lost, as a driver's frame would be
            tick(time.monotonic() - start)
        self._spin_until(time.monotonic() + 1.0)
        return self.log

    def _stamp(self, frame: bytes) -> None:
        """Writes the time into the message where it lies, as a driver does: joining 6 MB would cost half a ms.

        The bytes are nobody else's, and rclpy publishes nothing but bytes, so they are written through their address.
        """
        now = time.time_ns()
        self.log.sent.append(now)
        stamp = (now // 10**9).to_bytes(4, "little") + (now % 10**9).to_bytes(4, "little")
        ctypes.memmove(np.frombuffer(frame, np.uint8).ctypes.data + STAMP_AT, stamp, len(stamp))

    def _spin_until(self, deadline: float) -> None:
        while (remaining := deadline - time.monotonic()) > 0:
            self._executor.spin_once(timeout_sec=remaining)

    def _on_mask(self, message: bytes) -> None:
        stamp = stamp_ns(message)
        self.log.masks[stamp] = time.time_ns()
        self._keep(stamp, message)

    def _on_timing(self, message: Any) -> None:
        stamp = message.header.stamp.sec * 10**9 + message.header.stamp.nanosec
        self.log.timing[stamp] = {row.key: float(row.value) for row in message.status[0].values}
