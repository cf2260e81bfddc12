"""QoS over real DDS: overrides take effect, and whoever is left out is named with the remedy."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rclpy")

import rclpy  # noqa: E402
from rclpy.context import Context  # noqa: E402
from rclpy.executors import SingleThreadedExecutor  # noqa: E402
from rclpy.node import Node  # noqa: E402
from rclpy.parameter import Parameter  # noqa: E402
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy  # noqa: E402
from rclpy.serialization import deserialize_message  # noqa: E402
from rclpy.subscription import Subscription  # noqa: E402
from ros_client import isolated  # noqa: E402
from sensor_msgs.msg import Image  # noqa: E402

from sparserefine_ros.errors import ParameterError  # noqa: E402
from sparserefine_ros.node import qos  # noqa: E402
from sparserefine_ros.node.qos import QosWatch  # noqa: E402

RELIABLE = QoSProfile(depth=5, reliability=ReliabilityPolicy.RELIABLE)
BEST_EFFORT = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)
LATCHED = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)


class Wire:
    """Nodes on one domain, spun by hand."""

    def __init__(self, domain: int) -> None:
        self.context = Context()
        rclpy.init(context=self.context, domain_id=domain)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.nodes: list[Node] = []

    def node(self, name: str, **overrides: Any) -> Node:
        parameters = [Parameter(key, value=value) for key, value in overrides.items()]
        self.nodes.append(Node(name, context=self.context, parameter_overrides=parameters))
        self.executor.add_node(self.nodes[-1])
        return self.nodes[-1]

    def until(self, done: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + 15
        while not done():
            assert time.monotonic() < deadline, f"waited 15 s for {what}"
            self.executor.spin_once(timeout_sec=0.02)

    def close(self) -> None:
        self.executor.shutdown()
        for node in self.nodes:
            node.destroy_node()
        self.context.try_shutdown()


@pytest.fixture(scope="module")
def wire(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wire]:
    with isolated(tmp_path_factory.mktemp("log")) as domain:
        made = Wire(domain)
        yield made
        made.close()


@pytest.mark.parametrize("distribution", ["kilted", "humble"])
def test_a_publisher_that_offers_too_little_is_named_until_it_goes(
    wire: Wire, distribution: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if distribution == "humble" and hasattr(Subscription, "get_publisher_count"):
        monkeypatch.delattr(Subscription, "get_publisher_count")
    ours, theirs = wire.node(f"ours_{distribution}"), wire.node(f"camera_{distribution}")
    watch, got = QosWatch(ours), []
    watch.subscription(Image, "/front/image", got.append, RELIABLE)
    assert watch.complaints() == []
    theirs.create_publisher(Image, "/front/image", RELIABLE)  # this one is no trouble
    publisher = theirs.create_publisher(Image, "/front/image", BEST_EFFORT)
    wire.until(watch.complaints, "the mismatch")
    (text,) = watch.complaints()
    for words in ("/front/image", "offers less reliability", "qos_overrides./front/image.subscription.reliability"):
        assert words in text
    assert "to best_effort" in text
    theirs.destroy_publisher(publisher)
    wire.until(lambda: not watch.complaints(), "the mismatch to go with its publisher")


def test_it_loads_where_rclpy_has_its_events_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in humble: rclpy.qos_event in place of rclpy.event_handler."""
    import rclpy.event_handler as events

    monkeypatch.setitem(sys.modules, "rclpy.qos_event", events)
    monkeypatch.setitem(sys.modules, "rclpy.event_handler", None)
    spec = importlib.util.spec_from_file_location("qos_of_humble", qos.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "qos_of_humble", module)  # where its dataclass looks
    spec.loader.exec_module(module)
    assert module.PublisherEventCallbacks is events.PublisherEventCallbacks


def test_a_subscriber_that_asks_too_much_is_named(wire: Wire) -> None:
    ours, theirs = wire.node("ours2"), wire.node("viewer")
    watch = QosWatch(ours)
    endpoint = watch.publisher(Image, "mask", RELIABLE)
    theirs.create_subscription(Image, "/mask", lambda message: None, LATCHED)
    wire.until(watch.complaints, "the mismatch")
    (text,) = watch.complaints()
    assert "asks for more durability" in text
    assert "qos_overrides./mask.publisher.durability to transient_local" in text
    watch.forget(endpoint)
    assert watch.complaints() == []


