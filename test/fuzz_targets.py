"""Hostile inputs and what each may lead to: a result, or one of the project's errors.

``TARGETS`` are hypothesis strategies with the function that takes what they draw. test_fuzz.py tries a few hundred of
each, scripts/fuzz.py as many as there is time for.
"""

from __future__ import annotations

import copy
import hashlib
import struct
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import cv2
import numpy as np
import yaml
from conftest import write_tiny_bundle
from hypothesis import strategies as st
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer

from sparserefine_ros.datasets.classes import CAMVID
from sparserefine_ros.errors import BagError, BundleError, FrameError
from sparserefine_ros.evaluation import bag_messages as messages
from sparserefine_ros.evaluation.bag_writer import IMAGE_TOPIC, BagWriter
from sparserefine_ros.evaluation.bags import Bag
from sparserefine_ros.node.conversion import MAX_PIXELS, to_rgb
from sparserefine_ros.node.encodings import ENCODINGS
from sparserefine_ros.segmenter.bundle import Bundle
from sparserefine_ros.segmenter.segmenter import Segmenter

NUMBERS = st.sampled_from([0, 1, 2, 7, 8, 255, 256, 65535, 65536, 2**26, 2**31 - 1, 2**31, 2**32 - 1])
Change = tuple[str, float, bytes]


class Target(NamedTuple):
    """What to draw, and what to do with it."""

    inputs: st.SearchStrategy[Any]
    run: Callable[[Any], None]


def changes(most: int) -> st.SearchStrategy[list[Change]]:
    """Up to ``most`` changes of a file: what to do, where (share of its length), and with which bytes."""
    words = st.sampled_from([struct.pack(order + "I", n) for order in "<>" for n in (0, 1, 2**16, 2**31, 2**32 - 1)])
    some = st.binary(min_size=1, max_size=4) | words | st.just(b"\xff" * 8)
    kinds = st.sampled_from(["put", "put", "insert", "remove", "cut", "repeat"])
    return st.lists(st.tuples(kinds, st.floats(0, 1, exclude_max=True), some), min_size=1, max_size=most)


def changed(content: bytes, edits: list[Change]) -> bytes:
    data = bytearray(content)
    for kind, where, some in edits:
        at = int(where * len(data))
        if kind == "put":
            data[at : at + len(some)] = some
        elif kind == "insert":
            data[at:at] = some
        elif kind == "remove":
            del data[at : at + len(some)]
        elif kind == "repeat":
            data[at:at] = data[at : at + 64] * some[0]
        else:
            del data[at + 1 :]
    return bytes(data)


def check_image(image: np.ndarray) -> None:
    assert image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8
    assert 0 < image.shape[0] * image.shape[1] <= MAX_PIXELS


# Messages as objects: every field may say anything.

RAW = st.builds(
    SimpleNamespace,
    encoding=st.sampled_from([*ENCODINGS, "nv12", "32FC1", ""]) | st.text(max_size=8),
    height=st.integers(0, 12) | NUMBERS,
    width=st.integers(0, 12) | NUMBERS,
    step=st.integers(0, 100) | NUMBERS,
    is_bigendian=st.integers(0, 255),
    data=st.binary(max_size=300),
)


def decode_message(message: Any) -> None:
    with suppress(FrameError):
        check_image(to_rgb(message))


# Compressed images: real ones of several kinds, damaged.


@cache
def pictures() -> list[bytes]:
    rng = np.random.default_rng(5)
    colour = cv2.resize(rng.integers(0, 256, (6, 8, 3), np.uint8), (40, 24))
    kinds = [
        (".png", colour, []), (".png", colour[..., 0], []), (".png", colour.astype(np.uint16) * 257, []),
        (".png", np.dstack([colour, colour[..., :1]]), []), (".jpg", colour, []), (".jpg", colour[..., 0], []),
        (".jpg", colour, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]), (".jpg", colour, [cv2.IMWRITE_JPEG_RST_INTERVAL, 2]),
    ]  # fmt: skip
    return [cv2.imencode(suffix, image, options)[1].tobytes() for suffix, image, options in kinds]


FORMATS = st.sampled_from(["jpeg", "png", "bayer_rggb8; jpeg compressed ", "rgb8; png compressed bgr8"]) | st.text()
COMPRESSED = st.tuples(st.integers(0, 7), changes(6), FORMATS) | st.tuples(
    st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"]), st.binary(max_size=200), FORMATS
)


def decode_compressed(drawn: Any) -> None:
    source, damage, text = drawn
    data = changed(pictures()[source], damage) if isinstance(source, int) else source + damage
    decode_message(SimpleNamespace(format=text, data=data))


# Messages as they come over the wire.


@cache
def wires() -> list[tuple[str, bytes]]:
    pixels = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    return [
        (messages.IMAGE, messages.image_message(pixels, "rgb8", 7, "camera")),
        (messages.COMPRESSED, messages.compressed_message(pixels, "png", 7, "camera")),
    ]


