"""One camera: its subscription, its results, what has become of its frames."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rclpy.qos import QoSProfile
from sensor_msgs.msg import CompressedImage, Image

from sparserefine_ros.datasets.classes import ClassList
from sparserefine_ros.node.outputs import Outputs
from sparserefine_ros.node.qos import QosWatch
from sparserefine_ros.node.receipt import DISBELIEF
from sparserefine_ros.node.sources import Source
from sparserefine_ros.node.status import Counters, FrameReport, judge
from sparserefine_ros.node.transport import Arrivals

TRANSPORTS: dict[str, tuple[type, str, str]] = {
    "raw": (Image, "sensor_msgs/msg/Image", ""),
    "compressed": (CompressedImage, "sensor_msgs/msg/CompressedImage", "/compressed"),
}
"""image_transport to message type, its name in the graph, and what is appended to the image topic."""


PATIENCE_S = 5.0  # a mask that takes longer is worth a warning


@dataclass(frozen=True)
class CameraStatus:
    """A camera's line in the diagnostics."""

    level: str
    message: str
    complaint: str  # about the frames' arrival; empty where all is well
    counts: dict[str, int]
    values: dict[str, object]


class Camera:
    """Publishers from the start; a subscription between `subscribe` and `unsubscribe`. Hashed by identity."""

    def __init__(self, qos: QosWatch, source: Source, transport: str, classes: ClassList, superpixels: bool) -> None:
        node = qos.node
        self.name = source.name
        self.message_type, _, suffix = TRANSPORTS[transport]
        self.image_topic: str = node.resolve_topic_name(source.image + suffix)
        self.outputs = Outputs(qos, classes, superpixels, source.results)
        self.counters, self.arrivals = Counters(), Arrivals()
        self.report: FrameReport | None = None
        self.seen = time.monotonic()  # when its topic last had a publisher
        self.stamps_believed = True  # whether latencies count from the stamps
        self._qos, self._node, self._topic = qos, node, source.image + suffix
        self._counted = self.counters.values()
        self._started = time.monotonic()
        self._newest_ns: int | None = None
        self._unanswered: float | None = None  # when the first frame came after the last mask
        self._subscription: Any = None

    def subscribe(self, qos: QoSProfile, receive: Callable[[Camera, memoryview], None]) -> None:
        """`receive` gets every image as it comes, serialized."""
        self._started = self.seen = time.monotonic()
        self._unanswered = None
        self.arrivals = Arrivals()  # a new subscription counts anew
        self._subscription = self._qos.subscription(
            self.message_type, self._topic, lambda frame: receive(self, frame), qos
        )

    def unsubscribe(self) -> None:
        """Ends the subscription, where there is one."""
        if self._subscription is not None:
            self._qos.forget(self._subscription)
            self._node.destroy_subscription(self._subscription)
            self._subscription = None

    def destroy(self) -> None:
        """Takes its topics away."""
        self.unsubscribe()
        self.outputs.destroy()

    def arrived(self, stamp_ns: int | None, awaited: bool = True) -> None:
        """Notes a frame's arrival; ``awaited``: it is to be answered by a mask."""
        now = time.monotonic()
        self.arrivals.arrived(stamp_ns, now, self._qos.lost(self._subscription))
        if awaited and self._unanswered is None:
            self._unanswered = now

    def excuse(self) -> None:
        """No mask is awaited for the frames that have come."""
        self._unanswered = None

    def processed(self, stamp_ns: int, report: FrameReport, refined: bool) -> None:
        """Counts a published frame. One older than a frame published before is stale: published all the same, since
        a bag that starts again or a clock that is set back is no reason to fall silent."""
        stale = self._newest_ns is not None and stamp_ns < self._newest_ns
        self._newest_ns = stamp_ns
        self._unanswered = None
        self.report = report
        self.counters.add(processed=1, stale=int(stale), unrefined=int(not refined))

    def publishers(self) -> int:
        """Publishers of its image topic now."""
        count: int = self._node.count_publishers(self.image_topic)
        if count:
            self.seen = time.monotonic()
        return count

    def status(self, waiting: int, remedy: str, disabled: str = "") -> CameraStatus:
        """Its state, judged by what has happened since the last call.

        waiting: frames in its slot. remedy: what to do about lost frames, added to a complaint about them.
        disabled: why its frames are dropped, if they are.
        """
        publishers = self.publishers()
        now, unanswered, counts = time.monotonic(), self._unanswered, self.counters.values()
        complaint = self.arrivals.complaint(now, publishers, self._started)
        lost = self._qos.lost(self._subscription)
        if complaint and lost == 0 and self.arrivals.silent_s(now, self._started) is not None:
            # Its numbers are known and not one is missing. Of a camera all of whose images are lost there are none.
            complaint += (
                "; none was lost before, so that it seems to send nothing, unless it began anew without the profile"
            )
        elif complaint and remedy:
            complaint += f"; {remedy}"
        trouble = complaint
        if publishers and not trouble and unanswered is not None and now - unanswered > PATIENCE_S:
            trouble = f"no mask for {now - unanswered:.0f} s although images arrive; the model hangs, or is too slow"
        level, message = judge(trouble, self._counted, counts, publishers)
        if self._subscription is None:
            level, message, complaint = "warn", "not subscribed: the node is not active", ""
        elif disabled:
            level, message = "warn", disabled
        self._counted = counts
        values: dict[str, object] = {"image_topic": self.image_topic, "publishers": publishers}
        values |= counts | {"waiting": waiting, "lost": "unknown" if lost is None else lost}
        values["loss"] = f"{self.arrivals.loss():.2f}"
        values["latency_counts_from"] = "stamp" if self.stamps_believed else f"receipt: {DISBELIEF}"
        if self.report is not None:
            values |= self.report.key_values()
        return CameraStatus(level, message, complaint, counts, values)
