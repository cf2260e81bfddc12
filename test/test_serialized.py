"""Serialized messages by librcl's functions: the very bytes, memory of their own, failures that cost themselves."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy")

import rclpy  # noqa: E402
from rclpy.context import Context  # noqa: E402
from rclpy.executors import Executor, SingleThreadedExecutor  # noqa: E402
from rclpy.node import Node  # noqa: E402
from rclpy.qos import QoSProfile, ReliabilityPolicy  # noqa: E402
from ros_client import isolated_node  # noqa: E402
from sensor_msgs.msg import Image  # noqa: E402

from sparserefine_ros.evaluation.bag_messages import image_message, stamp_ns  # noqa: E402
from sparserefine_ros.node import qos, serialized  # noqa: E402
from sparserefine_ros.node.qos import QosWatch  # noqa: E402
from sparserefine_ros.node.single_copy import single_copy  # noqa: E402

RELIABLE = QoSProfile(depth=20, reliability=ReliabilityPolicy.RELIABLE)
DIRECT = pytest.mark.skipif(serialized.RCL is None, reason="librcl cannot be called here")
SINGLE = pytest.mark.skipif(single_copy() is None, reason="messages are copied twice here")


class Line:
    """A publisher and a subscription of `QosWatch` on one topic, spun by hand."""

    def __init__(self, node: Node, executor: Executor, topic: str) -> None:
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
    with isolated_node("serialized", tmp_path_factory.mktemp("log")) as made:
        yield made


@pytest.fixture(params=[pytest.param("one copy", marks=SINGLE), pytest.param("librcl", marks=DIRECT), "rclpy"])
def line(
    ros: tuple[Node, SingleThreadedExecutor], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Line]:
    if request.param == "rclpy":
        monkeypatch.setattr(serialized, "RCL", None)
    if request.param == "librcl":
        monkeypatch.setattr(qos, "message_type", lambda kind: kind)
    made = Line(*ros, f"/{request.node.originalname}_{request.param.replace(' ', '_')}")
    assert (made.subscription.msg_type is not Image) == (request.param == "one copy")
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


@DIRECT
def test_messages_that_never_come_are_counted(ros: tuple[Node, SingleThreadedExecutor]) -> None:
    """Each publisher's by its own numbers; where a slot holds one message, those that it replaces are lost."""
    node, executor = ros
    watch, got, one = QosWatch(node), [], QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
    publishers = [node.create_publisher(Image, "/missing", one) for _ in range(2)]
    for _ in range(3):
        publishers[1].publish(Image())  # before anybody listens: not missed
    subscription = watch.subscription(Image, "/missing", got.append, one)
    assert watch.lost(subscription) is None

    def until(done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 15
        while not done():
            assert time.monotonic() < deadline
            executor.spin_once(timeout_sec=0.02)

    until(lambda: all(publisher.get_subscription_count() for publisher in publishers))
    lost = 0
    for publisher, burst, missed in ((0, 1, 0), (1, 1, 0), (0, 4, 3), (1, 1, 0), (1, 3, 2), (0, 1, 0)):
        before = len(got)
        for _ in range(burst):
            publishers[publisher].publish(Image())
            time.sleep(0.02)
        until(lambda: len(got) == before + 1)  # noqa: B023
        lost += missed
        assert watch.lost(subscription) == lost
    watch.forget(subscription)
    for endpoint in (subscription, *publishers):
        (node.destroy_subscription if endpoint is subscription else node.destroy_publisher)(endpoint)


def test_numbers_of_publishers_that_come_and_go() -> None:
    missing = serialized.Missing()
    for number in serialized.UNNUMBERED:
        missing.taken(b"a", number)
    assert missing.count is None
    for publisher in range(100):  # no more of them are remembered than that
        missing.taken(b"a", 10 + publisher)
        missing.taken(str(publisher).encode(), 7)
    assert missing.count == 0 and len(missing._last) == serialized.MAX_PUBLISHERS
    missing.taken(b"a", 120)
    assert missing.count == 10
    missing.taken(b"a", 3)  # began anew, or overtaken
    missing.taken(b"a", 4)
    assert missing.count == 10


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
    rcl = serialized.RCL
    assert rcl is not None and serialized.take(line.subscription, rcl, serialized.Missing()) == []
    message = line.send(0, (8, 8))
    deadline = time.monotonic() + 15
    while not (got := serialized.take(line.subscription, rcl, serialized.Missing())):
        assert time.monotonic() < deadline
    assert [bytes(one) for one in got] == [message]
    assert serialized.take(line.subscription, rcl, serialized.Missing()) == []
    line.close()


@DIRECT
@pytest.mark.parametrize("copies", [pytest.param(1, marks=SINGLE), 2])
def test_without_memory_a_message_is_lost_and_the_next_is_not(
    ros: tuple[Node, SingleThreadedExecutor], monkeypatch: pytest.MonkeyPatch, copies: int
) -> None:
    if copies == 2:
        monkeypatch.setattr(qos, "message_type", lambda kind: kind)
    line = Line(*ros, f"/short_{copies}")
    assert serialized.RCL is not None
    reallocate = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)(lambda *_: None)
    allocator = serialized._Allocator.from_buffer_copy(serialized.RCL.allocator)
    allocator.reallocate = ctypes.cast(reallocate, ctypes.c_void_p)
    with monkeypatch.context() as patch:
        patch.setattr(serialized.RCL, "allocator", allocator)
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


