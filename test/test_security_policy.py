"""config/sros2/policy.xml allows what the live node does, and nothing that it never does."""

from __future__ import annotations

import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator

import pytest
from conftest import write_decoder_bundle

pytest.importorskip("rclpy")

import rclpy  # noqa: E402
from rclpy.context import Context  # noqa: E402
from rclpy.parameter import Parameter  # noqa: E402
from ros_client import isolated  # noqa: E402

from sparserefine_ros.node.segment_node import SegmentNode  # noqa: E402
from sparserefine_ros.node.transport import config_file  # noqa: E402

# Allowed, but not there in every node: what it depends on.
SOMETIMES = {
    "rt/segmentation/label_info": "vision_msgs",
    "rq/segment/get_type_descriptionRequest": "jazzy",
    "rr/segment/get_type_descriptionReply": "jazzy",
}


def allowed(kind: str) -> set[str]:
    """Names of DDS topics that the policy lets its one node publish or subscribe, as sros2 derives them."""
    root = ElementTree.parse(config_file("sros2/policy.xml")).getroot()
    assert root.get("version") == "0.2.0"
    [profile] = root.findall("enclaves/enclave/profiles/profile")
    namespace, node = profile.get("ns"), profile.get("node")
    assert namespace == "/"
    names = set()
    for rules in profile:
        wanted = {"topics": {"publish", "subscribe"}, "services": {"reply"}}[rules.tag]
        assert rules.attrib and set(rules.attrib) <= wanted and set(rules.attrib.values()) == {"ALLOW"}
        for element in rules:
            assert element.tag == rules.tag[:-1] and element.text
            assert "*" not in element.text and "?" not in element.text, "no wildcards"
            name = element.text.replace("~", f"/{node}") if element.text.startswith("~") else element.text
            name = name if name.startswith("/") else f"/{name}"
            if rules.tag == "services":
                names.add(f"rr{name}Reply" if kind == "publish" else f"rq{name}Request")
            elif kind in rules.attrib:
                names.add(f"rt{name}")
    return names


def used(node: SegmentNode) -> dict[str, set[str]]:
    """Names of DDS topics that the node publishes and subscribes."""
    me = node.get_name(), node.get_namespace()
    services = [name for name, _ in node.get_service_names_and_types_by_node(*me)]
    assert node.get_client_names_and_types_by_node(*me) == []  # it calls nobody
    topics = {
        "publish": node.get_publisher_names_and_types_by_node(*me),
        "subscribe": node.get_subscriber_names_and_types_by_node(*me),
    }
    names = {kind: {f"rt{name}" for name, _ in found} for kind, found in topics.items()}
    names["publish"] |= {f"rr{name}Reply" for name in services}
    names["subscribe"] |= {f"rq{name}Request" for name in services}
    return names


def settled(node: SegmentNode) -> dict[str, set[str]]:
    """`used`, once it has the images and two looks agree: the middleware tells a node of its own topics late."""
    deadline, before = time.monotonic() + 10, used(node)
    images = {f"rt{camera.image_topic}" for camera in node.cameras}
    while time.monotonic() < deadline:
        time.sleep(0.3)
        now = used(node)
        if now == before and images <= now["subscribe"]:
            return now
        before = now
    raise AssertionError(f"the graph does not settle: {before}")


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, set[str]]]]:
    """What nodes of two configurations use; together they have everything that parameters can bring."""
    found = {}
    folder = tmp_path_factory.mktemp("policy")
    choices = {
        "raw": {"model": write_decoder_bundle(folder / "offseg", "offseg")},
        "compressed": {
            "model": write_decoder_bundle(folder / "superpixel", "superpixel"),
            "image_transport": "compressed",
            "use_sim_time": True,
        },
    }
    for name, values in choices.items():
        with isolated(folder) as domain:
            context = Context()
            rclpy.init(context=context, domain_id=domain)
            values = {"device": "cpu", **{k: v if isinstance(v, bool) else str(v) for k, v in values.items()}}
            node = SegmentNode(
                context=context, parameter_overrides=[Parameter(key, value=value) for key, value in values.items()]
            )
            try:
                node.start()
                found[name] = settled(node)
            finally:
                node.destroy_node()
                context.try_shutdown()
    yield found


@pytest.mark.parametrize("kind", ["publish", "subscribe"])
def test_the_policy_is_what_the_node_does(graphs: dict[str, dict[str, set[str]]], kind: str) -> None:
    rules = allowed(kind)
    for name, graph in graphs.items():
        assert graph[kind] - rules == set(), f"{name}: add to config/sros2/policy.xml"
    unused = rules - set().union(*(graph[kind] for graph in graphs.values()))
    assert unused - set(SOMETIMES) == set(), "no node does this: take it out of config/sros2/policy.xml"


def test_the_test_sees_what_matters(graphs: dict[str, dict[str, set[str]]]) -> None:
    assert {"rt/image", "rq/segment/set_parametersRequest"} <= graphs["raw"]["subscribe"]
    assert {"rt/image/compressed", "rt/clock"} <= graphs["compressed"]["subscribe"]
    assert {"rt/segmentation/mask", "rr/segment/set_parametersReply"} <= graphs["raw"]["publish"]
    assert "rt/segmentation/superpixels" in graphs["compressed"]["publish"]
