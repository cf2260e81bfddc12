"""What DDS refuses costs itself and nothing else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy")

from rclpy.qos import QoSProfile  # noqa: E402
from sensor_msgs.msg import Image  # noqa: E402
from std_msgs.msg import Header  # noqa: E402

from sparserefine_ros.datasets.classes import CITYSCAPES  # noqa: E402
from sparserefine_ros.errors import FrameError  # noqa: E402
from sparserefine_ros.node import serialized  # noqa: E402
from sparserefine_ros.node.cdr import read_message  # noqa: E402
from sparserefine_ros.node.outputs import Outputs  # noqa: E402
from sparserefine_ros.node.refusal import Refusal, offer  # noqa: E402


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serialized, "RCL", None)  # it wants publishers that exist


class Publisher:
    """Takes messages, or refuses them as rclpy does."""

    def __init__(self, topic: str, qos: QoSProfile) -> None:
        self.topic_name, self.qos_profile = f"/{topic}", qos
        self.taken: list[Any] = []
        self.error: Exception | None = None

    def get_subscription_count(self) -> int:
        return 1

    def publish(self, message: Any) -> None:
        if self.error:
            raise self.error
        self.taken.append(message)


def outputs(refusing: str) -> tuple[Outputs, dict[str, Publisher]]:
    made: dict[str, Publisher] = {}

    def publisher(kind: type, topic: str, qos: QoSProfile) -> Publisher:
        made[topic] = Publisher(topic, qos)
        made[topic].error = Refusal("cannot publish data") if topic == refusing else None
        return made[topic]

    logger = SimpleNamespace(info=lambda *_, **__: None)
    qos: Any = SimpleNamespace(node=SimpleNamespace(get_logger=lambda: logger), publisher=publisher)
    return Outputs(qos, CITYSCAPES, superpixels=False), made


TOPICS = ("mask", "confidence", "entropy", "color", "overlay", "mask/compressed")


@pytest.mark.parametrize("refusing", TOPICS)
def test_what_is_refused_costs_no_other_topic(refusing: str) -> None:
    result: Any = SimpleNamespace(
        mask=np.full((4, 6), 13, np.uint8),
        confidence=np.full((4, 6), 200, np.uint8),
        entropy=np.ones((4, 6), np.float32),
    )
    its, made = outputs(f"segmentation/{refusing}")
    for _ in range(2):  # the second frame is not blamed for the first
        with pytest.raises(FrameError) as caught:
            its.publish(Header(), np.zeros((4, 6, 3), np.uint8), result, 0.5)
        assert str(caught.value).count(f"/segmentation/{refusing}") == 1
    for topic in TOPICS:
        assert len(made[f"segmentation/{topic}"].taken) == (0 if topic == refusing else 2), topic
    if refusing != "confidence":
        assert set(bytes(read_message(made["segmentation/confidence"].taken[0], Image).data)) == {200}


@pytest.mark.parametrize("refusing", ["label_info_json", "timing"])
def test_labels_and_timings_may_be_refused(refusing: str) -> None:
    its, made = outputs(f"segmentation/{refusing}")
    report: Any = SimpleNamespace(key_values=lambda: {"density": "0.1"})
    its.publish_labels(Header().stamp)
    its.publish_timing(Header(), report, "model")
    assert not made[f"segmentation/{refusing}"].taken
    assert all(len(made[f"segmentation/{t}"].taken) == 1 for t in {"label_info_json", "timing"} - {refusing})


def test_only_a_refusal_is_forgiven() -> None:
    publisher = Publisher("mask", QoSProfile(depth=1))
    assert offer(publisher, "message") and publisher.taken == ["message"]
    publisher.error = Refusal("cannot publish data")
    assert not offer(publisher, "message")
    publisher.error = TypeError("no message")
    with pytest.raises(TypeError):
        offer(publisher, "message")
