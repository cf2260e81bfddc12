"""The cameras of a configured node: those that have names, and those found in the graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy

from sparserefine_ros.datasets.classes import ClassList
from sparserefine_ros.errors import ParameterError
from sparserefine_ros.node.camera import TRANSPORTS, Camera
from sparserefine_ros.node.parameters import Value
from sparserefine_ros.node.qos import QosWatch
from sparserefine_ros.node.scheduler import Scheduler
from sparserefine_ros.node.sources import Search, Source, fixed_sources

FORGET_S = 60.0  # a camera found by a pattern is forgotten when its topic has had no publisher for so long
MAX_CAMERAS = 64  # of those found by patterns: whoever publishes topics must not fill our memory

Receive = Callable[[Camera, memoryview], None]


class Rig:
    """Cameras with their topics; they receive between `open` and `close`.

    Raises ParameterError where two cameras' results would be on the same topics.
    """

    def __init__(self, watch: QosWatch, values: Mapping[str, Value], classes: ClassList, superpixels: bool) -> None:
        node = watch.node
        self._watch, self._node, self._classes, self._superpixels = watch, node, classes, superpixels
        self._transport = str(values["image_transport"])
        self._qos = QoSProfile(
            history=HistoryPolicy.KEEP_LAST,
            depth=int(values["qos_depth"]),
            reliability=ReliabilityPolicy[str(values["qos_reliability"]).upper()],
        )
        self._search = Search(values["cameras"], node.get_namespace(), TRANSPORTS[self._transport][2])
        self._refused: set[str] = set()  # image topics already complained about
        self._scheduler: Scheduler[Camera] | None = None
        self._receive: Receive | None = None
        self.cameras: list[Camera] = []
        try:
            for source in fixed_sources(values["cameras"]):
                self._add(source)
        except Exception:
            self.destroy()
            raise
        self._fixed = len(self.cameras)

    @property
    def topics(self) -> list[str]:
        """Where images are looked for."""
        return [*(camera.image_topic for camera in self.cameras), *self._search.patterns]

    def open(self, scheduler: Scheduler[Camera], receive: Receive) -> None:
        """Subscribes; the scheduler hears of every camera before `receive` does."""
        self._scheduler, self._receive = scheduler, receive
        for camera in self.cameras:
            self._subscribe(camera)
        self.discover()

    def close(self) -> None:
        """Unsubscribes; the topics of the results stay."""
        self._scheduler = self._receive = None
        for camera in self.cameras:
            camera.unsubscribe()

    def destroy(self) -> None:
        """Takes all topics away."""
        self.close()
        for camera in self.cameras:
            camera.destroy()
        self.cameras = []

    def publish_labels(self) -> None:
        """Every camera's class list once more: a bag split loses latched messages."""
        stamp = self._node.get_clock().now().to_msg()
        for camera in self.cameras:
            camera.outputs.publish_labels(stamp)

    def discover(self) -> None:
        """Adds the topics that match a pattern, forgets those that are long gone."""
        if self._scheduler is None or not self._search.patterns:
            return
        _, kind, suffix = TRANSPORTS[self._transport]
        ours = {publisher.topic_name for camera in self.cameras for publisher in camera.outputs.publishers}
        graph = self._node.get_topic_names_and_types()
        self._refused &= {topic for topic, _ in graph}  # topics that come and go must not fill the memory either
        known = {camera.image_topic for camera in self.cameras} | self._refused | ours
        for source in self._search.sources(graph, kind):
            topic = source.image + suffix
            if topic in known:
                continue
            try:
                if self._node.count_publishers(topic):
                    self._take(source, topic)
            except Exception as error:  # DDS lets topics have names that ROS does not: they must not end the process
                self._refused.add(topic)
                known_error = isinstance(error, ParameterError)
                text = str(error) if known_error else f"{topic} cannot be a camera: {type(error).__name__}: {error}"
                self._node.get_logger().warning(text)
        for camera in self.cameras[self._fixed :]:
            if not camera.publishers() and time.monotonic() - camera.seen > FORGET_S:
                self._node.get_logger().info(f"camera {camera.name}: {camera.image_topic} is gone")
                self._forget(camera)
                self._refused.clear()  # there may be room now for one that was refused for its sake

    def _take(self, source: Source, topic: str) -> None:
        """Makes a found topic a camera, or leaves nothing behind."""
        if len(self.cameras) >= MAX_CAMERAS:
            raise ParameterError(f"{topic} matches, but there are {MAX_CAMERAS} cameras already; name fewer")
        camera = self._add(source)
        try:
            self._subscribe(camera)
        except Exception:
            self._forget(camera)
            raise
        self._node.get_logger().info(f"camera {camera.name}: images from {topic}")

    def _forget(self, camera: Camera) -> None:
        assert self._scheduler is not None
        self.cameras.remove(camera)
        self._scheduler.remove(camera)
        camera.destroy()

    def _add(self, source: Source) -> Camera:
        mask = self._node.resolve_topic_name(f"{source.results}/mask")
        rival = next((c for c in self.cameras if mask in {p.topic_name for p in c.outputs.publishers}), None)
        if rival is not None:
            raise ParameterError(
                f"the masks of {source.image} would go to {mask}, as those of {rival.image_topic} do; give the cameras "
                "names in the parameter cameras, and remap NAME/image to their topics"
            )
        if any(camera.name == source.name for camera in self.cameras):  # /top and /top/image are both called top
            source = replace(source, name=source.image)
        camera = Camera(self._watch, source, self._transport, self._classes, self._superpixels)
        camera.outputs.publish_labels(self._node.get_clock().now().to_msg())
        self.cameras.append(camera)
        return camera

    def _subscribe(self, camera: Camera) -> None:
        assert self._scheduler is not None and self._receive is not None
        self._scheduler.add(camera)
        camera.subscribe(self._qos, self._receive)
