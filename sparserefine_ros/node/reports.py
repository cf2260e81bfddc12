"""/diagnostics: one status for the node, and one for each camera that has a name."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from diagnostic_msgs.msg import DiagnosticArray
from rclpy.node import Node

from sparserefine_ros.node.camera import Camera, CameraStatus
from sparserefine_ros.node.refusal import offer
from sparserefine_ros.node.status import LEVELS, Counters, status

RATE_OVER = 5  # reports that masks_per_second is the mean of


@dataclass(frozen=True)
class NodeState:
    """What the node itself has to tell: where in its life it is, why it gives no masks, what else is known."""

    state: str  # unconfigured, loading, building engine, warming up, inactive, active
    trouble: str = ""  # why no masks come; empty while they should
    hardware: str = ""  # the model's name
    degraded: Sequence[str] = ()  # reasons
    values: Mapping[str, object] = field(default_factory=dict)


class Reporter:
    """Publishes the diagnostics; may be called from any thread."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._publisher = node.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._processed: Mapping[Camera, int] = {}
        self._new: deque[int] = deque(maxlen=RATE_OVER)  # masks since the report before

    def publish(self, own: NodeState, cameras: Mapping[Camera, CameraStatus]) -> None:
        """One report."""
        counts = {name: sum(its.counts[name] for its in cameras.values()) for name in Counters().values()}
        processed = {camera: its.counts["processed"] for camera, its in cameras.items()}
        self._new.append(sum(count - self._processed.get(camera, 0) for camera, count in processed.items()))
        self._processed = processed
        rate = sum(self._new) / len(self._new)
        degraded = list(own.degraded)
        if counts["unrefined"]:
            degraded.append(f"out of memory: {counts['unrefined']} frames without refinement")
        named = {camera: status for camera, status in cameras.items() if camera.name}
        values: dict[str, object] = {"state": own.state, **counts, "masks_per_second": f"{rate:.1f}"}
        if named:
            values["cameras"] = ", ".join(camera.name for camera in named)
        for camera, its in cameras.items():
            values |= its.values if camera not in named else {}
        values |= {**own.values, "degraded": "; ".join(degraded)}
        level, message = ("warn", own.trouble) if own.trouble else _worst(cameras)
        if level == "ok" and own.degraded:
            level, message = "warn", "; ".join(own.degraded)

        array = DiagnosticArray()
        array.header.stamp = self._node.get_clock().now().to_msg()
        name = self._node.get_fully_qualified_name().lstrip("/")
        array.status = [status(f"{name}: segmentation", level, message, own.hardware, values)]
        for camera, its in named.items():
            array.status.append(
                status(f"{name}: camera {camera.name}", its.level, its.message, own.hardware, its.values)
            )
        offer(self._publisher, array)  # a report that is refused is out of date when the next one comes


def _worst(cameras: Mapping[Camera, CameraStatus]) -> tuple[str, str]:
    """The worst level among the cameras, and what those say that are on it."""
    if not cameras:
        return "warn", "waiting: no topic matches the parameter cameras"
    rank = list(LEVELS)
    level = max((its.level for its in cameras.values()), key=rank.index)
    said: dict[str, list[str]] = {}
    for camera, its in cameras.items():
        if its.level == level:
            said.setdefault(its.message, []).append(camera.name)
    return level, "; ".join(f"{', '.join(names)}: {text}" if any(names) else text for text, names in said.items())