def test_overrides_take_effect_for_one_topic_alone(wire: Wire) -> None:
    overrides = {
        "qos_overrides./a/mask.publisher.durability": "transient_local",
        "qos_overrides./a/mask.publisher.depth": 1,
        "qos_overrides./a/image.subscription.reliability": "best_effort",
    }
    ours, theirs = wire.node("ours3", **overrides), wire.node("driver")
    watch, got, latched = QosWatch(ours), [], []
    first, other = (watch.publisher(Image, topic, RELIABLE) for topic in ("/a/mask", "/b/mask"))
    watch.subscription(Image, "/a/image", got.append, RELIABLE)
    found = {topic: ours.get_publishers_info_by_topic(topic)[0].qos_profile for topic in ("/a/mask", "/b/mask")}
    assert found["/a/mask"].durability == DurabilityPolicy.TRANSIENT_LOCAL
    assert found["/b/mask"].durability == DurabilityPolicy.VOLATILE
    assert RELIABLE.durability != DurabilityPolicy.TRANSIENT_LOCAL, "rclpy writes into the profile that it is given"
    # A late subscriber that insists on latched masks gets the last one; a best-effort camera reaches the node.
    first.publish(Image(width=7))
    theirs.create_subscription(Image, "/a/mask", latched.append, LATCHED)
    camera = theirs.create_publisher(Image, "/a/image", BEST_EFFORT)
    wire.until(lambda: latched, "the latched mask")
    assert latched[0].width == 7
    wire.until(lambda: camera.get_subscription_count() == 1, "the subscription")

    def arrived() -> bool:
        camera.publish(Image(width=8))
        return bool(got)

    wire.until(arrived, "an image")
    assert deserialize_message(bytes(got[0]), Image) == Image(width=8)
    assert watch.complaints() == []
    assert other.get_subscription_count() == 0


def test_a_topic_made_again_has_the_qos_asked_for_now(wire: Wire) -> None:
    """As after cleanup, with another qos_reliability and qos_depth; what is overridden stays."""
    ours = wire.node("again", **{"qos_overrides./again/image.subscription.depth": 3})
    watch = QosWatch(ours)
    for asked in (BEST_EFFORT, RELIABLE):
        subscription = watch.subscription(Image, "/again/image", lambda data: None, asked)
        (info,) = ours.get_subscriptions_info_by_topic("/again/image")
        assert info.qos_profile.reliability == asked.reliability and subscription.qos_profile.depth == 3
        watch.forget(subscription)
        ours.destroy_subscription(subscription)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("reliability", "sure", ["sure", "best_effort or reliable"]), ("depth", "many", ["depth", "a number"])],
)
def test_overrides_that_are_no_qos_are_refused(wire: Wire, name: str, value: str, words: list[str]) -> None:
    node = wire.node(f"refused_{name}", **{f"qos_overrides./image.subscription.{name}": value})
    with pytest.raises(ParameterError) as raised:
        QosWatch(node).subscription(Image, "image", lambda data: None, BEST_EFFORT)
    for word in (*words, "qos_overrides./image."):
        assert word in str(raised.value)


def test_overrides_are_read_from_a_parameter_file(wire: Wire, tmp_path: Path) -> None:
    """As launch's params_file hands them over; any node, any topic in full."""
    file = tmp_path / "params.yaml"
    file.write_text(
        "/**:\n  ros__parameters:\n    qos_overrides:\n      /image:\n        subscription:\n"
        "          reliability: reliable\n          depth: 3\n"
    )
    node = Node("from_file", context=wire.context, cli_args=["--ros-args", "--params-file", str(file)])
    wire.nodes.append(node)
    QosWatch(node).subscription(Image, "image", lambda data: None, BEST_EFFORT)
    (info,) = (i for i in node.get_subscriptions_info_by_topic("/image") if i.node_name == "from_file")
    assert info.qos_profile.reliability == ReliabilityPolicy.RELIABLE
    assert node.get_parameter("qos_overrides./image.subscription.depth").value == 3


def test_the_example_is_a_parameter_file_that_works(wire: Wire) -> None:
    file = Path(__file__).resolve().parents[1] / "config" / "qos_overrides.yaml"
    node = Node("example", context=wire.context, cli_args=["--ros-args", "--params-file", str(file)])
    wire.nodes.append(node)
    watch = QosWatch(node)
    watch.publisher(Image, "segmentation/mask", RELIABLE)
    watch.publisher(Image, "segmentation/overlay", RELIABLE)
    found = {
        topic: next(i for i in node.get_publishers_info_by_topic(topic) if i.node_name == "example").qos_profile
        for topic in ("/segmentation/mask", "/segmentation/overlay")
    }
    assert found["/segmentation/mask"].durability == DurabilityPolicy.TRANSIENT_LOCAL
    assert found["/segmentation/overlay"].reliability == ReliabilityPolicy.BEST_EFFORT
