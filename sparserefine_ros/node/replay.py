"""Plays frames to a live node over DDS and collects what comes back: masks, timings, counters."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CompressedImage, Image

from sparserefine_ros.evaluation.bag_messages import stamp_ns
from sparserefine_ros.evaluation.bags import RawFrame
from sparserefine_ros.evaluation.replay_metrics import ReplayLog
from sparserefine_ros.node.peer import Peer
from sparserefine_ros.node.process import NodeError
from sparserefine_ros.node.refusal import offer

DISCOVERY_TIMEOUT_S = 120.0
"""Covers loading a bundle on a slow machine."""
SETTLE_S = 0.3
"""Between our side's match and the other side's: discovery is not symmetric."""
COUNTERS_TIMEOUT_S = 2.5
"""The node tells its counters once a second."""
REFUSED_TIMEOUT_S = 10.0
STATUS = "segment: segmentation"  # the node's own line in the diagnostics
COUNTERS = ("received", "processed", "dropped", "malformed", "failed", "unrefined")

Keep = Callable[[int, bytes], None]
"""Takes the stamp (ns) of a mask and the mask, a serialised sensor_msgs/Image."""


class Replayer(Peer):
    """A publisher of frames and a subscriber of masks.

    ``with Replayer(domain_id, environment, image_topic, compressed) as replayer``: ``ready``, then ``play``.
    """

    def __init__(
        self,
        domain_id: int,
        environment: Mapping[str, str],
        image_topic: str,
        compressed: bool,
        keep: Keep,
    ) -> None:
        super().__init__("sparserefine_replay", domain_id, environment)
        self._keep = keep
        self.log = ReplayLog()
        # Reliable and deep: what is lost shall be lost by the node under test.
        qos = QoSProfile(
            history=HistoryPolicy.KEEP_LAST,
            depth=10,
            reliability=ReliabilityPolicy.RELIABLE,
            durability=DurabilityPolicy.VOLATILE,
        )
        self._images = self.node.create_publisher(CompressedImage if compressed else Image, image_topic, qos)
        # raw: a mask is stored as it comes and decoded after the replay, off the node's processor time
        self._masks = self.node.create_subscription(Image, "segmentation/mask", self._on_mask, qos, raw=True)
        self._timing = self.node.create_subscription(DiagnosticArray, "segmentation/timing", self._on_timing, qos)
        self._diagnostics = self.node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, qos)

    def ready(self, alive: Callable[[], None], timeout_s: float = DISCOVERY_TIMEOUT_S) -> None:
        """Waits until the node takes our images and we its masks and timings. ``alive`` raises if it has died."""
        matched = {
            "subscribes to the images": self._images.get_subscription_count,
            "publishes masks": self._masks.get_publisher_count,
            "publishes timings": self._timing.get_publisher_count,
        }
        deadline = time.monotonic() + timeout_s
        while missing := [what for what, count in matched.items() if count() == 0]:
            alive()
            if time.monotonic() > deadline:
                raise NodeError(
                    f"after {timeout_s:.0f} s no node {missing[0]} on ROS domain {self.context.get_domain_id()}; "
                    "is it started with the same ROS_DOMAIN_ID, transport profile and topic names?"
                )
            self.spin_until(time.monotonic() + 0.1)
        self.spin_until(time.monotonic() + SETTLE_S)

    def play(
        self,
        frames: Iterable[RawFrame],
        rate: float,
        timeout_s: float,
        alive: Callable[[], None],
        sent: Callable[[ReplayLog], None] = lambda log: None,
    ) -> ReplayLog:
        """Publishes the frames, collects the answers, returns the log.

        ``rate`` 1 keeps the recording's timing, 2 plays twice as fast; 0 is lossless: each frame waits for the mask of
        the frame before, or for the news that the node rejected it, at most ``timeout_s``. ``sent`` is called after
        each frame.
        """
        log = self.log
        start, first_ns = time.monotonic(), None
        for frame in frames:
            first_ns = frame.time_ns if first_ns is None else first_ns
            if rate > 0:
                self.spin_until(start + (frame.time_ns - first_ns) / 1e9 / rate)
                late = time.monotonic() - start - (frame.time_ns - first_ns) / 1e9 / rate
                log.lag_s = max(log.lag_s, late)
            alive()
            rejected = self._rejected()
            log.sent[frame.stamp_ns] = time.monotonic()
            self._publish(frame, alive)
            if rate == 0 and not self._settled(frame.stamp_ns, rejected, timeout_s, alive):
                log.timeouts.append(frame.stamp_ns)
            sent(log)
        if log.sent and rate > 0:
            # Newest wins, so the last frame is never the one that is replaced.
            self._settled(next(reversed(log.sent)), self._rejected(), timeout_s, alive)
        self._last_counters(alive)
        return log

    def _publish(self, frame: RawFrame, alive: Callable[[], None]) -> None:
        """Again until DDS takes it: on a busy machine it may refuse a message, and nobody else has a copy."""
        deadline = time.monotonic() + REFUSED_TIMEOUT_S
        while not offer(self._images, frame.data):
            alive()
            if time.monotonic() > deadline:
                raise NodeError(f"for {REFUSED_TIMEOUT_S:.0f} s DDS has refused to publish a frame; is the node stuck?")
            self.spin_until(time.monotonic() + 0.05)

    def _settled(self, stamp: int, rejected: int, timeout_s: float, alive: Callable[[], None]) -> bool:
        """Waits for the mask of a frame, or until the node has rejected more than ``rejected`` frames."""

        def settled() -> bool:
            return stamp in self.log.answered or self._rejected() > rejected

        deadline = time.monotonic() + timeout_s
        while not settled() and time.monotonic() < deadline:
            self.spin_until(min(deadline, time.monotonic() + 1.0), settled)
            alive()
        return settled()

    def _rejected(self) -> int:
        """Frames that the node took and will not answer, as far as its counters tell."""
        counters = self.log.counters or {}
        return counters.get("malformed", 0) + counters.get("failed", 0)

    def _last_counters(self, alive: Callable[[], None]) -> None:
        """Waits for counters from after the last mask."""
        log = self.log

        def complete() -> bool:
            return log.counters is not None and log.counters.get("processed", 0) >= len(log.answered)

        self.spin_until(time.monotonic() + COUNTERS_TIMEOUT_S, complete)
        alive()

    def _on_mask(self, message: bytes) -> None:
        now = time.monotonic()
        stamp = stamp_ns(message)
        if stamp not in self.log.sent:
            self.log.strangers += 1
            return
        self.log.answered.setdefault(stamp, now)
        self._keep(stamp, message)

    def _on_timing(self, message: DiagnosticArray) -> None:
        stamp = message.header.stamp.sec * 1_000_000_000 + message.header.stamp.nanosec
        if stamp not in self.log.sent:
            return
        for status in message.status:
            values = _numbers(status)
            if "density" in values:
                self.log.density[stamp] = values["density"]
            self.log.stage_ms[stamp] = {k.removesuffix("_ms"): v for k, v in values.items() if k.endswith("_ms")}

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            if status.name != STATUS:
                continue
            values = _numbers(status)
            if "received" in values:
                self.log.counters = {name: int(values[name]) for name in COUNTERS if name in values}


def _numbers(status: DiagnosticStatus) -> dict[str, float]:
    """Key/values of a status that are numbers."""
    numbers: dict[str, float] = {}
    for item in status.values:
        try:
            numbers[item.key] = float(item.value)
        except ValueError:
            continue
    return numbers


def transport_environment() -> dict[str, str]:
    """Environment of both ends of a replay: the shared-memory profile, and discovery that stays on this machine."""
    from sparserefine_ros.node.transport import profile_env

    return {**profile_env(), "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}


def ros_versions() -> Mapping[str, Any]:
    """What a report says about the ROS it ran on."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        rclpy_version: str | None = version("rclpy")
    except PackageNotFoundError:
        rclpy_version = None
    return {
        "rclpy": rclpy_version,
        "ros_distro": os.environ.get("ROS_DISTRO"),
        "rmw": rclpy.get_rmw_implementation_identifier(),
    }
