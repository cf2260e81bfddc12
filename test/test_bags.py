"""Bags: what is written is read back to the bit, and what cannot be used is refused with its value and the remedy."""

from __future__ import annotations

import sqlite3
import struct
from contextlib import closing, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from conftest import disk_with
from hypothesis import given, settings
from hypothesis import strategies as st
from rosbags.interfaces import QosDurability
from rosbags.rosbag2 import Reader, StoragePlugin, Writer

from sparserefine_ros.datasets.classes import CAMVID, CITYSCAPES, ClassList
from sparserefine_ros.errors import BagError, FrameError
from sparserefine_ros.evaluation import bag_messages as messages
from sparserefine_ros.evaluation import bag_writer
from sparserefine_ros.evaluation.bag_writer import FRAME_ID, IMAGE_TOPIC, LABEL_INFO_TOPIC, LABEL_TOPIC, BagWriter
from sparserefine_ros.evaluation.bags import Bag
from sparserefine_ros.evaluation.mask_spool import MaskSpool
from sparserefine_ros.node.conversion import to_rgb

H, W = 12, 17  # odd width: no accidental alignment
STAMPS = [1_700_000_000_000_000_001, 1_700_000_000_066_666_668, 1_700_000_001_000_000_000]


def frames(classes: ClassList = CAMVID) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, len(classes), (len(STAMPS), H, W), np.uint8)
    labels[:, :2] = 255
    return list(zip(rng.integers(0, 256, (len(STAMPS), H, W, 3), np.uint8), labels, strict=True))


def write(path: Path, storage: str = "mcap", encoding: str = "rgb8", classes: ClassList = CAMVID) -> Path:
    with BagWriter(path, classes, storage, encoding) as bag:
        for (image, label), stamp in zip(frames(classes), STAMPS, strict=True):
            bag.write(image, label, stamp)
    return path


def custom(path: Path, topics: list[tuple[str, str, list[bytes]]]) -> Path:
    """A bag of the given (topic, type, serialised messages), without our class list."""
    with Writer(path, version=8, storage_plugin=StoragePlugin.MCAP) as writer:
        for topic, kind, content in topics:
            connection = writer.add_connection(topic, kind, typestore=messages.typestore())
            for time_ns, data in enumerate(content):
                writer.write(connection, time_ns, data)
    return path


def image(stamp: int = 1, height: int = H, width: int = W, value: int = 0, encoding: str = "rgb8") -> bytes:
    shape = (height, width) if encoding == "mono8" else (height, width, 3)
    return messages.image_message(np.full(shape, value, np.uint8), encoding, stamp, FRAME_ID)


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
@pytest.mark.parametrize("encoding", ["rgb8", "bgr8", "png"])
def test_values_stamps_and_order_survive(tmp_path: Path, storage: str, encoding: str) -> None:
    with Bag(write(tmp_path / "bag", storage, encoding)) as bag:
        assert bag.check(CAMVID) == STAMPS
        assert bag.duration_s == (STAMPS[-1] - STAMPS[0]) / 1e9
        assert [(f.stamp_ns, f.time_ns) for f in bag.frames()] == [(s, s) for s in STAMPS]
        read = [(stamp, to_rgb(message)) for stamp, message in bag.image_messages()]
        labels = list(bag.labels())
    for (stamp, pixels), (label_stamp, label), expected, wanted in zip(read, labels, frames(), STAMPS, strict=True):
        assert stamp == label_stamp == wanted
        np.testing.assert_array_equal(pixels, expected[0])
        np.testing.assert_array_equal(label, expected[1])


