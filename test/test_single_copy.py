"""Types of ours, whose messages are copied once: the very bytes, whatever they are; all others are as they were."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("rclpy")

from builtin_interfaces.msg import Time  # noqa: E402
from rclpy.executors import SingleThreadedExecutor  # noqa: E402
from rclpy.node import Node  # noqa: E402
from rclpy.qos import QoSProfile, ReliabilityPolicy  # noqa: E402
from rclpy.serialization import deserialize_message  # noqa: E402
from ros_client import isolated_node  # noqa: E402
from sensor_msgs.msg import CompressedImage, Image  # noqa: E402
from std_msgs.msg import Header  # noqa: E402
from std_srvs.srv import SetBool  # noqa: E402

from sparserefine_ros.evaluation.bag_messages import image_message  # noqa: E402
from sparserefine_ros.native import NativeError  # noqa: E402
from sparserefine_ros.node import serialized, single_copy  # noqa: E402
from sparserefine_ros.node.cdr import image_parts  # noqa: E402
from sparserefine_ros.node.qos import QosWatch  # noqa: E402
from sparserefine_ros.node.serialized import publish  # noqa: E402

pytestmark = pytest.mark.skipif(single_copy.single_copy() is None, reason="messages are copied twice here")
RELIABLE = QoSProfile(depth=20, reliability=ReliabilityPolicy.RELIABLE)
GOOD = image_message(np.arange(24, dtype=np.uint8).reshape(2, 4, 3), "rgb8", 5, "camera")
UNREADABLE = b"\xff" * 100  # no encapsulation that there is


@pytest.fixture(scope="module")
def ros(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, SingleThreadedExecutor]]:
    with isolated_node("single_copy", tmp_path_factory.mktemp("log")) as made:
        yield made


def until(executor: SingleThreadedExecutor, done: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 15
    while not done():
        assert time.monotonic() < deadline
        executor.spin_once(timeout_sec=0.02)


class Deserializer:
    """The middleware's, of our Image, without a wire."""

    def __init__(self) -> None:
        own = single_copy.single_copy()
        assert own is not None and serialized.RCL is not None
        self.rcl = serialized.RCL
        api = ctypes.PyDLL(None)
        api.PyCapsule_GetName.restype = api.PyCapsule_GetPointer.restype = ctypes.c_void_p
        api.PyCapsule_GetName.argtypes = [ctypes.py_object]
        api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_void_p]
        capsule = own.message_type(Image)._TYPE_SUPPORT
        self.support = ctypes.c_void_p(api.PyCapsule_GetPointer(capsule, api.PyCapsule_GetName(capsule)))
        self.call = single_copy._loaded("librcl.so").rmw_deserialize  # it depends on rmw

    def __call__(self, data: bytes) -> bytes | None:
        given = np.frombuffer(data, np.uint8)
        array = serialized._Array(given.ctypes.data, len(data), len(data), self.rcl.allocator)
        message = single_copy._Message(None, 0, self.rcl.allocator.reallocate, None)
        code = self.call(ctypes.byref(array), self.support, ctypes.byref(message))
        if code:
            self.rcl.forget_error()
            return None
        got = ctypes.string_at(message.data, message.length)
        self.rcl.free(message.data, None)
        return got


@pytest.fixture(scope="module")
def deserialize() -> Deserializer:
    return Deserializer()


@settings(max_examples=2000, deadline=None)
@given(st.one_of(st.binary(), st.builds(lambda head, rest: b"\0" + head + rest, st.binary(max_size=4), st.binary())))
@example(b"\0\1\0\3")  # padding claimed where nothing is left
@example(b"\0\1\0\3abcd")
@example(b"\0\7\0\2abcd")
@example(bytes(GOOD))
def test_any_bytes_come_as_they_are_but_for_the_padding_they_claim(deserialize: Deserializer, data: bytes) -> None:
    got = deserialize(data)
    readable = len(data) >= 4 and data[0] == 0 and data[1] in (0, 1, 2, 3, 6, 7, 8, 9, 10, 11)
    if got is None:
        assert not readable
        return
    padding = data[3] & 3 if len(data) % 4 == 0 else 0  # which Fast CDR leaves out since kilted
    assert readable and got in (data, data[: max(4, len(data) - padding)])


