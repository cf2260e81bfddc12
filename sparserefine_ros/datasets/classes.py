"""Class lists with their palettes: the one place where a class has its id, name and colour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_CLASSES = 255  # ids 0 to 254; 255 is a pixel that nobody labelled


@dataclass(frozen=True)
class ClassList:
    """Names and RGB colours of classes 0 .. K-1."""

    name: str
    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.palette):
            raise ValueError(
                f"class list {self.name!r} has {len(self.names)} names but {len(self.palette)} colours; give one each"
            )

    @classmethod
    def from_data(cls, data: Any) -> ClassList:
        """What `as_data` gave, from a file that somebody else may have written.

        Raises KeyError, TypeError or ValueError where it is no class list.
        """
        names, palette = data["names"], data["palette"]
        for key, given in (("names", names), ("palette", palette)):
            if not isinstance(given, list):
                raise ValueError(f"{key} {given!r:.80}; expected a list")
        if not 1 <= len(names) <= MAX_CLASSES:
            raise ValueError(f"{len(names)} classes; expected 1 to {MAX_CLASSES}")
        if nameless := [name for name in names if not (isinstance(name, str) and name.strip())]:
            where = names.index(nameless[0])
            raise ValueError(f"class {where} is called {nameless[0]!r:.80}; expected text, in quotes")
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise ValueError(f"two classes are called {twice[0]!r:.80}; give each a name of its own")
        if wrong := [colour for colour in palette if not _is_colour(colour)]:
            raise ValueError(f"colour {wrong[0]!r:.80}; expected [red, green, blue], each 0 to 255")
        return cls(str(data["name"]), tuple(names), tuple((r, g, b) for r, g, b in palette))

    def as_data(self) -> dict[str, Any]:
        """As YAML and JSON take it."""
        return {"name": self.name, "names": list(self.names), "palette": [list(colour) for colour in self.palette]}

    def __len__(self) -> int:
        return len(self.names)

    def lut(self) -> np.ndarray:
        """[256, 3] uint8 look-up table: ``lut()[mask]`` colours a mask; ids without a class are black."""
        table = np.zeros((256, 3), np.uint8)
        table[: len(self)] = self.palette
        return table


def _is_colour(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(v) is int and 0 <= v <= 255 for v in value)


# Ids as in the CamVid labels of 11 classes at 480x360.
CAMVID = ClassList(
    "camvid",
    (
        "sky", "building", "pole", "road", "pavement", "tree",
        "sign", "fence", "car", "pedestrian", "bicyclist",
    ),
    (
        (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (0, 0, 192), (128, 128, 0),
        (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
    ),
)  # fmt: skip

# Ids are Cityscapes "train ids".
CITYSCAPES = ClassList(
    "cityscapes",
    (
        "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation",
        "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
    ),
    (
        (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153),
        (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60),
        (255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
    ),
)  # fmt: skip

CLASS_LISTS: dict[str, ClassList] = {c.name: c for c in (CAMVID, CITYSCAPES)}