def test_jpeg_is_close_and_its_labels_exact(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)
    smooth = np.stack([np.tile(ramp, (48, 1)), np.tile(ramp[::-1], (48, 1)), np.full((48, 64), 90, np.uint8)], axis=-1)
    label = np.arange(48 * 64, dtype=np.uint8).reshape(48, 64) % 11
    with BagWriter(tmp_path / "bag", CAMVID, encoding="jpeg") as writer:
        writer.write(smooth, label, 5)
    with Bag(tmp_path / "bag") as bag:
        assert bag.compressed and bag.image_topic == "/camera/image_raw/compressed"
        (_, message), (_, read) = next(bag.image_messages()), next(bag.labels())
    assert message.format == "rgb8; jpeg compressed bgr8"
    difference = np.abs(to_rgb(message).astype(int) - smooth)
    assert 0 < difference.mean() < 3  # lossy, and red is not swapped with blue
    np.testing.assert_array_equal(read, label)


def test_message_fields(tmp_path: Path) -> None:
    with Bag(write(tmp_path / "bag", encoding="bgr8")) as bag:
        _, message = next(bag.image_messages())
    assert (message.height, message.width, message.step, message.encoding) == (H, W, 3 * W, "bgr8")
    assert message.is_bigendian == 0 and message.header.frame_id == "camera_optical_frame"
    assert (message.header.stamp.sec, message.header.stamp.nanosec) == (1_700_000_000, 1)


def test_stamp_is_read_in_both_byte_orders() -> None:
    little = image(stamp=7_000_000_009)
    assert messages.stamp_ns(little) == 7_000_000_009
    big = b"\0\0\0\0" + struct.pack(">iI", 7, 9)
    assert messages.stamp_ns(big) == 7_000_000_009
    with pytest.raises(BagError, match="11 bytes is too short"):
        messages.stamp_ns(little[:11])


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_topics_types_and_qos_as_ros2_bag_play_reads_them(tmp_path: Path, storage: str) -> None:
    with Reader(write(tmp_path / "bag", storage)) as reader:
        kinds = {c.topic: (c.msgtype, c.msgcount) for c in reader.connections}
        qos = {c.topic: c.ext.offered_qos_profiles[0] for c in reader.connections}
    assert kinds == {
        IMAGE_TOPIC: ("sensor_msgs/msg/Image", 3),
        LABEL_TOPIC: ("sensor_msgs/msg/Image", 3),
        LABEL_INFO_TOPIC: ("vision_msgs/msg/LabelInfo", 1),
    }
    assert qos[LABEL_INFO_TOPIC].durability.name == "TRANSIENT_LOCAL"
    assert qos[IMAGE_TOPIC].durability.name == "VOLATILE"
    assert {q.reliability.name for q in qos.values()} == {"RELIABLE"}


def test_class_list_is_in_the_metadata(tmp_path: Path) -> None:
    odd = ClassList("three", ("a", "b", "c"), ((1, 2, 3), (4, 5, 6), (7, 8, 9)))
    with Bag(write(tmp_path / "bag", classes=odd)) as bag:
        assert bag.classes == odd
    impossible = ClassList("bright", ("a",), ((0, 0, 300),))
    with pytest.raises(BagError, match=r"cannot read the bag .*: colour \[0, 0, 300\]; expected"):
        Bag(write(tmp_path / "other", classes=impossible))


def test_class_list_of_a_lone_mcap_comes_from_label_info(tmp_path: Path) -> None:
    write(tmp_path / "bag")
    with Bag(tmp_path / "bag" / "bag.mcap") as bag:  # without metadata.yaml
        assert bag.classes == CAMVID
        assert bag.check(CAMVID) == STAMPS