WIRE = st.tuples(st.integers(0, 1), changes(5)) | st.tuples(st.integers(0, 1), st.binary(max_size=200))


def decode_wire(drawn: Any) -> None:
    kind, content = wires()[drawn[0]]
    data = drawn[1] if isinstance(drawn[1], bytes) else changed(content, drawn[1])
    with suppress(BagError, FrameError):
        check_image(to_rgb(messages.deserialize(data, kind)))
    with suppress(ImportError, FrameError):
        from sensor_msgs.msg import CompressedImage, Image

        from sparserefine_ros.node.cdr import read_message

        check_image(to_rgb(read_message(data, Image if kind == messages.IMAGE else CompressedImage)))


# Bundles: a tiny one whose model.yaml or weights were changed.

HOSTILE = st.sampled_from(
    [None, True, 0, -1, 1, 3, 2**16, 10**9, 10**30, -0.5, 1e-300, 1e300, float("inf"), float("nan"), "", "x", "..", [],
     {}, [[]], "../dense.safetensors", "/dev/zero", ["x"] * 300, "dense.safetensors", "compact", "bilateral", [8] * 4]
) | st.text(max_size=5) | st.integers() | st.lists(st.integers(-2, 70000), max_size=5)  # fmt: skip
SPOTS = st.floats(0, 1, exclude_max=True)


@cache
def bundle_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        return {file.name: file.read_bytes() for file in write_tiny_bundle(Path(folder)).iterdir()}


BUNDLE = st.one_of(
    st.tuples(st.just("values"), st.lists(st.tuples(SPOTS, st.booleans(), HOSTILE), min_size=1, max_size=3)),
    st.tuples(st.just("model.yaml"), changes(4)),
    st.tuples(st.just("dense.safetensors"), changes(3)),
    st.tuples(st.just("refiner.safetensors"), changes(3)),
)


def spots(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in nested ``value``."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [spot for key in keys for spot in ((value, key), *spots(value[key]))]


def load_bundle(drawn: Any) -> None:
    what, edits = drawn
    files = dict(bundle_files())
    data = yaml.safe_load(files["model.yaml"])
    if what == "values":
        for where, remove, value in edits:
            container, key = (found := spots(data))[int(where * len(found))] if spots(data) else (data, "name")
            container[key] = copy.deepcopy(value)  # drawn values are shared: one could end up inside itself
            if remove:
                del container[key]
    else:
        files[what] = changed(files[what], edits)
        for key in ("dense", "refiner"):  # so that the parser gets to see the weights
            data[key]["sha256"] = hashlib.sha256(files[data[key]["weights"]]).hexdigest()
    if what != "model.yaml":
        files["model.yaml"] = yaml.safe_dump(data).encode()
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            Path(folder, name).write_bytes(content)
        with suppress(BundleError):
            Segmenter(Bundle.load(folder), "cpu")


# Bags: of every storage and compression, damaged.


@cache
def bags() -> list[dict[str, bytes]]:
    rng = np.random.default_rng(2)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for storage in ("mcap", "sqlite3"):
            with BagWriter(Path(folder, storage), CAMVID, storage) as bag:
                for stamp in range(3):
                    bag.write(rng.integers(0, 256, (9, 7, 3), np.uint8), rng.integers(0, 11, (9, 7), np.uint8), stamp)
        for mode in (CompressionMode.FILE, CompressionMode.MESSAGE, CompressionMode.STORAGE):
            plugin = StoragePlugin.MCAP if mode == CompressionMode.STORAGE else StoragePlugin.SQLITE3
            writer = Writer(Path(folder, mode.name), version=8, storage_plugin=plugin)
            writer.set_compression(mode, CompressionFormat.ZSTD)
            with writer:
                connection = writer.add_connection(IMAGE_TOPIC, messages.IMAGE, typestore=messages.typestore())
                writer.write(connection, 5, wires()[0][1])
        for path in Path(folder).iterdir():
            found.append({file.name: file.read_bytes() for file in path.iterdir()})
    return found


BAG = st.tuples(st.integers(0, 4), st.integers(0, 3), changes(4))


def read_bag(drawn: Any) -> None:
    number, which, edits = drawn
    files = dict(bags()[number])
    data = next(name for name in files if name != "metadata.yaml")
    name = "metadata.yaml" if which == 0 else data
    files[name] = changed(files[name], edits)
    with tempfile.TemporaryDirectory() as folder:
        for file, content in files.items():
            Path(folder, file).write_bytes(content)
        for path in (Path(folder), Path(folder, data)) if which == 3 else (Path(folder),):
            with suppress(BagError), Bag(path) as bag:
                bag.check(CAMVID)
                for _, message in bag.image_messages():
                    decode_message(message)
                for _, label in bag.labels():
                    assert label.dtype == np.uint8 and label.ndim == 2


TARGETS = {
    "message": Target(RAW, decode_message),
    "compressed": Target(COMPRESSED, decode_compressed),
    "wire": Target(WIRE, decode_wire),
    "bundle": Target(BUNDLE, load_bundle),
    "bag": Target(BAG, read_bag),
}
