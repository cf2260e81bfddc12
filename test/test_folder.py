"""Frames from a plain folder."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from sparserefine_ros.datasets.folder import Folder, read_classes
from sparserefine_ros.errors import DatasetError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "classes.yaml").write_text("name: two\nnames: [floor, wall]\npalette: [[1, 2, 3], [4, 5, 6]]\n")
    (tmp_path / "image").mkdir()
    (tmp_path / "label").mkdir()
    cv2.imwrite(str(tmp_path / "image" / "b.png"), np.full((4, 6, 3), (30, 20, 10), np.uint8))  # BGR
    cv2.imwrite(str(tmp_path / "image" / "a.png"), np.zeros((4, 6, 3), np.uint8))
    cv2.imwrite(str(tmp_path / "label" / "b.png"), np.array([[0, 1, 255]] * 4, np.uint8).repeat(2, 1))
    return tmp_path


def test_pictures_labels_and_classes(root: Path) -> None:
    data = Folder(root, "val", fps=4.0)
    assert len(data) == 2 and data.classes.names == ("floor", "wall")
    assert data[0].name == "a" and data[0].label is None
    second = data[1]
    assert second.stamp_ns == 250_000_000
    assert second.image[0, 0].tolist() == [10, 20, 30]
    assert second.label is not None and second.label[0].tolist() == [0, 0, 1, 1, 255, 255]


def test_a_split_has_its_own_folder(root: Path) -> None:
    (root / "val" / "image").mkdir(parents=True)
    cv2.imwrite(str(root / "val" / "image" / "c.jpg"), np.zeros((4, 6, 3), np.uint8))
    assert [Folder(root, "val")[0].name, Folder(root)[0].name] == ["c", "a"]


def test_labels_are_found_by_any_ending_and_missed_by_no_name(root: Path) -> None:
    label = root / "label" / "b.png"
    label.rename(label.with_suffix(".PNG"))
    assert Folder(root)[1].label is not None
    label.with_suffix(".PNG").rename(root / "label" / "b_trainIds.png")
    with pytest.raises(DatasetError, match=r"none of the 1 labels .* a\.png would need a\.png"):
        Folder(root)


def test_what_is_wrong_is_said(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no .jpg.*in .*nowhere"):
        Folder(root / "nowhere")
    cv2.imwrite(str(root / "label" / "b.png"), np.full((4, 6), 2, np.uint8))
    with pytest.raises(DatasetError, match="holds id 2, but classes.yaml lists 2"):
        Folder(root)[1]
    cv2.imwrite(str(root / "label" / "b.png"), np.zeros((2, 2), np.uint8))
    with pytest.raises(DatasetError, match="b.png is 2x2, its frame 6x4; resize"):
        Folder(root)[1]
    (root / "image" / "a.png").write_bytes(b"no picture")
    with pytest.raises(DatasetError, match="cannot decode .*a.png"):
        Folder(root)[0]
    (root / "classes.yaml").write_text("name: x\nnames: [a]\n")
    with pytest.raises(DatasetError, match="palette"):
        Folder(root)


def turned(jpeg: bytes, orientation: int) -> bytes:
    """The file with an EXIF orientation: 3 = by 180 degrees, 6 = by 90 degrees."""
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0) + b"\0\0\0\0"
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]


def test_a_label_belongs_to_the_picture_as_exif_shows_it(root: Path) -> None:
    stored = np.zeros((8, 16, 3), np.uint8)
    stored[:, :8] = 255
    label = (stored[..., 0] > 0).astype(np.uint8)
    picture, ids = root / "image" / "b.jpg", root / "label" / "b.png"
    (root / "image" / "b.png").unlink()
    for orientation, shown in ((6, np.rot90(label, -1)), (3, np.rot90(label, 2))):
        picture.write_bytes(turned(cv2.imencode(".jpg", stored)[1].tobytes(), orientation))
        cv2.imwrite(str(ids), label)  # fits the pixels as stored
        with pytest.raises(DatasetError, match="b.jpg is turned by its EXIF.*save picture and label upright"):
            Folder(root)[1]
        ids.unlink()
        np.testing.assert_array_equal(Folder(root)[1].image[..., 0] > 127, shown)
    picture.write_bytes(turned(cv2.imencode(".jpg", stored)[1].tobytes(), 6))
    cv2.imwrite(str(ids), np.rot90(label, -1))
    sample = Folder(root)[1]
    np.testing.assert_array_equal(sample.image[..., 0] > 127, sample.label)


@pytest.mark.parametrize(
    ("bits", "colour", "words"),
    [(1, 0, "a PNG of 1 bits, grey"), (8, 3, "a PNG of 8 bits, palette"), (16, 0, "a PNG of 16 bits, grey")],
)
def test_a_label_that_holds_no_ids_is_told(root: Path, bits: int, colour: int, words: str) -> None:
    """Decoded, grey of 1 bit would be 0 and 255: class 1 would go unlabelled."""
    data = bytes([0] + [1] * max(1, 6 * bits // 8)) * 4

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 6, 4, bits, colour, 0, 0, 0))
    palette = chunk(b"PLTE", bytes(6)) if colour == 3 else b""
    png = b"\x89PNG\r\n\x1a\n" + header + palette + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    (root / "label" / "b.png").write_bytes(png)
    with pytest.raises(DatasetError, match=f"b.png is {words}; save the class ids as grey PNG of 8 bits"):
        Folder(root)[1]
    (root / "label" / "b.png").write_bytes(cv2.imencode(".jpg", np.ones((4, 6), np.uint8))[1].tobytes())
    with pytest.raises(DatasetError, match="b.png is no PNG"):
        Folder(root)[1]


def test_names_that_are_no_utf8(root: Path) -> None:
    """cv2.imread ends the process there."""
    os.rename(root / "image" / "b.png", os.fsencode(root / "image") + b"/b\xe9.png")
    os.rename(root / "label" / "b.png", os.fsencode(root / "label") + b"/b\xe9.png")
    sample = Folder(root)[1]
    assert sample.image[0, 0].tolist() == [10, 20, 30] and sample.label is not None


def test_a_file_that_cannot_be_read_is_told(root: Path) -> None:
    (root / "image" / "a.png").unlink()
    (root / "image" / "a.png").symlink_to("nowhere.png")
    with pytest.raises(DatasetError, match="cannot read .*a.png: No such file"):
        Folder(root)[0]
    (root / "image" / "a.png").unlink()
    (root / "image" / "a.png").touch()
    with pytest.raises(DatasetError, match="cannot decode .*a.png"):
        Folder(root)[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "{name: x, names: [a], palette: [[300, 0, 0]]}",
            r"colour \[300, 0, 0\]; expected \[red, green, blue\], each 0 to 255",
        ),
        ("{name: x, names: [], palette: []}", "0 classes; expected 1 to 255"),
        ("{name: x, names: ab, palette: [[0, 0, 0], [1, 1, 1]]}", "names 'ab'; expected a list"),
        (f"{{name: x, names: {['c'] * 256}, palette: {[[0, 0, 0]] * 256}}}", "256 classes; expected"),
    ],
)
def test_class_lists_that_cannot_be(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "classes.yaml").write_text(text)
    with pytest.raises(DatasetError, match=words):
        read_classes(tmp_path / "classes.yaml")