def test_any_length(deserialize: Deserializer) -> None:
    for size in [*range(300), 2**16 - 1, 2**16, 6_291_508]:
        data = b"\0\1\0\0" + np.random.default_rng(size).bytes(size)
        assert deserialize(data) == data


def test_what_the_middleware_cannot_read_is_told_and_costs_itself_alone(
    ros: tuple[Node, SingleThreadedExecutor],
) -> None:
    """An empty message in its place, which no image is; where several stand together, one for all of them."""
    node, executor = ros
    watch, got = QosWatch(node), []
    publisher = node.create_publisher(Image, "unreadable", RELIABLE)
    subscription = watch.subscription(Image, "unreadable", lambda message: got.append(bytes(message)), RELIABLE)
    assert subscription.msg_type is not Image
    until(executor, publisher.get_subscription_count)
    for sent, expected in (("bg", "bg"), ("gb", "gb"), ("bgbg", "bgbg"), ("gbbg", "gbg")):
        got.clear()
        for kind in sent:
            serialized.publish(publisher, GOOD if kind == "g" else UNREADABLE)
        time.sleep(0.2)  # all there before the first is taken
        until(executor, lambda: len(got) >= len(expected))  # noqa: B023
        for _ in range(3):
            executor.spin_once(timeout_sec=0.02)
        assert got == [GOOD if kind == "g" else b"" for kind in expected]
    watch.forget(subscription)
    node.destroy_subscription(subscription)
    node.destroy_publisher(publisher)


@pytest.mark.parametrize("ours_first", [True, False])
def test_others_of_the_same_type_in_one_node_are_as_they_were(
    ros: tuple[Node, SingleThreadedExecutor], ours_first: bool
) -> None:
    """The middleware keeps one type for all: a publisher of messages, a subscription that reads them."""
    node, executor = ros
    topic, watch = f"beside_{int(ours_first)}", QosWatch(node)
    raw: list[bytes] = []
    read: list[Image] = []
    ends: list[Any] = []

    def ours() -> None:
        ends.append(watch.subscription(Image, topic, lambda message: raw.append(bytes(message)), RELIABLE))

    if ours_first:
        ours()
    publisher = node.create_publisher(Image, topic, RELIABLE)
    theirs = node.create_subscription(Image, topic, read.append, RELIABLE)
    if not ours_first:
        ours()
    until(executor, lambda: publisher.get_subscription_count() == 2)
    message = Image(height=3, width=5, encoding="mono8", step=5, data=bytes(range(15)))
    message.header.frame_id = "camera"
    publisher.publish(message)
    until(executor, lambda: raw and read)
    assert read == [message] and [deserialize_message(data, Image) for data in raw] == [message]
    watch.forget(ends[0])
    node.destroy_subscription(ends[0])
    node.destroy_subscription(theirs)
    node.destroy_publisher(publisher)


@pytest.mark.parametrize("ours", [True, False])
def test_images_published_in_parts_arrive_whole(
    ros: tuple[Node, SingleThreadedExecutor], monkeypatch: pytest.MonkeyPatch, ours: bool
) -> None:
    """To subscribers that read them and to those that take bytes; without our type in one piece."""
    node, executor = ros
    kind, topic = serialized.message_type(Image) if ours else Image, f"parts_{int(ours)}"
    publisher = node.create_publisher(kind, topic, RELIABLE)
    whole: list[Any] = []
    monkeypatch.setattr(serialized, "publish", lambda *arguments: whole.append(publish(*arguments)))
    read: list[Image] = []
    raw: list[bytes] = []
    ends = [
        node.create_subscription(Image, topic, read.append, RELIABLE),
        node.create_subscription(Image, topic, raw.append, RELIABLE, raw=True),
    ]
    until(executor, lambda: publisher.get_subscription_count() == 2)
    rng = np.random.default_rng(0)
    for size, encoding in (((1, 1), "mono8"), ((3, 5, 3), "rgb8"), ((1024, 2048), "mono8"), ((7, 2), "32FC1")):
        pixels = rng.random(size, np.float32) if encoding == "32FC1" else rng.integers(0, 256, size, np.uint8)
        head, body = image_parts(Header(stamp=Time(sec=3, nanosec=7), frame_id="camera"), pixels, encoding)
        assert body is pixels
        serialized.publish_parts(publisher, head, body)
        until(executor, lambda: read and raw)
        message, data = read.pop(), raw.pop()
        assert (message.header.stamp.nanosec, message.header.frame_id) == (7, "camera")
        assert (message.height, message.width, message.encoding) == (*size[:2], encoding)
        assert message.step == pixels.nbytes // size[0] and bytes(message.data) == pixels.tobytes()
        assert data == head + pixels.tobytes()
    assert bool(whole) != ours
    for end in ends:
        node.destroy_subscription(end)
    node.destroy_publisher(publisher)


