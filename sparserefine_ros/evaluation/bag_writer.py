"""Writes frames and their ground truth to rosbag2, playable by ``ros2 bag play``; needs no ROS.

Shape shorthand: H, W image height and width in pixels.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import numpy as np
from rosbags.interfaces import Connection, Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime
from rosbags.rosbag2 import StoragePlugin, Writer, WriterError

from sparserefine_ros.datasets.classes import ClassList
from sparserefine_ros.errors import BagError
from sparserefine_ros.evaluation import bag_messages as messages

IMAGE_TOPIC = "/camera/image_raw"
COMPRESSED_TOPIC = "/camera/image_raw/compressed"
LABEL_TOPIC = "/camera/label"
LABEL_INFO_TOPIC = "/camera/label_info"
FRAME_ID = "camera_optical_frame"  # REP 103: z forward, x right, y down
CLASSES_KEY = "sparserefine_classes"
"""Key of the class list (name, names, palette as JSON) in the bag's custom metadata."""

START_NS = 1_700_000_000_000_000_000
"""Stamp of a drive's first frame: fixed, so that a bag is the same whenever it is made, and not 0, which ROS reads
as "no time"."""

STORAGES = {"mcap": StoragePlugin.MCAP, "sqlite3": StoragePlugin.SQLITE3}
ENCODINGS = messages.RAW_ENCODINGS + messages.COMPRESSED_ENCODINGS
_FOREVER = QosTime(9223372036, 854775807)  # what rmw writes for "infinite"


def _qos(durability: QosDurability, depth: int) -> Qos:
    return Qos(
        QosHistory.KEEP_LAST, depth, QosReliability.RELIABLE, durability,
        _FOREVER, _FOREVER, QosLiveliness.AUTOMATIC, _FOREVER, False,
    )  # fmt: skip


class BagWriter:
    """A rosbag2 folder being written: images, ground truth, and the class list once, latched.

    ``with BagWriter(path, classes) as bag: bag.write(image, label, stamp_ns)``. A folder that was not written to the
    end is removed. Raises BagError if ``path`` holds anything; with ``force`` a bag that lies there is replaced.
    """

    def __init__(
        self,
        path: str | Path,
        classes: ClassList,
        storage: str = "mcap",
        encoding: str = "rgb8",
        force: bool = False,
    ) -> None:
        self.path = Path(path)
        self.classes = classes
        self.encoding = encoding
        if storage not in STORAGES:
            raise BagError(f"unknown bag storage {storage!r}; choose one of {', '.join(STORAGES)}")
        if encoding not in ENCODINGS:
            raise BagError(f"unknown image encoding {encoding!r}; choose one of {', '.join(ENCODINGS)}")
        if storage == "sqlite3" and set(str(self.path)) & set("?#%"):
            raise BagError(f"SQLite would read {self.path} as a URI, for its ?, # or %; give another path, or use mcap")
        _make_room(self.path, force)
        # Version 8 is read by jazzy and by everything after it.
        self._writer = Writer(self.path, version=8, storage_plugin=STORAGES[storage])
        self._writer.set_custom_data(CLASSES_KEY, json.dumps(classes.as_data()))
        self._last_stamp: int | None = None

    def __enter__(self) -> BagWriter:
        try:
            self._writer.open()
        except (OSError, WriterError, sqlite3.Error) as error:
            raise BagError(f"cannot write a bag to {self.path}: {error}; choose a folder you may write to") from error
        compressed = self.encoding in messages.COMPRESSED_ENCODINGS
        store = messages.typestore()
        volatile, latched = _qos(QosDurability.VOLATILE, 10), _qos(QosDurability.TRANSIENT_LOCAL, 1)
        self._images = self._writer.add_connection(
            COMPRESSED_TOPIC if compressed else IMAGE_TOPIC,
            messages.COMPRESSED if compressed else messages.IMAGE,
            typestore=store,
            offered_qos_profiles=[volatile],
        )
        self._labels = self._writer.add_connection(
            LABEL_TOPIC, messages.IMAGE, typestore=store, offered_qos_profiles=[volatile]
        )
        self._label_info = self._writer.add_connection(
            LABEL_INFO_TOPIC, messages.LABEL_INFO, typestore=store, offered_qos_profiles=[latched]
        )
        return self

    def write(self, image: np.ndarray, label: np.ndarray | None, stamp_ns: int) -> None:
        """One frame: ``image`` [H, W, 3] uint8 RGB, ``label`` [H, W] uint8 class ids or None.

        ``stamp_ns`` becomes both header stamp and recording time; it must grow from frame to frame, since masks are
        later joined with their ground truth by it.
        """
        if self._last_stamp is not None and stamp_ns <= self._last_stamp:
            raise BagError(f"stamp {stamp_ns} ns follows {self._last_stamp} ns; stamps must grow from frame to frame")
        if label is not None and label.shape != image.shape[:2]:
            raise BagError(
                f"the image is {_size(image)} but its label {_size(label)}; both must have the same height and width"
            )
        if self._last_stamp is None:
            self._store(self._label_info, stamp_ns, self._label_info_message(stamp_ns))
        self._last_stamp = stamp_ns
        if self.encoding in messages.COMPRESSED_ENCODINGS:
            data = messages.compressed_message(image, self.encoding, stamp_ns, FRAME_ID)
        else:
            pixels = image[..., ::-1] if self.encoding == "bgr8" else image
            data = messages.image_message(pixels, self.encoding, stamp_ns, FRAME_ID)
        self._store(self._images, stamp_ns, data)
        if label is not None:
            self._store(self._labels, stamp_ns, messages.image_message(label, "mono8", stamp_ns, FRAME_ID))

    def _store(self, connection: Connection, stamp_ns: int, data: bytes) -> None:
        with self._storing():
            self._writer.write(connection, stamp_ns, data)

    @contextmanager
    def _storing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise BagError(f"cannot write to the bag {self.path}: {error}; is the disk full?") from error

    def _label_info_message(self, stamp_ns: int) -> bytes:
        types = messages.typestore().types
        message = types[messages.LABEL_INFO](
            header=messages.header(stamp_ns, FRAME_ID),
            class_map=[
                types["vision_msgs/msg/VisionClass"](class_id=i, class_name=name)
                for i, name in enumerate(self.classes.names)
            ],
            threshold=0.0,
        )
        return messages.serialize(message, messages.LABEL_INFO)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        done = False
        try:
            with self._storing() if kind is None else suppress(Exception):  # the first error says more
                self._writer.__exit__(kind, error, trace)
                done = kind is None
        finally:
            if not done:
                shutil.rmtree(self.path, ignore_errors=True)


def _size(array: np.ndarray) -> str:
    return f"{array.shape[1]}x{array.shape[0]}"


def _make_room(path: Path, force: bool) -> None:
    """Leaves no folder at ``path``; removes only an empty one, or with ``force`` one that is a bag."""
    if not path.exists():
        return
    if not path.is_dir():
        raise BagError(f"{path} is a file; a bag is a folder, give another path")
    content = list(path.iterdir())
    if content and not force:
        raise BagError(f"{path} already holds {len(content)} files; give another path, or --force to replace the bag")
    # --force is for bags: a mistyped home folder must survive it
    strangers = [f.name for f in content if f.is_dir() or f.name != "metadata.yaml" and f.suffix not in _BAG_FILES]
    if strangers:
        raise BagError(f"{path} holds {strangers[0]!r}, which is no part of a bag; remove the folder yourself")
    shutil.rmtree(path)


_BAG_FILES = (".mcap", ".db3", ".db3-wal", ".db3-shm", ".zstd")