def test_same_frames_give_the_same_hash(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    hashes = []
    for folder in ("a", "b"):
        with Bag(write(tmp_path / folder / "bag")) as bag:
            hashes.append(bag.sha256())
    assert hashes[0] == hashes[1] and len(hashes[0]) == 64
    (tmp_path / "a" / "bag" / "node.log").write_text("of `evaluate --output`")
    with Bag(tmp_path / "a" / "bag") as bag:
        assert bag.sha256() == hashes[0]


@pytest.mark.parametrize("dropped", [0, 3])
def test_padded_label_rows(dropped: int) -> None:
    data = np.full((4, 8), 9, np.uint8)
    data[:, :5] = np.arange(20).reshape(4, 5)
    kind = messages.typestore().types[messages.IMAGE]
    message = kind(messages.header(1, ""), 4, 5, "mono8", 0, 8, data.reshape(-1)[: 32 - dropped])
    if dropped:
        with pytest.raises(BagError, match="5x4 image with step 8 and 29 bytes"):
            messages.label_array(message, "/l")
    else:
        np.testing.assert_array_equal(messages.label_array(message, "/l"), np.arange(20).reshape(4, 5))


def refused(path: Path, *patterns: str, **options: str) -> None:
    with pytest.raises(BagError) as caught, Bag(path, **options) as bag:
        bag.check(CAMVID)
    for pattern in patterns:
        assert pattern in str(caught.value)


def test_absent_bag(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "there is no bag at", "nothing", "make-bag")


def test_folder_without_metadata(tmp_path: Path) -> None:
    (write(tmp_path / "bag") / "metadata.yaml").unlink()
    refused(tmp_path / "bag", "no metadata.yaml", "ros2 bag reindex")


def test_metadata_that_is_no_yaml(tmp_path: Path) -> None:
    (write(tmp_path / "bag") / "metadata.yaml").write_text(":\n\t{")
    refused(tmp_path / "bag", "cannot read the bag", "make-bag")


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
@pytest.mark.parametrize("keep", [0, 20, 1500])
def test_truncated_storage(tmp_path: Path, storage: str, keep: int) -> None:
    file = next(f for f in write(tmp_path / "bag", storage).iterdir() if f.suffix in (".mcap", ".db3"))
    file.write_bytes(file.read_bytes()[:keep])
    refused(tmp_path / "bag", str(tmp_path / "bag"), "record")


def test_missing_storage(tmp_path: Path) -> None:
    (write(tmp_path / "bag") / "bag.mcap").unlink()
    refused(tmp_path / "bag", "cannot read the bag", "bag.mcap")


def test_wrong_file(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    refused(tmp_path / "notes.txt", "cannot read the bag", ".txt")


def test_message_that_is_no_image(tmp_path: Path) -> None:
    path = custom(tmp_path / "bag", [(IMAGE_TOPIC, messages.IMAGE, [image()[:30]])])
    refused(path, "30 bytes do not hold a sensor_msgs/msg/Image")


def test_no_topics(tmp_path: Path) -> None:
    refused(custom(tmp_path / "bag", []), "empty bag", "record")


def test_no_image_topic(tmp_path: Path) -> None:
    refused(custom(tmp_path / "bag", [("/chatter", "std_msgs/msg/String", [])]), "no image topic", "/chatter")


def test_topic_without_messages(tmp_path: Path) -> None:
    refused(custom(tmp_path / "bag", [("/a", messages.IMAGE, [])]), "no message on /a")


def test_several_image_topics_need_a_choice(tmp_path: Path) -> None:
    path = custom(tmp_path / "bag", [("/a", messages.IMAGE, [image(1)]), ("/b", messages.IMAGE, [image(2)])])
    refused(path, "2 image topics: /a, /b", "--image-topic")
    refused(path, "no image topic '/c'", "/a, /b", image_topic="/c")
    refused(path, "no label topic '/c'", "/a, /b", image_topic="/a", label_topic="/c")
    with Bag(path, image_topic="/b") as bag:
        assert bag.check(CAMVID) == [2] and bag.label_topic is None and list(bag.labels()) == []


def test_repeated_stamps(tmp_path: Path) -> None:
    refused(custom(tmp_path / "bag", [("/a", messages.IMAGE, [image(0), image(0)])]), "stamp 0 ns", "header.stamp")


def test_two_labels_of_one_image(tmp_path: Path) -> None:
    labels = [image(value=value, encoding="mono8") for value in (0, 1)]
    path = custom(tmp_path / "bag", [(IMAGE_TOPIC, messages.IMAGE, [image()]), (LABEL_TOPIC, messages.IMAGE, labels)])
    refused(path, "stamp 1 ns", f"more than one message of {LABEL_TOPIC}")


@pytest.mark.parametrize("file", ["", "bag.mcap"])
def test_all_publishers_of_a_topic_are_read(tmp_path: Path, file: str) -> None:
    """Some tools give each publisher a channel of its own."""
    qos = [bag_writer._qos(QosDurability.VOLATILE, depth) for depth in (1, 2)]
    with Writer(tmp_path / "bag", version=8, storage_plugin=StoragePlugin.MCAP) as writer:
        channels = [
            writer.add_connection(IMAGE_TOPIC, messages.IMAGE, typestore=messages.typestore(), offered_qos_profiles=[q])
            for q in qos
        ]
        for stamp in range(1, 7):
            writer.write(channels[stamp % 2], stamp, image(stamp))
    with Bag(tmp_path / "bag" / file) as bag:
        assert bag.check(CAMVID) == [1, 2, 3, 4, 5, 6]


def test_messages_outside_of_the_database_are_not_forgotten(tmp_path: Path) -> None:
    """A recorder that was killed leaves them in SQLite's write-ahead log, which rosbags does not read."""
    path = write(tmp_path / "bag", "sqlite3")
    file = path / "bag.db3"
    with closing(sqlite3.connect(file)) as db:
        db.execute("PRAGMA journal_mode=WAL")
        topic = db.execute("SELECT id FROM topics WHERE name = ?", (IMAGE_TOPIC,)).fetchone()[0]
        last = STAMPS[-1] + 1
        db.execute("INSERT INTO messages(topic_id, timestamp, data) VALUES (?, ?, ?)", (topic, last, image(last)))
        db.commit()
        refused(path, "bag.db3-wal holds messages", "wal_checkpoint")
        refused(file, "bag.db3-wal holds messages")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with Bag(path) as bag:
        assert [f.stamp_ns for f in bag.frames()] == [*STAMPS, last]


@pytest.mark.parametrize("name", ["a#b", "50%41", "what?"])
def test_sqlite_paths_that_are_uris(tmp_path: Path, name: str) -> None:
    with pytest.raises(BagError, match="as a URI"):
        write(tmp_path / name, "sqlite3")
    assert list(tmp_path.iterdir()) == []
    refused(write(tmp_path / "bag", "sqlite3").rename(tmp_path / name), "read as a URI", "rename")


@pytest.mark.parametrize("given", [".", "sub/.."])
def test_a_bag_has_the_name_of_its_folder(tmp_path: Path, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "drive")
    (path / "sub").mkdir()
    monkeypatch.chdir(path)
    with Bag(given) as bag:
        assert bag.name == "drive"


def labelled(tmp_path: Path, label: bytes) -> Path:
    return custom(tmp_path / "bag", [(IMAGE_TOPIC, messages.IMAGE, [image()]), (LABEL_TOPIC, messages.IMAGE, [label])])


def test_label_of_another_size(tmp_path: Path) -> None:
    path = labelled(tmp_path, image(height=5, width=6, encoding="mono8"))
    refused(path, f"image is {W}x{H}", "label 6x5", "same size")


def test_label_id_out_of_range(tmp_path: Path) -> None:
    refused(labelled(tmp_path, image(value=11, encoding="mono8")), "class id 11", "ids 0-10", "bundle")


def test_label_in_colour(tmp_path: Path) -> None:
    refused(labelled(tmp_path, image()), "/camera/label has encoding 'rgb8'", "mono8")


def test_class_count_mismatch(tmp_path: Path) -> None:
    refused(write(tmp_path / "bag", classes=CITYSCAPES), "19 classes (cityscapes)", "bundle has 11 (camvid)", "--model")


def test_class_names_mismatch(tmp_path: Path) -> None:
    other = ClassList("other", ("sky", "house", *CAMVID.names[2:]), CAMVID.palette)
    refused(write(tmp_path / "bag", classes=other), "class 1 is 'house' in the bag but 'building'", "--model")


def test_classes_of_one_name(tmp_path: Path) -> None:
    names = ("road", *CAMVID.names[1:3], "road", *CAMVID.names[4:])
    with Bag(write(tmp_path / "bag")) as bag, pytest.raises(BagError, match="two classes named 'road'"):
        bag.check(ClassList("twice", names, CAMVID.palette))


def test_writer_keeps_what_lies_there(tmp_path: Path) -> None:
    write(tmp_path / "bag")
    with pytest.raises(BagError, match=r"already holds 2 files.*--force"):
        BagWriter(tmp_path / "bag", CAMVID)
    with BagWriter(tmp_path / "bag", CAMVID, force=True) as writer:
        writer.write(*frames()[0], 1)
    with Bag(tmp_path / "bag") as bag:
        assert bag.check(CAMVID) == [1]


def test_force_removes_bags_only(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("precious")
    with pytest.raises(BagError, match=r"thesis\.tex.*no part of a bag"):
        BagWriter(tmp_path / "home", CAMVID, force=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "precious"


def test_failed_recording_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(BagError, match="stamps must grow"), BagWriter(tmp_path / "bag", CAMVID) as writer:
        writer.write(*frames()[0], 2)
        writer.write(*frames()[1], 2)
    assert not (tmp_path / "bag").exists()


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_a_full_disk_leaves_no_half_bag(tmp_path: Path, storage: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    with (
        disk_with(100_000),
        pytest.raises(BagError, match="cannot write to the bag .*disk full"),
        BagWriter(tmp_path / "bag", CAMVID, storage) as writer,
    ):
        for stamp in range(1, 400):
            writer.write(pixels, None, stamp)
    assert not (tmp_path / "bag").exists()


def test_a_full_disk_ends_the_masks_with_a_remedy() -> None:
    with (
        disk_with(100_000),
        pytest.raises(BagError, match=r"cannot keep the masks in .* of them.*TMPDIR"),
        MaskSpool() as s,
    ):
        for stamp in range(100):
            s.put_mask(stamp, np.zeros((64, 64), np.uint8))


def test_writer_refuses_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(BagError, match="storage 'rosbag1'.*mcap, sqlite3"):
        BagWriter(tmp_path / "bag", CAMVID, storage="rosbag1")
    with pytest.raises(BagError, match="encoding 'mono8'.*rgb8, bgr8, jpeg, png"):
        BagWriter(tmp_path / "bag", CAMVID, encoding="mono8")
    with pytest.raises(BagError, match="image is 17x12 but its label 17x11"), BagWriter(tmp_path / "b", CAMVID) as bag:
        bag.write(frames()[0][0], frames()[0][1][1:], 1)


def test_spool_returns_masks_by_stamp() -> None:
    masks = [label for _, label in frames()]
    with MaskSpool() as spool:
        for stamp, mask in zip(STAMPS[::-1], masks[::-1], strict=True):
            spool.put_mask(stamp, mask)
        spool.put_mask(STAMPS[0], masks[1])  # a second one under the same stamp
        assert spool.stamps() == STAMPS and len(spool) == 3 and spool.get(5) is None
        for stamp, mask in zip(STAMPS, [masks[1], masks[1], masks[2]], strict=True):
            np.testing.assert_array_equal(spool.get(stamp), mask)


@settings(max_examples=60, deadline=None)
@given(
    storage=st.sampled_from(["mcap", "sqlite3"]),
    metadata=st.booleans(),
    where=st.floats(0, 1, exclude_max=True),
    value=st.integers(0, 255),
)
def test_a_damaged_byte_gives_a_bag_error_or_does_not_matter(
    storage: str, metadata: bool, where: float, value: int
) -> None:
    with TemporaryDirectory() as folder:
        path = write(Path(folder) / "bag", storage)
        suffixes = (".yaml",) if metadata else (".mcap", ".db3")
        file = next(f for f in path.iterdir() if f.suffix in suffixes)
        content = bytearray(file.read_bytes())
        content[int(where * len(content))] = value
        file.write_bytes(content)
        try:
            with Bag(path) as bag:
                stamps = bag.check(CAMVID)
                for stamp, message in bag.image_messages():
                    assert stamp in stamps
                    with suppress(FrameError):
                        to_rgb(message)
        except BagError as error:
            assert len(str(error)) > 20
