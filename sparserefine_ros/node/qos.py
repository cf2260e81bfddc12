"""Publishers and subscriptions whose QoS may be overridden by parameters, and which say so when QoS does not match.

A parameter ``qos_overrides./segmentation/mask.publisher.reliability: best_effort`` (or ``.subscription.`` for the image
topic; history, depth, reliability, durability) takes the place of what the node asks for; topics are written in full,
as remapped. DDS connects nobody whose QoS is incompatible and tells only those who ask: here each such event is
logged with its remedy, and stands in the diagnostics for as long as an endpoint stays unconnected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rclpy.exceptions import ParameterException
from rclpy.node import Node
from rclpy.qos import (
    QoSCompatibility,
    QoSPolicyKind,
    QoSProfile,
    qos_check_compatible,
    qos_policy_name_from_kind,
)
from rclpy.qos_overriding_options import InvalidQosOverridesError, QoSOverridingOptions

from sparserefine_ros.errors import ParameterError
from sparserefine_ros.node.declare import overrides
from sparserefine_ros.node.serialized import ByHand, Feed, for_executor, message_type

try:
    from rclpy.event_handler import PublisherEventCallbacks, SubscriptionEventCallbacks
except ImportError:  # humble
    from rclpy.qos_event import PublisherEventCallbacks, SubscriptionEventCallbacks

POLICIES = (QoSPolicyKind.HISTORY, QoSPolicyKind.DEPTH, QoSPolicyKind.RELIABILITY, QoSPolicyKind.DURABILITY)
WEAKER = {"reliability": "best_effort", "durability": "volatile"}
STRONGER = {"reliability": "reliable", "durability": "transient_local"}


@dataclass(frozen=True)
class Mismatch:
    """An event of incompatible QoS. `unconnected` tells whether an endpoint is still left out."""

    text: str
    unconnected: Callable[[], bool]


class QosWatch:
    """Makes a node's publishers and subscriptions, and remembers whom their QoS left out."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._mismatches: dict[Any, Mismatch] = {}
        self._feeds: dict[Any, Feed] = {}

    def publisher(self, kind: type, topic: str, qos: QoSProfile) -> Any:
        """A publisher. Raises ParameterError for an override that is no QoS."""

        def incompatible(event: Any) -> None:
            policy = _policy(event)
            self._note(
                publisher,
                f"incompatible QoS on {publisher.topic_name}: a subscriber asks for more {policy} than is offered and "
                f"gets nothing; {_override(publisher.topic_name, 'publisher', policy, STRONGER, 'the subscriber')}",
                lambda: self.node.count_subscribers(publisher.topic_name) > publisher.get_subscription_count(),
            )

        publisher = self._made(
            lambda options: self.node.create_publisher(
                kind,
                topic,
                _copy(qos),
                event_callbacks=PublisherEventCallbacks(incompatible_qos=incompatible),
                qos_overriding_options=options,
            ),
            topic,
            "publisher",
        )
        return publisher

    def subscription(self, kind: type, topic: str, callback: Callable[[memoryview], None], qos: QoSProfile) -> Any:
        """A subscription that gets messages serialized. Raises ParameterError for an override that is no QoS."""

        def incompatible(event: Any) -> None:
            policy = _policy(event)
            self._note(
                subscription,
                f"incompatible QoS on {subscription.topic_name}: a publisher offers less {policy} than is asked for, "
                "and none of its messages arrives; "
                f"{_override(subscription.topic_name, 'subscription', policy, WEAKER, 'the publisher')}",
                lambda: self.node.count_publishers(subscription.topic_name) > _connected(self.node, subscription),
            )

        rcl = for_executor(self.node.executor)
        subscription = self._made(
            lambda options: self.node.create_subscription(
                message_type(kind) if rcl else kind,
                topic,
                lambda message: callback(memoryview(message)),
                _copy(qos),
                callback_group=ByHand() if rcl else None,
                event_callbacks=SubscriptionEventCallbacks(incompatible_qos=incompatible),
                qos_overriding_options=options,
                raw=True,
            ),
            topic,
            "subscription",
        )
        if rcl:
            self._feeds[subscription] = Feed(self.node, subscription, callback, rcl)
        return subscription

    def lost(self, subscription: Any) -> int | None:
        """Messages that its publishers sent meanwhile and that never came; None where that is not known."""
        feed = self._feeds.get(subscription)
        return None if feed is None else feed.missing.count

    def forget(self, endpoint: Any) -> None:
        """For a publisher or subscription that is about to be destroyed."""
        self._mismatches.pop(endpoint, None)
        if feed := self._feeds.pop(endpoint, None):
            feed.destroy()

    def complaints(self) -> list[str]:
        """What is wrong now, with its remedy."""
        return [mismatch.text for mismatch in self._mismatches.values() if mismatch.unconnected()]

    def _note(self, endpoint: Any, text: str, unconnected: Callable[[], bool]) -> None:
        self._mismatches[endpoint] = Mismatch(text, unconnected)
        self.node.get_logger().warning(text)

    def _made(self, make: Callable[[QoSOverridingOptions], Any], topic: str, role: str) -> Any:
        name = f"qos_overrides.{self.node.resolve_topic_name(topic)}.{role}."
        # rclpy declares a parameter for each policy it is told of, for good: those that nobody has set would bring the
        # first subscription's QoS back into one made with another qos_depth.
        given = [policy for policy in POLICIES if name + policy.name.lower() in overrides(self.node)]
        try:
            return make(QoSOverridingOptions(given))
        except (ParameterException, InvalidQosOverridesError, RuntimeError, TypeError, ValueError) as error:
            if not given:
                raise
            raise ParameterError(
                f"{error}; correct the parameters {name}*: history is keep_last or keep_all, depth a number, "
                "reliability best_effort or reliable, durability volatile or transient_local"
            ) from error


def _copy(qos: QoSProfile) -> QoSProfile:
    """rclpy writes overrides into the profile that it is given."""
    return QoSProfile(history=qos.history, depth=qos.depth, reliability=qos.reliability, durability=qos.durability)


def _connected(node: Node, subscription: Any) -> int:
    """Publishers that the subscription gets messages of."""
    if hasattr(subscription, "get_publisher_count"):  # not in humble
        return int(subscription.get_publisher_count())
    offered = [info.qos_profile for info in node.get_publishers_info_by_topic(subscription.topic_name)]
    asked = subscription.qos_profile
    return sum(qos_check_compatible(qos, asked)[0] != QoSCompatibility.ERROR for qos in offered)


def _policy(event: Any) -> str:
    name: str = qos_policy_name_from_kind(event.last_policy_kind)
    return name.lower().removesuffix("_qos_policy").removeprefix("rmw_qos_policy_")


def _override(topic: str, role: str, policy: str, values: dict[str, str], other: str) -> str:
    if policy not in values:
        return f"change {policy} of {other}"
    return f"set the parameter qos_overrides.{topic}.{role}.{policy} to {values[policy]}, or change {other}"
