"""What tests need to talk to a node over DDS. Needs rclpy."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rclpy
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import GetParameters, SetParameters
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from std_msgs.msg import Header

from sparserefine_ros.node.process import free_domain_id
from sparserefine_ros.node.transport import profile_env

TIMEOUT_S = 40.0
RELIABLE = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)
LATCHED = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)


class Client:
    """Another robot's side: publishes images, keeps what comes back."""

    def __init__(self, domain: int, namespace: str = "") -> None:
        self.context = Context()
        rclpy.init(context=self.context, domain_id=domain)
        self.node = Node("client", namespace=namespace, context=self.context)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self.got: dict[str, list[Any]] = {}
        self.subscriptions: dict[str, Any] = {}
        self.serial = 0
        self.alive: Callable[[], None] = lambda: None

    def close(self) -> None:
        self.executor.shutdown()
        self.node.destroy_node()
        self.context.try_shutdown()

    def publisher(self, kind: type, topic: str) -> Any:
        publisher = self.node.create_publisher(kind, topic, RELIABLE)
        self.until(lambda: publisher.get_subscription_count() > 0, f"a subscriber of {topic}")
        return publisher

    def listen(self, kind: type, topic: str, qos: QoSProfile = RELIABLE) -> list[Any]:
        self.got[topic] = []
        self.subscriptions[topic] = self.node.create_subscription(kind, topic, self.got[topic].append, qos)
        self.until(lambda: self.subscriptions[topic].get_publisher_count() > 0, f"a publisher of {topic}")
        return self.got[topic]

    def until(self, done: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + TIMEOUT_S
        while not (result := done()):
            self.alive()
            assert time.monotonic() < deadline, f"waited {TIMEOUT_S} s for {what}"
            self.executor.spin_once(timeout_sec=0.05)
        return result

    def header(self) -> Header:
        self.serial += 1
        header = Header(frame_id="front_camera_optical")
        header.stamp.sec, header.stamp.nanosec = 1_600_000_000 + self.serial, 123_456_789
        return header

    def answer(self, topic: str, header: Header) -> Any:
        """The message on `topic` that carries `header`'s stamp."""
        found = self.until(lambda: [m for m in self.got[topic] if m.header.stamp == header.stamp], f"{topic} {header}")
        return found[0]

    def until_matched(self, send: Callable[[], Header], topics: Sequence[str], patience_s: float = 1.0) -> Header:
        """Sends until one frame is answered on every topic; that frame's header.

        Discovery is not symmetric: what is sent while only one side knows of the other is lost.
        """

        def answered(header: Header) -> bool:
            return all(any(m.header.stamp == header.stamp for m in self.got[topic]) for topic in topics)

        deadline = time.monotonic() + TIMEOUT_S
        while True:
            header = send()
            pause = time.monotonic() + patience_s
            self.until(lambda: answered(header) or time.monotonic() > pause, "an answer")  # noqa: B023
            if answered(header):
                return header
            assert time.monotonic() < deadline, f"waited {TIMEOUT_S} s for answers on {', '.join(topics)}"

    def call(self, kind: type, name: str, request: Any) -> Any:
        client = self.node.create_client(kind, name)
        self.until(client.service_is_ready, name)
        future = client.call_async(request)
        self.until(future.done, f"{name} to answer")
        self.node.destroy_client(client)
        return future.result()

    def set(self, name: str, value: ParameterValue, node: str = "segment") -> Any:
        request = SetParameters.Request(parameters=[Parameter(name=name, value=value)])
        return self.call(SetParameters, f"{node}/set_parameters", request).results[0]

    def get(self, name: str, node: str = "segment") -> ParameterValue:
        request = GetParameters.Request(names=[name])
        return self.call(GetParameters, f"{node}/get_parameters", request).values[0]


def double(value: float) -> ParameterValue:
    return ParameterValue(type=ParameterType.PARAMETER_DOUBLE, double_value=value)


def text(value: str) -> ParameterValue:
    return ParameterValue(type=ParameterType.PARAMETER_STRING, string_value=value)


@contextmanager
def isolated(log: Path) -> Iterator[int]:
    """A free ROS domain, and an environment in which this process and its children share images on this machine."""
    variables = {
        **profile_env(),
        "ROS_LOG_DIR": str(log),
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
        "OMP_NUM_THREADS": "1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield free_domain_id()


@contextmanager
def isolated_node(name: str, log: Path) -> Iterator[tuple[Node, SingleThreadedExecutor]]:
    """A node in a domain of its own, and an executor to be spun by hand."""
    with isolated(log) as domain:
        context = Context()
        rclpy.init(context=context, domain_id=domain)
        node, executor = Node(name, context=context), SingleThreadedExecutor(context=context)
        executor.add_node(node)
        yield node, executor
        executor.shutdown()
        node.destroy_node()
        context.try_shutdown()


def fill_image(message: Any, header: Any, image: np.ndarray, encoding: str) -> Any:
    """Puts ``image`` ([H, W] or [H, W, C]) into a sensor_msgs/Image and returns it.

    rclpy would visit every byte of an array assigned to `data` from Python: 600 ms for 6 MB.
    """
    image = np.ascontiguousarray(image)
    message.header, message.encoding = header, encoding
    message.height, message.width = image.shape[:2]
    message.step = image.nbytes // image.shape[0]
    message.data = array("B", image.tobytes())
    return message
