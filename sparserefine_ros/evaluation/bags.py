"""Reads rosbag2 recordings for evaluation; needs no ROS.

Shape shorthand: H, W image height and width in pixels.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from rosbags.interfaces import Connection

from sparserefine_ros.datasets.base import UNLABELLED
from sparserefine_ros.datasets.classes import CLASS_LISTS, ClassList
from sparserefine_ros.errors import BagError, SparseRefineError
from sparserefine_ros.evaluation import bag_limits
from sparserefine_ros.evaluation import bag_messages as messages
from sparserefine_ros.evaluation.bag_writer import (
    CLASSES_KEY,
    COMPRESSED_TOPIC,
    IMAGE_TOPIC,
    LABEL_INFO_TOPIC,
    LABEL_TOPIC,
)

STORED = (".mcap", ".db3", ".zstd")
"""Endings of the files that hold a bag's messages."""
MAKE_ONE = "make one with `sparserefine make-bag`"


class RawFrame(NamedTuple):
    """One image message as it was recorded."""

    stamp_ns: int  # from the header: masks and ground truth are joined by it
    time_ns: int  # when it was recorded: the replay's timing
    data: bytes  # CDR


class Bag:
    """An open recording: its image topic, and its ground truth and class list where it has them.

    ``path`` is a rosbag2 folder or a single .mcap or .db3 file. Topics are found by their types unless given.
    Raises BagError, with the remedy, for a bag that is missing, corrupt, empty, or without images.
    """

    def __init__(self, path: str | Path, image_topic: str | None = None, label_topic: str | None = None) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise BagError(f"there is no bag at {self.path}; check the path, or {MAKE_ONE}")
        if self.path.is_dir() and not (self.path / "metadata.yaml").is_file():
            raise BagError(
                f"{self.path} has no metadata.yaml: the recording was cut short, or it is no bag; "
                f"run `ros2 bag reindex` on it, name its .mcap file (truncated, it needs `mcap recover`), or {MAKE_ONE}"
            )
        with self._reading():
            self._reader = bag_limits.open_reader(self.path)
        try:
            self._choose_topics(image_topic, label_topic)
            # to rosbags the end is one nanosecond after the last message
            self.duration_s: float = max(0, self._reader.duration - 1) / 1e9
            self.classes: ClassList | None = self._read_classes()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Bag:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files; the bag cannot be read any more."""
        self._reader.close()

    @property
    def name(self) -> str:
        """Of the folder or file, also where it was given as "." or ".."."""
        return os.path.basename(os.path.abspath(self.path))

    @property
    def compressed(self) -> bool:
        """Whether the images are sensor_msgs/CompressedImage."""
        return self._images[0].msgtype == messages.COMPRESSED

    @property
    def image_topic(self) -> str:
        """Name of the topic that is replayed."""
        return self._images[0].topic

    @property
    def image_type(self) -> str:
        """Message type of the images, as in ``sensor_msgs/msg/Image``."""
        return self._images[0].msgtype

    @property
    def label_topic(self) -> str | None:
        """Name of the ground-truth topic, None where the bag has none."""
        return self._labels[0].topic if self._labels else None

    def frames(self) -> Iterator[RawFrame]:
        """The image messages in the order of their recording."""
        for time_ns, data in self._messages(self._images):
            yield RawFrame(messages.stamp_ns(data), time_ns, data)

    def image_messages(self) -> Iterator[tuple[int, Any]]:
        """(stamp in ns, deserialised message) of every image, fields as in sensor_msgs."""
        for frame in self.frames():
            yield frame.stamp_ns, self.message(frame)

    def message(self, frame: RawFrame) -> Any:
        """The deserialised message of a frame, fields as in sensor_msgs."""
        return messages.deserialize(frame.data, self.image_type)

    def labels(self) -> Iterator[tuple[int, np.ndarray]]:
        """(stamp in ns, [H, W] uint8 class ids) of the ground truth; nothing where the bag has none."""
        for _, data in self._messages(self._labels) if self._labels else ():
            message = messages.deserialize(data, messages.IMAGE)
            yield messages.stamp_ns(data), messages.label_array(message, self._labels[0].topic)

    def check(self, classes: ClassList) -> list[int]:
        """Reads the bag once from end to end; returns the images' stamps in ns, in order.

        Raises BagError where an evaluation against ``classes`` (the bundle's) would fail or mean nothing: two classes
        of one name, a class list other than the bundle's, an id it does not have, sizes that differ, stamps that
        repeat, no images.
        """
        if same := [name for name, count in Counter(classes.names).items() if count > 1]:
            raise BagError(f"the bundle has two classes named {same[0]!r}, and results go by name; rename one")
        if self.classes is not None:
            _check_same_classes(self.path, self.classes, classes)
        stamps: list[int] = []
        sizes: dict[int, tuple[int, int]] = {}
        for frame in self.frames():
            stamps.append(frame.stamp_ns)
            if not self.compressed:
                message = self.message(frame)
                sizes[frame.stamp_ns] = (int(message.height), int(message.width))
        if not stamps:
            raise BagError(f"{self.path} holds no message on {self.image_topic}; record some frames, or {MAKE_ONE}")
        if len(set(stamps)) < len(stamps):
            twice = next(stamp for stamp, count in Counter(stamps).items() if count > 1)
            raise BagError(
                f"{self.path}: stamp {twice} ns is on more than one message of {self.image_topic}, so masks cannot "
                "be told apart; record with a driver that fills header.stamp"
            )
        labelled: set[int] = set()
        for stamp, label in self.labels():
            if stamp in labelled:
                raise BagError(
                    f"{self.path}: stamp {stamp} ns is on more than one message of {self.label_topic}, so nobody can "
                    "tell which is the ground truth; record each label once, with the header.stamp of its image"
                )
            labelled.add(stamp)
            size = sizes.get(stamp)
            if size is not None and size != label.shape:
                raise BagError(
                    f"{self.path}: at stamp {stamp} ns the image is {size[1]}x{size[0]} but its label "
                    f"{label.shape[1]}x{label.shape[0]}; record both at the same size"
                )
            ids = label[label != UNLABELLED]
            if ids.size and int(ids.max()) >= len(classes):
                raise BagError(
                    f"{self.path}: the label at stamp {stamp} ns holds class id {int(ids.max())} but the bundle's "
                    f"{classes.name} has ids 0-{len(classes) - 1} (255 = ignored); evaluate with the bundle that "
                    "the labels were made for"
                )
        return stamps

    def sha256(self) -> str:
        """Hash over the files of the bag, by name: the same bag gives the same hash anywhere, beside whatever files."""
        files = [self.path]
        if self.path.is_dir():
            names = (f for f in self.path.iterdir() if f.name == "metadata.yaml" or f.suffix in STORED)
            files = sorted(f for f in names if f.is_file())
        total = hashlib.sha256()
        for file in files:
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    total.update(block)
        return total.hexdigest()

    def _messages(self, connections: Sequence[Connection]) -> Iterator[tuple[int, bytes]]:
        with self._reading():
            yield from bag_limits.messages(self._reader, connections)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        # A corrupt file surfaces as anything: ReaderError, sqlite3's, struct's or zstd's errors, TypeError, ...
        try:
            yield
        except (SparseRefineError, GeneratorExit):
            raise
        except Exception as error:
            reason = str(error).strip() or type(error).__name__
            raise BagError(
                f"cannot read the bag {self.path}: {reason}; copy or record it again, or {MAKE_ONE}"
            ) from error

    def _choose_topics(self, image_topic: str | None, label_topic: str | None) -> None:
        topics: dict[str, list[Connection]] = {}  # a topic has a connection for each of its publishers, in some tools
        for connection in self._reader.connections:
            topics.setdefault(connection.topic, []).append(connection)
        images = {t: c for t, c in topics.items() if c[0].msgtype in (messages.IMAGE, messages.COMPRESSED)}
        if not topics:
            raise BagError(f"{self.path} is an empty bag: it has no topics; record some frames, or {MAKE_ONE}")
        wanted_label = label_topic or LABEL_TOPIC
        self._labels: list[Connection] = images.get(wanted_label, [])
        if label_topic is not None and not self._labels:
            raise BagError(_no_topic(self.path, "label topic", label_topic, images))
        for connection in self._labels:
            if connection.msgtype != messages.IMAGE:
                raise BagError(
                    f"{self.path}: {wanted_label} is a {connection.msgtype}; ground truth must be a {messages.IMAGE} "
                    "(mono8), since lossy compression alters class ids"
                )
        candidates = {t: c for t, c in images.items() if c is not self._labels}
        chosen = image_topic or next((t for t in (IMAGE_TOPIC, COMPRESSED_TOPIC) if t in candidates), None)
        if chosen is None and len(candidates) == 1:
            chosen = next(iter(candidates))
        if chosen is None and not candidates:
            raise BagError(
                f"{self.path} has no image topic ({messages.IMAGE} or {messages.COMPRESSED}), only "
                f"{', '.join(sorted(topics))}; record the camera's image topic"
            )
        if chosen is None:
            raise BagError(
                f"{self.path} has {len(candidates)} image topics: {', '.join(sorted(candidates))}; "
                "choose one with --image-topic"
            )
        if chosen not in candidates:
            raise BagError(_no_topic(self.path, "image topic", chosen, candidates))
        self._images = candidates[chosen]
        if len(types := {c.msgtype for c in self._images}) > 1:
            both = " and ".join(sorted(types))
            raise BagError(f"{self.path}: {chosen} has messages of {both}; record one type a topic")

    def _read_classes(self) -> ClassList | None:
        custom = self._reader.storage.metadata.custom
        if isinstance(custom, dict) and CLASSES_KEY in custom:
            with self._reading():
                return ClassList.from_data(json.loads(custom[CLASSES_KEY]))
        info = next((c for c in self._reader.connections if c.msgtype == messages.LABEL_INFO), None)
        if info is None:
            return None
        for _, data in self._messages([info]):
            class_map = messages.deserialize(data, messages.LABEL_INFO).class_map
            names = {int(c.class_id): str(c.class_name) for c in class_map if c.class_id != UNLABELLED}
            if sorted(names) != list(range(len(names))):
                raise BagError(
                    f"{self.path}: {info.topic} has class ids {sorted(names)}; ids must be 0 to K-1 without a gap"
                )
            return _known_classes(tuple(names[i] for i in range(len(names))))
        return None


def _known_classes(names: tuple[str, ...]) -> ClassList:
    """LabelInfo has names but neither colours nor a name for the list: take both from a list of ours if it matches."""
    for known in CLASS_LISTS.values():
        if known.names == names:
            return known
    return ClassList(LABEL_INFO_TOPIC, names, ((128, 128, 128),) * len(names))


def _check_same_classes(path: Path, bag: ClassList, bundle: ClassList) -> None:
    remedy = "choose the bundle (--model) trained for these classes, or a bag labelled with the bundle's"
    if len(bag) != len(bundle):
        raise BagError(
            f"{path} is labelled with {len(bag)} classes ({bag.name}) but the bundle has {len(bundle)} "
            f"({bundle.name}); {remedy}"
        )
    for i, (ours, theirs) in enumerate(zip(bag.names, bundle.names, strict=True)):
        if ours != theirs:
            raise BagError(f"{path}: class {i} is {ours!r} in the bag but {theirs!r} in the bundle; {remedy}")


def _no_topic(path: Path, kind: str, topic: str, images: dict[str, list[Connection]]) -> str:
    return f"{path} has no {kind} {topic!r}; its image topics are: {', '.join(sorted(images)) or 'none'}"
