"""Masks of a replay, kept in an unnamed temporary file: a long drive at 2 megapixels must not fill the memory.

Shape shorthand: H, W image height and width in pixels.
"""

from __future__ import annotations

import contextlib
import tempfile
from types import TracebackType

import numpy as np

from sparserefine_ros.errors import BagError
from sparserefine_ros.evaluation import bag_messages as messages


class MaskSpool:
    """Masks by stamp. ``put`` takes the serialised message as it arrived, so that a replay does no more than write."""

    def __init__(self, topic: str = "the mask topic") -> None:
        self.topic = topic
        self._file = tempfile.TemporaryFile(prefix="sparserefine_masks_")  # noqa: SIM115 - closed by close()
        self._places: dict[int, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __enter__(self) -> MaskSpool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Deletes the masks."""
        with contextlib.suppress(OSError):  # a full disk: what was to be written there is not wanted any more
            self._file.close()

    def stamps(self) -> list[int]:
        """Stamps of all masks, in ns, in growing order."""
        return sorted(self._places)

    def put(self, stamp_ns: int, message: bytes) -> None:
        """Keeps a serialised sensor_msgs/Image (mono8 class ids); a second one with the same stamp takes its place.

        Raises BagError where the disk is full.
        """
        try:
            place = self._file.seek(0, 2)
            self._file.write(message)
        except OSError as error:
            raise BagError(
                f"cannot keep the masks in {tempfile.gettempdir()} after {len(self)} of them: {error.strerror}; "
                "set TMPDIR to a folder with more space"
            ) from error
        self._places[stamp_ns] = (place, len(message))

    def put_mask(self, stamp_ns: int, mask: np.ndarray) -> None:
        """Keeps a mask that never was a message: [H, W] uint8 class ids."""
        self.put(stamp_ns, messages.image_message(mask, "mono8", stamp_ns, ""))

    def get(self, stamp_ns: int) -> np.ndarray | None:
        """The mask [H, W] uint8, or None where none has this stamp. Raises BagError if it is no mono8 image."""
        if stamp_ns not in self._places:
            return None
        place, size = self._places[stamp_ns]
        self._file.seek(place)
        message = messages.deserialize(self._file.read(size), messages.IMAGE)
        return messages.label_array(message, self.topic)
