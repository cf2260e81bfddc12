"""The node `segment`: images in, masks out.

The subscription callback puts the serialized image into a queue and returns. One worker thread deserializes,
segments and publishes, so parameters, timers and /clock are served while it computes, and frames that are
replaced before their turn are never deserialized.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from rclpy import get_rmw_implementation_identifier
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message
from sensor_msgs.msg import CompressedImage, Image

from sparserefine_ros.errors import FrameError
from sparserefine_ros.node.conversion import to_rgb
from sparserefine_ros.node.declare import declare, on_change
from sparserefine_ros.node.frame_queue import FrameQueue
from sparserefine_ros.node.logs import RosHandler
from sparserefine_ros.node.model import is_out_of_memory, load_segmenter, number_or_none
from sparserefine_ros.node.outputs import Outputs
from sparserefine_ros.node.parameters import Value
from sparserefine_ros.node.status import Counters, FrameReport, diagnostics, judge
from sparserefine_ros.node.transport import Arrivals, loses_images, remedy, stamp_of

if TYPE_CHECKING:
    from sparserefine_ros.segmenter.segmenter import Segmentation, Segmenter

QUIET_S = 5.0  # at most one warning of a kind in this time
LABELS_EVERY = 10  # diagnostics between two repetitions of the class list
RATE_OVER = 5  # diagnostics that masks_per_second is the mean of


class SegmentNode(Node):
    """See the README for topics and parameters.

    Raises ParameterError or BundleError before any of its topics appears.
    """

    def __init__(self, load: Callable[[Mapping[str, Value]], Segmenter] = load_segmenter, **node_options: Any) -> None:
        super().__init__("segment", **node_options)
        values = declare(self)
        self._log_handler = RosHandler(self.get_logger())
        self._segmenter = load(values)
        self._opacity = float(values["overlay_opacity"])
        on_change(self, self._change)

        self._counters = Counters()
        self._history: deque[dict[str, int]] = deque([self._counters.values()], maxlen=RATE_OVER + 1)
        self._report: FrameReport | None = None
        self._arrivals = Arrivals()
        self._started = time.monotonic()
        self._lossy = loses_images(get_rmw_implementation_identifier())
        if self._lossy:
            self.get_logger().warning(f"Fast DDS will lose most large images with its default settings: {remedy()}")

        self._outputs = Outputs(self, self._segmenter.classes, self._segmenter.has_superpixels)
        self._outputs.publish_labels(self.get_clock().now().to_msg())
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._ticks = 0
        # A steady clock: with use_sim_time the node must be able to say that no /clock and no image comes.
        self._timer = self.create_timer(1.0, self._tick, clock=Clock(clock_type=ClockType.STEADY_TIME))

        self._queue = FrameQueue(int(values["queue_size"]) if values["queue"] == "all" else 1)
        self._message_type, topic = Image, "image"
        if values["image_transport"] == "compressed":
            self._message_type, topic = CompressedImage, "image/compressed"
        qos = QoSProfile(
            history=HistoryPolicy.KEEP_LAST,
            depth=int(values["qos_depth"]),
            reliability=ReliabilityPolicy[str(values["qos_reliability"]).upper()],
        )
        self._subscription = self.create_subscription(self._message_type, topic, self._receive, qos, raw=True)
        self.get_logger().info(
            f"ready: {self._description()}, entropy threshold {self._segmenter.entropy_threshold:.4g} nats, "
            f"images from {self._subscription.topic_name}"
        )
        # Last: were anything above to fail, a running thread would keep the process alive.
        self._worker = threading.Thread(target=self._work, name="segment")
        self._worker.start()

    def destroy_node(self) -> None:
        """Stops the worker, which finishes the frame it is at, before the publishers go."""
        if hasattr(self, "_worker"):
            self._queue.close()
            self._worker.join()
        if hasattr(self, "_log_handler"):
            self._log_handler.close()
        super().destroy_node()

    def _description(self) -> str:
        s = self._segmenter
        kinds = [kind for kind in s.bundle.decoders if kind not in ("dense", "sparserefine")]
        decoder = " + ".join([*kinds, *(["sparserefine"] if s.refines else [])]) or "dense"
        engine = f", sparse backend {s.sparse_backend}" if s.refines else ""
        what = f"model {s.bundle.name} ({decoder}, {len(s.classes)} classes)"
        return f"{what} on {s.device}, {s.precision}, runtime {s.runtime}{engine}"

    def _change(self, name: str, value: Value) -> None:
        """A live parameter change; raises ParameterError to refuse it."""
        if name == "entropy_threshold":
            number = number_or_none(value)
            self._segmenter.entropy_threshold = self._segmenter.bundle.entropy_threshold if number is None else number
        elif name == "overlay_opacity":
            self._opacity = float(value)

    def _receive(self, frame: bytes) -> None:
        self._arrivals.arrived(stamp_of(frame), time.monotonic())
        self._counters.add(received=1, dropped=self._queue.put(frame))

    def _work(self) -> None:
        while (frame := self._queue.get()) is not None:
            start = time.perf_counter()
            try:
                message = deserialize_message(frame, self._message_type)
                image = to_rgb(message)
            except Exception as error:  # whatever a sender does may cost its frame, never the node
                self._counters.add(malformed=1)
                self.get_logger().warning(f"malformed frame skipped: {error}", throttle_duration_sec=QUIET_S)
                continue
            try:
                self._process(message.header, image, start)
            except Exception as error:
                if not self.context.ok():  # shut down while publishing
                    return
                self._counters.add(failed=1)
                what = str(error) if isinstance(error, FrameError) else f"{type(error).__name__}: {error}"
                self.get_logger().error(f"frame skipped, segmenting it failed: {what}", throttle_duration_sec=QUIET_S)

    def _process(self, header: Any, image: np.ndarray, start: float) -> None:
        """Segments and publishes one frame; `start` (time.perf_counter) is when its decoding began."""
        decoded = time.perf_counter()
        threshold = self._segmenter.entropy_threshold
        result = self._segment(image)
        segmented = time.perf_counter()
        self._outputs.publish(header, image, result, self._opacity)
        if self._outputs.wanted("superpixels"):
            self._outputs.publish_superpixels(header, image, self._segmenter.superpixels(image))
        published = time.perf_counter()
        stages = {
            "decode": (decoded - start) * 1e3,
            **result.stage_ms,
            "publish": (published - segmented) * 1e3,
            "total": (published - start) * 1e3,
        }
        self._report = FrameReport(result.density, threshold, stages)
        self._counters.add(processed=1)
        self._outputs.publish_timing(header, self._report, self._segmenter.bundle.name)

    def _segment(self, image: np.ndarray) -> Segmentation:
        """One frame; where memory runs out, its dense mask rather than none."""
        try:
            return self._segmenter.segment([image])[0]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.get_logger().warning(
                f"out of memory at {image.shape[1]} x {image.shape[0]}, frame segmented without refinement; "
                "raise entropy_threshold, or free memory",
                throttle_duration_sec=QUIET_S,
            )
        # Outside the handler: while it runs, the traceback keeps the failed attempt's tensors alive.
        result = self._segmenter.segment([image], refine=False)[0]
        self._counters.add(unrefined=1)
        return result

    def _tick(self) -> None:
        stamp = self.get_clock().now().to_msg()
        self._ticks += 1
        if self._ticks % LABELS_EVERY == 0:
            self._outputs.publish_labels(stamp)
        topic = self._subscription.topic_name
        publishers = self.count_publishers(topic)
        complaint = self._arrivals.complaint(time.monotonic(), publishers, self._started)
        if complaint and self._lossy:
            complaint += f"; {remedy()}"
            self.get_logger().warning(complaint, throttle_duration_sec=30.0)
        counts = self._counters.values()
        # An engine for frames of another size than the bundle's is built when the first one comes.
        level, text = judge(self._segmenter.under_way or complaint, self._history[-1], counts, publishers)
        self._history.append(counts)
        rate = (counts["processed"] - self._history[0]["processed"]) / (len(self._history) - 1)
        values: dict[str, object] = {"model": self._description(), "image_topic": topic, "publishers": publishers}
        values |= counts | {"waiting": len(self._queue), "masks_per_second": f"{rate:.1f}"}
        values["entropy_threshold"] = f"{self._segmenter.entropy_threshold:.6g}"
        values["estimated_loss"] = f"{self._arrivals.loss():.2f}"
        values["degraded"] = f"{counts['unrefined']} frames without refinement" if counts["unrefined"] else ""
        if self._report is not None:
            values |= self._report.key_values() | {"entropy_threshold": values["entropy_threshold"]}
        name = f"{self.get_fully_qualified_name().lstrip('/')}: segmentation"
        self._diagnostics.publish(diagnostics(stamp, name, level, text, self._segmenter.bundle.name, values))
