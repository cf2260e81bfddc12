"""Which topics are cameras, and where their results go. Imports no ROS.

An item of the parameter `cameras` is a name or a topic. The name `front` stands for the topic `front/image` and puts
its results below `front/segmentation`; a topic (`/camera/front/image_raw`) puts them beside itself, below
`/camera/front/segmentation`. `*` in a topic stands for anything but `/`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sparserefine_ros.untrusted import parse_yaml

RESULTS = "segmentation"


@dataclass(frozen=True)
class Source:
    """One camera: a name for people ("" where it is the only one), its image topic, the namespace of its results."""

    name: str
    image: str
    results: str


def is_pattern(item: str) -> bool:
    """Whether the graph must be searched for it."""
    return "*" in item


def fixed_sources(cameras: Sequence[str]) -> list[Source]:
    """The cameras known without looking at the graph; one without a name where `cameras` is empty."""
    if not cameras:
        return [Source("", "image", RESULTS)]
    return [
        of_topic(item) if item.startswith("/") else Source(item, f"{item}/image", f"{item}/{RESULTS}")
        for item in cameras
        if not is_pattern(item)
    ]


def of_topic(topic: str) -> Source:
    """The camera of an absolute image topic."""
    namespace = topic.rpartition("/")[0]
    return Source(namespace.strip("/") or topic.strip("/"), topic, f"{namespace}/{RESULTS}")


def shown(configurations: Mapping[str, str]) -> Source | None:
    """The camera that one window is for, by the launch arguments: the first that is no pattern; None without such."""
    try:
        cameras = parse_yaml(configurations.get("cameras", ""))
    except ValueError:  # the node says so
        cameras = None
    names = [item for item in cameras if isinstance(item, str)] if isinstance(cameras, list) else []
    return next(iter(fixed_sources(names)), None)


class Search:
    """The patterns among `cameras`; those without a leading slash are taken from `namespace` ("/robot")."""

    def __init__(self, cameras: Sequence[str], namespace: str, suffix: str = "") -> None:
        base = namespace.rstrip("/")
        self.patterns = [item if item.startswith("/") else f"{base}/{item}" for item in cameras if is_pattern(item)]
        self._suffix = suffix
        parts = ["[^/]*".join(map(re.escape, pattern.split("*"))) for pattern in self.patterns]
        self._expression = re.compile("|".join(f"(?:{part})" for part in parts)) if parts else None

    def sources(self, topics: Iterable[tuple[str, Sequence[str]]], kind: str) -> list[Source]:
        """The cameras among `topics`, (name, types) pairs: those of type `kind` that match and are nobody's results.

        suffix: what image_transport appends to the topic that a pattern names ("/compressed").
        """
        found = []
        for topic, types in sorted(topics):
            base = topic.removesuffix(self._suffix) if topic.endswith(self._suffix) else None
            if base is None or kind not in types or self._expression is None or not self._expression.fullmatch(base):
                continue
            if RESULTS not in base.split("/")[:-1]:
                found.append(of_topic(base))
        return found
