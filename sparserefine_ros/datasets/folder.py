"""Anybody's frames: a folder of pictures, with or without labels.

    ROOT/classes.yaml          name: NAME, names: [road, ...], palette: [[128, 64, 128], ...]
    ROOT/[SPLIT/]image/*       JPEG or PNG
    ROOT/[SPLIT/]label/*.png   one channel of class ids, 255 = unlabelled; may be absent

Pictures are turned upright, as their EXIF orientation says, and a label belongs to its picture as it is shown.
"""  # fmt: skip

from __future__ import annotations

from pathlib import Path

import numpy as np

from sparserefine_ros.datasets.base import UNLABELLED, Sample
from sparserefine_ros.datasets.classes import ClassList
from sparserefine_ros.datasets.pictures import check_size, read_ids, read_rgb, turned_from
from sparserefine_ros.errors import DatasetError
from sparserefine_ros.untrusted import load_yaml

PICTURES = (".jpg", ".jpeg", ".png")


class Folder:
    """The pictures of a folder in the order of their names.

    Raises DatasetError for a missing folder or classes file, an undecodable picture, a label of another size or with an
    id that is no class, or labels of which none has the name of a frame.
    """

    def __init__(self, root: str | Path, split: str = "", fps: float = 10.0) -> None:
        root = Path(root)
        folder = root / split if (root / split / "image").is_dir() else root
        found = (folder / "image").iterdir() if (folder / "image").is_dir() else ()
        self.images = sorted(path for path in found if path.suffix.lower() in PICTURES)
        if not self.images:
            raise DatasetError(f"no {', '.join(PICTURES)} files in {folder / 'image'}; put the frames there")
        there = sorted((folder / "label").iterdir()) if (folder / "label").is_dir() else []
        self._labels = {path.stem: path for path in there if path.suffix.lower() == ".png"}
        if self._labels and not any(image.stem in self._labels for image in self.images):
            raise DatasetError(
                f"none of the {len(self._labels)} labels in {folder / 'label'} has the name of a frame: "
                f"{self.images[0].name} would need {self.images[0].stem}.png"
            )
        self.classes = read_classes(root / "classes.yaml")
        self.fps = fps

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        file = self.images[index]
        image = read_rgb(file)
        return Sample(image, self._label(file, image), file.stem, round(index * 1e9 / self.fps))

    def _label(self, picture: Path, image: np.ndarray) -> np.ndarray | None:
        file = self._labels.get(picture.stem)
        if file is None:
            return None
        label = read_ids(file)
        if label.shape == turned_from(picture):
            raise DatasetError(
                f"{picture} is turned by its EXIF orientation, and {file} fits the pixels as they are stored: nothing "
                "says that it is turned, too; save picture and label upright, without that orientation"
            )
        check_size(file, label, image)
        known = label[label != UNLABELLED]
        if known.size and known.max() >= len(self.classes):
            raise DatasetError(
                f"{file} holds id {known.max()}, but classes.yaml lists {len(self.classes)} classes; "
                f"give ids below that, or {UNLABELLED} for unlabelled pixels"
            )
        return label


def read_classes(file: Path) -> ClassList:
    """The class list that a YAML file gives as name, names and palette; DatasetError where it does not."""
    try:
        return ClassList.from_data(load_yaml(file))
    except OSError as error:
        raise DatasetError(f"cannot read {file}: {error.strerror}; it must give name, names and palette") from error
    except (KeyError, TypeError, ValueError) as error:
        raise DatasetError(f"cannot use {file}: {error!r}; it must give name, names and palette") from error
