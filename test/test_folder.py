"""Frames from a plain folder."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from sparserefine_ros.datasets.folder import Folder
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
    with pytest.raises(DatasetError, match=r"shape \(2, 2\); expected .*\(4, 6\)"):
        Folder(root)[1]
    (root / "image" / "a.png").write_bytes(b"no picture")
    with pytest.raises(DatasetError, match="cannot decode .*a.png"):
        Folder(root)[0]
    (root / "classes.yaml").write_text("name: x\nnames: [a]\n")
    with pytest.raises(DatasetError, match="palette"):
        Folder(root)
