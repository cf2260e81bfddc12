"""CamVid, 480x360, 11 classes (Brostow et al., 2009)."""

from __future__ import annotations

from pathlib import Path

from sparserefine_ros.datasets.base import UNLABELLED, Sample
from sparserefine_ros.datasets.classes import CAMVID, ClassList
from sparserefine_ros.datasets.pictures import check_size, read_ids, read_rgb
from sparserefine_ros.errors import DatasetError

VOID = 11
"""The id that CamVid's label files give to pixels without a class."""


class CamVid:
    """Frames of one split, in the order of their names.

    ``root/split/image/NAME.jpg`` beside ``root/split/label/NAME.png`` (uint8 ids 0-10, 11 = void).
    Raises DatasetError for a missing folder, a frame without its label, or an id above 11.
    """

    classes: ClassList = CAMVID

    def __init__(self, root: str | Path, split: str = "train", fps: float = 15.0) -> None:
        folder = Path(root) / split
        self.images = sorted((folder / "image").glob("*.jpg"))
        if not self.images:
            raise DatasetError(
                f"no frames in {folder / 'image'}; give the folder that holds train/ and val/, "
                "each with image/*.jpg and label/*.png"
            )
        self.labels = [folder / "label" / f"{image.stem}.png" for image in self.images]
        missing = [label for label in self.labels if not label.is_file()]
        if missing:
            raise DatasetError(f"{len(missing)} of {len(self.images)} frames have no label, the first {missing[0]}")
        self.fps = fps

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        image, label = read_rgb(self.images[index]), read_ids(self.labels[index])
        if int(label.max()) > VOID:
            raise DatasetError(f"{self.labels[index]} has largest id {int(label.max())}; expected ids 0-{VOID}")
        check_size(self.labels[index], label, image)
        label[label == VOID] = UNLABELLED
        return Sample(image, label, self.images[index].stem, round(index * 1e9 / self.fps))
