"""The frames of a split, held in memory, from the data set description that recipes and bundles carry.

dataset: {kind: camvid}                        with the folder of CamVid given on the command line
dataset: {kind: street, train_drives: 40, val_drives: 8, frames: 5, size: [1024, 2048]}
                                               refiner_drives: 40 adds drives for the refiner alone
dataset: {kind: folder}                        frames of one's own: a folder with classes.yaml, train/ and val/, each
                                               with image/ and label/ as `datasets.folder` has them, given on the
                                               command line; bundles add classes: [their names]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.progress import track

from sparserefine_ros.datasets.base import FrameSource, Sample
from sparserefine_ros.datasets.classes import CAMVID, CITYSCAPES, ClassList
from sparserefine_ros.errors import DatasetError

STREET_VAL_SEED = 1000
"""Drives from this seed on are never trained on."""

Split = tuple[ClassList, list[Sample]]


def load_split(dataset: Mapping[str, Any], split: str, root: Path | None) -> Split:
    """Classes and samples of ``split``; DatasetError for an unknown kind, a description that lacks something, no root.

    Splits are "train", "val" and "refiner": frames that the dense segmenter never saw, where a data set has some to
    spare, so that the refiner meets the mistakes it will meet later; otherwise those of "train".
    """
    kind = dataset.get("kind")
    readers: dict[Any, Callable[[Mapping[str, Any], str, Path | None], Split]] = {
        "camvid": _camvid, "street": _street, "folder": _folder
    }  # fmt: skip
    if not dataset:
        raise DatasetError(
            "the bundle does not say what data set it was trained on, as an imported one cannot; this is measured on "
            f"its validation frames ({', '.join(readers)}), and `sparserefine evaluate` on a bag of yours"
        )
    if not isinstance(kind, str) or kind not in readers:
        raise DatasetError(f"dataset kind {kind!r} is unknown; known are {', '.join(readers)}")
    return readers[kind](dataset, split, root)


def _camvid(dataset: Mapping[str, Any], split: str, root: Path | None) -> Split:
    from sparserefine_ros.datasets.camvid import CamVid

    if root is None:
        raise DatasetError("this needs CamVid: give the folder that holds train/ and val/ with --data")
    split = "train" if split == "refiner" else split
    return CAMVID, _read([CamVid(root, split)], 1, f"reading CamVid {split}")


def _folder(dataset: Mapping[str, Any], split: str, root: Path | None) -> Split:
    from sparserefine_ros.datasets.folder import Folder

    if root is None:
        raise DatasetError("this needs labelled frames: give the folder with classes.yaml, train/ and val/ with --data")
    split = "train" if split == "refiner" else split
    if not (root / split / "image").is_dir():  # where there is none, `Folder` would take those of the root for both
        raise DatasetError(f"{root / split} has no folder image; put frames of that split there, labels into label")
    source = Folder(root, split)
    names = list(source.classes.names)
    if dataset.get("classes", names) != names:
        raise DatasetError(
            f"{root / 'classes.yaml'} names {', '.join(names)}, but the bundle was trained on "
            f"{', '.join(map(str, dataset['classes']))}; ids must mean the same"
        )
    frames = _read([source], 1, f"reading {root.name} {split}")
    if not (labelled := [frame for frame in frames if frame.label is not None]):
        raise DatasetError(f"no frame in {root / split} has a label; put PNG files of class ids into label")
    return source.classes, labelled


def _street(dataset: Mapping[str, Any], split: str, root: Path | None) -> Split:
    from sparserefine_ros.datasets.street import Street

    _check_street(dataset)
    first, drives = {
        "train": (0, dataset["train_drives"]),
        "val": (STREET_VAL_SEED, dataset["val_drives"]),
        "refiner": (dataset["train_drives"], dataset.get("refiner_drives", 0)),
    }[split]
    if drives == 0:
        return _street(dataset, "train", root)
    height, width = dataset.get("size", (1024, 2048))
    # One frame every two seconds: neighbours in time teach little that is new.
    sources = (Street(dataset["frames"], seed, (height, width), fps=0.5) for seed in range(first, first + drives))
    return CITYSCAPES, _read(sources, drives, f"rendering street {split}")


def _check_street(dataset: Mapping[str, Any]) -> None:
    """DatasetError for a number of drives or frames that cannot be."""
    for key, least in {"train_drives": 1, "val_drives": 1, "refiner_drives": 0, "frames": 1}.items():
        value = dataset.get(key, 0)
        if not isinstance(value, int) or value < least:
            raise DatasetError(f"dataset street has {key} {value!r}; give a whole number from {least} on")
    if (drives := dataset["train_drives"] + dataset.get("refiner_drives", 0)) > STREET_VAL_SEED:
        raise DatasetError(
            f"dataset street has {drives} train_drives and refiner_drives; give at most {STREET_VAL_SEED}, since "
            "drives from that seed on are those of val"
        )
    size = dataset.get("size", (1024, 2048))
    if not isinstance(size, (list, tuple)) or len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        raise DatasetError(f"dataset street has size {size!r}; give [height, width] in pixels")


def _read(sources: Iterable[FrameSource], count: int, title: str) -> list[Sample]:
    """All samples of ``count`` sources; a source is let go once read, since a street holds its world in memory."""
    return [source[i] for source in track(sources, description=title, total=count) for i in range(len(source))]
