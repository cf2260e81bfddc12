"""Everything the node publishes about a frame."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import String

from sparserefine_ros.datasets.classes import ClassList
from sparserefine_ros.errors import FrameError
from sparserefine_ros.networks.boundaries import draw_boundaries
from sparserefine_ros.node import labels
from sparserefine_ros.node.cdr import image_parts
from sparserefine_ros.node.conversion import colourise, overlay
from sparserefine_ros.node.mask_transport import fill_png, shrink
from sparserefine_ros.node.qos import QosWatch
from sparserefine_ros.node.refusal import offer
from sparserefine_ros.node.serialized import message_type
from sparserefine_ros.node.sources import RESULTS
from sparserefine_ros.node.status import FrameReport, diagnostics

if TYPE_CHECKING:
    from sparserefine_ros.segmenter.segmenter import Segmentation

RELIABLE = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)
LATCHED = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)


class Outputs:
    """The publishers of one camera, below the namespace `results`."""

    def __init__(self, qos: QosWatch, classes: ClassList, superpixels: bool, results: str = RESULTS) -> None:
        node = qos.node
        self._qos, self._classes, self._lut = qos, classes, classes.lut()
        self.publishers: list[Any] = []
        images = ["mask", "confidence", "entropy", "color", "overlay", *(["superpixels"] if superpixels else [])]
        try:
            self._images = {name: self._made(message_type(Image), f"{results}/{name}", RELIABLE) for name in images}
            self._png = self._made(CompressedImage, f"{results}/mask/compressed", RELIABLE)
            self._timing = self._made(DiagnosticArray, f"{results}/timing", RELIABLE)
            self._json = self._made(String, f"{results}/label_info_json", LATCHED)
            self._label_info: Any = None
            if labels.LabelInfo is not None:
                self._label_info = self._made(labels.LabelInfo, f"{results}/label_info", LATCHED)
        except Exception:
            self.destroy()  # the topics that were made before
            raise
        self._refused: list[str] = []  # topics that DDS refused messages of the present frame for
        if labels.LabelInfo is None:
            node.get_logger().info(
                f"vision_msgs is not installed: class names come as JSON on {results}/label_info_json only "
                f"(std_msgs/String, latched), not on {results}/label_info",
                once=True,
            )

    def _made(self, kind: type, topic: str, qos: QoSProfile) -> Any:
        self.publishers.append(self._qos.publisher(kind, topic, qos))
        return self.publishers[-1]

    def destroy(self) -> None:
        """Takes the topics away."""
        for publisher in self.publishers:
            self._qos.forget(publisher)
            self._qos.node.destroy_publisher(publisher)

    def publish_labels(self, stamp: Any) -> None:
        """Class names and colours, latched. Repeated now and then: a bag split loses latched messages."""
        offer(self._json, String(data=labels.label_json(self._classes)))
        if self._label_info is not None:
            offer(self._label_info, labels.label_info(self._classes, stamp))

    def publish(self, header: Any, image: np.ndarray, result: Segmentation, opacity: float) -> None:
        """What somebody subscribes to. All carry `header` untouched and are of the mask's size, which may be smaller
        than the image's. Raises FrameError, once everything else is out, if DDS refuses a message."""
        self._refused.clear()
        self._send("mask", header, result.mask, "mono8")
        if _awaited(self._png):
            self._offer(self._png, fill_png(CompressedImage(), header, result.mask))
        self._send("confidence", header, result.confidence, "mono8")
        if self.wanted("entropy"):
            self._send("entropy", header, result.entropy, "32FC1")
        if self.wanted("color") or self.wanted("overlay"):
            colour = colourise(result.mask, self._lut)
            if self.wanted("color"):
                self._send("color", header, colour, "rgb8")
            if self.wanted("overlay"):
                image = shrink(image, (colour.shape[0], colour.shape[1]))
                self._send("overlay", header, overlay(image, colour, opacity), "rgb8")
        if self._refused:
            raise FrameError(f"DDS refused it on {', '.join(self._refused)}; is a subscriber there too slow?")

    def publish_superpixels(self, header: Any, image: np.ndarray, ids: np.ndarray) -> None:
        """Their boundaries over the image; ``ids`` [H, W]."""
        self._send("superpixels", header, draw_boundaries(image, ids), "rgb8")

    def publish_timing(self, header: Any, report: FrameReport, model: str) -> None:
        """The frame's density and stage times, while somebody subscribes."""
        if self._timing.get_subscription_count():
            offer(self._timing, diagnostics(header, "segment: timing", "ok", "", model, report.key_values()))

    def wanted(self, name: str) -> bool:
        """Whether there is such an output and somebody subscribes to it."""
        return name in self._images and self._images[name].get_subscription_count() > 0

    def _send(self, name: str, header: Any, image: np.ndarray, encoding: str) -> None:
        if _awaited(self._images[name]):
            self._offer(self._images[name], image_parts(header, image, encoding))

    def _offer(self, publisher: Any, message: Any) -> None:
        if not offer(publisher, message):
            self._refused.append(publisher.topic_name)


def _awaited(publisher: Any) -> bool:
    """Whether somebody could ever get what it publishes: to those who come late a latched topic gives the last."""
    latched = publisher.qos_profile.durability == DurabilityPolicy.TRANSIENT_LOCAL
    return latched or publisher.get_subscription_count() > 0
