"""Picture files to arrays, what a file holds, whatever its name; and arrays to PNG.

Shape shorthand: H, W image height and width in pixels.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from sparserefine_ros.errors import DatasetError

_JPEG = b"\xff\xd8\xff"
_PNG = b"\x89PNG\r\n\x1a\n"
_COLOURS = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGB with alpha"}  # PNG's colour types


def read_rgb(file: Path) -> np.ndarray:
    """RGB [H, W, 3] uint8 of a JPEG or PNG, turned as its EXIF orientation says.

    Raises DatasetError for a file that cannot be read or decoded.
    """
    return cv2.cvtColor(_decode(file, _read(file), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def turned_from(file: Path) -> tuple[int, int] | None:
    """(H, W) as stored of a picture that its EXIF orientation turns; None for others. Raises as `read_rgb`."""
    data = _read(file)
    if data.startswith((_JPEG, _PNG)) and b"Exif" not in data and b"eXIf" not in data:
        return None  # most, without being decoded once more
    stored = _decode(file, data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    upright = _decode(file, data, cv2.IMREAD_COLOR)
    return None if np.array_equal(stored, upright) else (stored.shape[0], stored.shape[1])


def read_ids(file: Path) -> np.ndarray:
    """Class ids [H, W] uint8 of a grey PNG of 8 bits; DatasetError for anything else.

    Other PNGs hold no ids once they are decoded: a palette gives colours, grey of 1 bit gives 0 and 255.
    """
    data = _read(file)
    ids = _decode(file, data, cv2.IMREAD_UNCHANGED)
    bits, colour = (data[24], data[25]) if data.startswith(_PNG) else (0, 0)
    if bits != 8 or colour != 0 or ids.ndim != 2:  # transparency makes three channels of one
        kind = f"a PNG of {bits} bits, {_COLOURS.get(colour, 'unknown')}" if bits else "no PNG"
        raise DatasetError(f"{file} is {kind}; save the class ids as grey PNG of 8 bits, of a palette the indices")
    return ids


def check_size(file: Path, label: np.ndarray, image: np.ndarray) -> None:
    """DatasetError where ``label``, read from ``file``, is of another size than its ``image``."""
    if label.shape != image.shape[:2]:
        raise DatasetError(
            f"{file} is {label.shape[1]}x{label.shape[0]}, its frame {image.shape[1]}x{image.shape[0]}; resize the "
            "labels by nearest neighbour, or take the frames that belong to them"
        )


def encode_png(picture: np.ndarray) -> bytes:
    """A PNG of RGB [H, W, 3] or grey [H, W], uint8."""
    if picture.ndim == 3:
        picture = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".png", picture, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DatasetError(f"cannot read {file}: {error.strerror}") from error


def _decode(file: Path, data: bytes, flags: int) -> np.ndarray:
    # Not cv2.imread: a name that is no UTF-8 ends the process with a segmentation fault there (OpenCV 5.0).
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:  # no bytes at all, or more pixels than OpenCV takes
        image = None
    if image is None:
        raise DatasetError(f"cannot decode {file}; give JPEG or PNG files")
    return np.asarray(image)
