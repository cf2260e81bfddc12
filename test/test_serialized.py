"""Serialized messages by librcl's functions: the very bytes, memory of their own, failures that cost themselves."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy")

import rclpy  # noqa: E402
from rclpy.context import Context  # noqa: E402
from rclpy.executors import SingleThreadedExecutor  # noqa: E402
from rclpy.node import Node  # noqa: E402
from rclpy.qos import QoSProfile, ReliabilityPolicy  # noqa: E402
from ros_client import isolated  # noqa: E402
from sensor_msgs.msg import Image  # noqa: E402

from sparserefine_ros.evaluation.bag_messages import image_message, stamp_ns  # noqa: E402
from sparserefine_ros.node import qos, serialized  # noqa: E402
from sparserefine_ros.node.qos import QosWatch  # noqa: E402

RELIABLE = QoSProfile(depth=20, reliability=ReliabilityPolicy.RELIABLE)
DIRECT = pytest.mark.skipif(serialized.RCL is None, reason="librcl cannot be called here")


class Line:
    """A publisher and a subscription of `QosWatch` on one topic, spun by hand."""

    def __init__(self, node: Node, executor: SingleThreadedExecutor, topic: str) -> None:
        self.node, self.executor, self.watch = node, executor, QosWatch(node)
        self.got: list[Any] = []
        self.publisher = node.create_publisher(Image, topic, RELIABLE)
        self.subscription = self.watch.subscription(Image, topic, self.got.append, RELIABLE)
        self.until(self.publisher.get_subscription_count)

    def send(self, seed: int, size: tuple[int, int]) -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
        message = image_message(pixels, "rgb8", seed + 1, "camera")
        serialized.publish(self.publisher, message)
        return message

    def until(self, done: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 15
        while not done():
            assert time.monotonic() < deadline
            self.executor.spin_once(timeout_sec=0.02)

    def close(self) -> None:
        self.watch.forget(self.subscription)
        self.node.destroy_subscription(self.subscription)
        self.node.destroy_publisher(self.publisher)


@pytest.fixture(scope="module")
def ros(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, SingleThreadedExecutor]]:
    with isolated(tmp_path_factory.mktemp("log")) as domain:
        context = Context()
        rclpy.init(context=context, domain_id=domain)
        node, executor = Node("serialized", context=context), SingleThreadedExecutor(context=context)
        executor.add_node(node)
        yield node, executor
        executor.shutdown()
        node.destroy_node()
        context.try_shutdown()


@pytest.fixture(params=[pytest.param("librcl", marks=DIRECT), "rclpy"])
def line(
    ros: tuple[Node, SingleThreadedExecutor], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Line]:
    if request.param == "rclpy":
        monkeypatch.setattr(serialized, "RCL", None)
        monkeypatch.setattr(qos, "RCL", None)
    made = Line(*ros, f"/{request.node.originalname}_{request.param}")
    yield made
    made.close()


@pytest.mark.parametrize("size", [(1, 1), (37, 53), (1024, 2048)])
def test_what_is_published_arrives(line: Line, size: tuple[int, int]) -> None:
    sent = [line.send(seed, size) for seed in range(3)]
    line.until(lambda: len(line.got) == 3)
    for message, got in zip(sent, line.got, strict=True):
        assert isinstance(got, memoryview) and got.readonly
        assert bytes(got) == message
    assert [stamp_ns(bytes(got)) for got in line.got] == [1, 2, 3]


def test_a_message_stays_as_it_is_while_it_is_held_and_no_longer(line: Line) -> None:
    first = line.send(0, (64, 64))
    line.until(lambda: line.got)
    held = line.got.pop()
    for seed in range(1, 6):
        line.send(seed, (64, 64))
        line.until(lambda: line.got)
        line.got.clear()
    assert bytes(held) == first
    if isinstance(held.obj, np.ndarray):
        gone = weakref.ref(held.obj)
        del held
        gc.collect()
        assert gone() is None


def test_events_of_the_subscription_are_served(line: Line) -> None:
    other = line.node.create_publisher(
        Image, line.subscription.topic_name, QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
    )
    line.until(line.watch.complaints)
    assert "offers less reliability" in line.watch.complaints()[0]
    line.node.destroy_publisher(other)
    line.until(lambda: not line.watch.complaints())


def test_a_subscription_that_goes_hands_over_nothing_more(line: Line) -> None:
    line.watch.forget(line.subscription)
    line.node.destroy_subscription(line.subscription)
    line.send(0, (8, 8))
    for _ in range(5):
        line.executor.spin_once(timeout_sec=0.02)
    assert line.got == []


@DIRECT
def test_nothing_to_take_is_none(ros: tuple[Node, SingleThreadedExecutor]) -> None:
    line = Line(*ros, "/empty")
    assert serialized.RCL is not None
    taker = serialized.Taker(serialized.RCL)
    assert taker.take(line.subscription) is None
    message = line.send(0, (8, 8))
    deadline = time.monotonic() + 15
    while (got := taker.take(line.subscription)) is None:
        assert time.monotonic() < deadline
    assert bytes(got) == message and taker.take(line.subscription) is None
    line.close()


@DIRECT
def test_without_memory_a_message_is_lost_and_the_next_is_not(
    ros: tuple[Node, SingleThreadedExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = Line(*ros, "/short")

    def none(*_: Any) -> np.ndarray:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(serialized, "np", SimpleNamespace(empty=none, frombuffer=np.frombuffer, uint8=np.uint8))
        line.send(0, (8, 8))
        for _ in range(20):
            line.executor.spin_once(timeout_sec=0.02)
    message = line.send(1, (8, 8))
    line.until(lambda: line.got)
    assert [bytes(got) for got in line.got] == [message]
    line.close()


@DIRECT
def test_what_rcl_refuses_is_an_error_that_names_the_topic(
    ros: tuple[Node, SingleThreadedExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = Line(*ros, "/refused")
    monkeypatch.setattr(serialized.RCL, "publish", lambda *_: 1)
    with pytest.raises(serialized.RCLError, match=r"cannot publish on /refused: rcl returns 1"):
        line.send(0, (8, 8))
    line.close()
    with pytest.raises(serialized.InvalidHandle):  # as rclpy does
        line.send(0, (8, 8))