@DIRECT
def test_a_publisher_that_goes_while_it_publishes_has_published(
    ros: tuple[Node, SingleThreadedExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The executor forgets a camera while the worker is in rcl."""
    line = Line(*ros, "/going")
    rcl = serialized.RCL
    assert rcl is not None
    publish, codes = rcl.publish, []

    def publish_and_go(*arguments: Any) -> int:
        codes.append(publish(*arguments))
        line.node.destroy_publisher(line.publisher)
        return codes[-1]

    monkeypatch.setattr(rcl, "publish", publish_and_go)
    line.send(0, (8, 8))
    assert codes == [0]
    line.close()


def test_an_events_executor_gets_every_message_from_rclpy(ros: tuple[Node, SingleThreadedExecutor]) -> None:
    experimental = pytest.importorskip("rclpy.experimental")
    context = Context()
    rclpy.init(context=context, domain_id=ros[0].context.get_domain_id())
    node, executor = Node("events", context=context), experimental.EventsExecutor(context=context)
    executor.add_node(node)
    line = Line(node, executor, "/events")
    sent = []
    for seed in range(3):
        sent.append(line.send(seed, (8, 8)))
        line.until(lambda: len(line.got) == len(sent))
    assert [bytes(got) for got in line.got] == sent
    line.close()
    executor.shutdown()
    node.destroy_node()
    context.try_shutdown()


INTERRUPTED = """
import os, signal, sys, threading, time
import numpy as np, rclpy
from rclpy.node import Node
from rclpy.qos import QoSProfile
from sensor_msgs.msg import Image
from sparserefine_ros.node import serialized
class Interrupted(Exception):
    pass
def interrupt(*_):
    raise Interrupted
rclpy.init(domain_id=int(sys.argv[1]))
node = Node("interrupted")
publisher = node.create_publisher(Image, "t", 5)
kind = serialized.message_type(Image) if sys.argv[2] == "1" else Image
subscription = node.create_subscription(kind, "t", lambda message: None, 5, raw=True)
while not publisher.get_subscription_count():
    time.sleep(0.01)
message = b"\\0\\1\\0\\0" + np.random.default_rng(0).integers(0, 256, 6 << 20, np.uint8).tobytes()
signal.signal(signal.SIGUSR1, interrupt)
main, whole, interrupted, missing = threading.main_thread().ident, 0, 0, serialized.Missing()
for i in range(100):
    serialized.publish(publisher, message)
    kick = threading.Timer(1e-4 * (i % 20), signal.pthread_kill, (main, signal.SIGUSR1))
    try:
        kick.start()
        while not (got := serialized.take(subscription, serialized.RCL, missing)):
            pass
        assert got == [message]
        whole += 1
        kick.join()
    except Interrupted:
        interrupted += 1
while serialized.take(subscription, serialized.RCL, missing):  # those whose wait was interrupted
    pass
serialized.publish(publisher, message)
while not (got := serialized.take(subscription, serialized.RCL, missing)):
    pass
print(got == [message], whole + interrupted >= 100, interrupted > 0)
"""


@DIRECT
@pytest.mark.parametrize("copies", [pytest.param(1, marks=SINGLE), 2])
def test_ctrl_c_during_a_take_leaves_the_memory_whole(ros: tuple[Node, SingleThreadedExecutor], copies: int) -> None:
    """A signal whose handler raises, at any moment of a take: an exception in Python, not a crash in C."""
    run = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(ros[0].context.get_domain_id()), str(copies)],
        capture_output=True, text=True, timeout=60, env=os.environ,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["True"] * 3


WITHOUT_RCLPY = """
import sys
from unittest.mock import MagicMock
for name in ("callback_groups", "executors", "impl.implementation_singleton", "node", "subscription", "waitable"):
    sys.modules["rclpy." + name] = MagicMock()
from sparserefine_ros.node import serialized
print(serialized.RCL)
"""


@DIRECT
def test_a_library_that_rclpy_has_not_loaded_is_not_called() -> None:
    """Another ROS that is sourced beside an rclpy whose libraries have names of their own."""
    mapped = {Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    folders = {str(path.parent) for path in mapped if ".so" in path.name}
    environment = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(folders)}
    found = [sys.executable, "-c", "import ctypes; ctypes.CDLL('librcl.so')"]
    subprocess.run(found, env=environment, check=True)
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_RCLPY], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "None"