def test_the_graph_shows_the_type_that_it_is(ros: tuple[Node, SingleThreadedExecutor]) -> None:
    """Name and hash: others match by them."""
    node, executor = ros
    made = [node.create_publisher(kind, "graph", RELIABLE) for kind in (Image, serialized.message_type(Image))]
    until(executor, lambda: node.count_publishers("graph") == 2)
    theirs, ours = node.get_publishers_info_by_topic("graph")
    assert theirs.topic_type == ours.topic_type == "sensor_msgs/msg/Image"
    if hasattr(theirs, "topic_type_hash"):  # not in humble
        assert str(theirs.topic_type_hash) == str(ours.topic_type_hash)
        assert str(ours.topic_type_hash).startswith("RIHS01_")
    for publisher in made:
        node.destroy_publisher(publisher)


def test_rclpy_publishes_no_object_of_our_types(ros: tuple[Node, SingleThreadedExecutor]) -> None:
    """It would be read as the two parts."""
    publisher = ros[0].create_publisher(serialized.message_type(Image), "object", RELIABLE)
    with pytest.raises(TypeError):
        publisher.publish(Image())
    with pytest.raises(TypeError):
        serialized.message_type(Image)()
    ros[0].destroy_publisher(publisher)


def test_compressed_images_too(ros: tuple[Node, SingleThreadedExecutor]) -> None:
    node, executor = ros
    watch, got = QosWatch(node), []
    publisher = node.create_publisher(CompressedImage, "compressed", RELIABLE)
    subscription = watch.subscription(CompressedImage, "compressed", lambda m: got.append(bytes(m)), RELIABLE)
    assert subscription.msg_type is not CompressedImage and subscription.msg_type.__name__ == "CompressedImage"
    until(executor, publisher.get_subscription_count)
    message = CompressedImage(format="jpeg", data=bytes(range(200)))
    publisher.publish(message)
    until(executor, lambda: got)
    assert [deserialize_message(data, CompressedImage) for data in got] == [message]
    watch.forget(subscription)
    node.destroy_subscription(subscription)
    node.destroy_publisher(publisher)


def test_a_type_is_made_once() -> None:
    own = single_copy.single_copy()
    assert own is not None
    assert own.message_type(Image) is own.message_type(Image) is not own.message_type(CompressedImage)
    assert own.has(own.message_type(Image)) and not own.has(Image)


def test_where_something_is_not_as_expected_messages_are_copied_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    own = single_copy.single_copy()
    assert own is not None
    with pytest.raises(AttributeError, match="Request has no rosidl_typesupport_fastrtps_c as known here"):
        own.message_type(SetBool.Request)  # std_srvs::srv, not ::msg
    assert serialized.message_type(SetBool.Request) is SetBool.Request

    def without(name: str, value: Any) -> Any:
        single_copy.single_copy.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(single_copy, name, value)
            return serialized.message_type(Image)

    def no_compiler(source: Any) -> Any:
        raise NativeError("no C compiler")

    try:
        assert without("MIDDLEWARE", "rmw_cyclonedds_cpp") is Image
        assert without("STARTS", {"libfastcdr.so.9": "start"}) is Image
        assert without("JUMP", "leap") is Image
        assert without("load", no_compiler) is Image
        assert without("TYPE_SUPPORT", b"rosidl_typesupport_unheard_of") is Image
    finally:
        single_copy.single_copy.cache_clear()
    assert serialized.message_type(Image) is not Image
