"""What a hostile bag asks for: files elsewhere, queries without end, memory without bound. It gets a BagError."""

from __future__ import annotations

import os
import resource
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from rosbags.rosbag2 import CompressionFormat, CompressionMode, Reader, StoragePlugin, Writer
from test_bags import CAMVID, image, write

from sparserefine_ros.errors import BagError
from sparserefine_ros.evaluation import bag_limits
from sparserefine_ros.evaluation import bag_messages as messages
from sparserefine_ros.evaluation.bag_writer import FRAME_ID, IMAGE_TOPIC
from sparserefine_ros.evaluation.bags import Bag

MODES = [CompressionMode.FILE, CompressionMode.MESSAGE, CompressionMode.STORAGE]


def refused(path: Path, match: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BagError, match=match), Bag(path) as bag:
        bag.check(CAMVID)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000  # kB


def edit(path: Path, change: Callable[[dict], object]) -> Path:
    data = yaml.safe_load((path / "metadata.yaml").read_text())
    change(data["rosbag2_bagfile_information"])
    (path / "metadata.yaml").write_text(yaml.safe_dump(data))
    return path


def compressed(path: Path, mode: CompressionMode, contents: list[bytes]) -> Path:
    plugin = StoragePlugin.MCAP if mode == CompressionMode.STORAGE else StoragePlugin.SQLITE3
    writer = Writer(path, version=8, storage_plugin=plugin)
    writer.set_compression(mode, CompressionFormat.ZSTD)
    with writer:
        connection = writer.add_connection(IMAGE_TOPIC, messages.IMAGE, typestore=messages.typestore())
        for time_ns, data in enumerate(contents):
            writer.write(connection, time_ns, data)
    return path


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_compressed_bags_are_read(tmp_path: Path, mode: CompressionMode) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (3, 40, 60, 3), np.uint8)
    written = [messages.image_message(pixels, "rgb8", stamp, FRAME_ID) for stamp, pixels in enumerate(noise)]
    with Bag(compressed(tmp_path / "bag", mode, written)) as bag:
        assert [frame.data for frame in bag.frames()] == written
        assert [frame.data for frame in bag.frames()] == written  # a second time


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_bombs_are_not_expanded(tmp_path: Path, mode: CompressionMode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bag_limits, "ALWAYS_ALLOWED", 2**20)
    path = compressed(tmp_path / "bag", mode, [image(height=2000, width=2000)])  # 12 MB of zeros
    assert sum(file.stat().st_size for file in path.iterdir()) < 40_000
    refused(path, "expand")


def test_expansion_has_a_bound() -> None:
    data = np.random.default_rng(0).bytes(100_000)
    packed = bag_limits.zstd.compress(data)
    assert bag_limits.expand_zstd(packed, len(data)) == data
    assert bag_limits.expand_zstd(packed + packed, 2 * len(data)) == data + data  # two frames
    for content, size in ((packed, len(data) - 1), (packed + packed, len(data)), (packed[:-9], len(data))):
        with pytest.raises(ValueError, match=r"zstd (expand|end)"):
            bag_limits.expand_zstd(content, size)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([".."], "'..' must be the plain name"),
        (["bag.mcap?vfs=x"], "would be read as a URI"),
        (["link.mcap"], "leads out of"),
        (["pipe"], "pipe is no file"),
        ("ab", "a is no file"),
    ],
)
def test_files_stay_inside(tmp_path: Path, names: object, message: str) -> None:
    path = edit(write(tmp_path / "bag"), lambda m: m.update(relative_file_paths=names))
    (path / "link.mcap").symlink_to("/dev/zero")
    os.mkfifo(path / "pipe")
    refused(path, message)


def test_folders_before_a_name_are_left_out_as_rosbags_does(tmp_path: Path) -> None:
    path = edit(write(tmp_path / "bag"), lambda m: m.update(relative_file_paths=["/etc/old_name/bag.mcap"]))
    with Bag(path) as bag:
        assert len(bag.check(CAMVID)) == 3


@pytest.mark.parametrize(
    "sql",
    [
        "CREATE VIEW more AS WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x FROM n) SELECT x FROM n",
        "CREATE TRIGGER more AFTER INSERT ON topics BEGIN DELETE FROM messages; END",
        "CREATE TABLE more(x, y GENERATED ALWAYS AS (zeroblob(1000000000)))",
        "CREATE VIRTUAL TABLE more USING fts5(x)",
    ],
)
def test_databases_that_compute_are_refused(tmp_path: Path, sql: str) -> None:
    path = write(tmp_path / "bag", "sqlite3")
    with sqlite3.connect(path / "bag.db3") as db:
        db.execute(sql)
    db.close()
    refused(path, "'more.* is no plain table")
    refused(path / "bag.db3", "is no plain table")


def test_bombs_in_metadata(tmp_path: Path) -> None:
    aliases = "a: &a [1]\nb: [*a]\n"
    path = write(tmp_path / "bag")
    text = (path / "metadata.yaml").read_text()
    for bomb, message in ((aliases + text, "alias"), (text + "#" * 2**20, "more than 1048576 bytes")):
        (path / "metadata.yaml").write_text(bomb)
        refused(path, message)
    (path / "metadata.yaml").write_text(text)

    def qos(metadata: dict) -> None:
        metadata["topics_with_message_count"][0]["topic_metadata"]["offered_qos_profiles"] = aliases

    refused(edit(path, qos), "alias")


def test_qos_of_an_mcap_alone(tmp_path: Path) -> None:
    """Its YAML is read by rosbags; a list where a number belongs would be compared, alias by alias."""
    file = write(tmp_path / "bag") / "bag.mcap"
    content = file.read_bytes()
    assert content.count(b"depth: 10\n") > 1
    file.write_bytes(content.replace(b"depth: 10\n", b"depth: []\n"))
    refused(file, "QoS depth that is no number")


def test_chunks_listed_twice(tmp_path: Path) -> None:
    with Reader(write(tmp_path / "bag")) as reader:
        chunks = list(reader.storage.storages[0].chunks)
    bag_limits._check_chunks(chunks)
    with pytest.raises(ValueError, match="more than once"):
        bag_limits._check_chunks(chunks * 2)
