"""The node's log: how often it may say the same, and what the package says through Python's logging."""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable
from typing import Any

PACKAGE = logging.getLogger("sparserefine_ros")


class Throttle:
    """Lets one message about a thing through in `period_s`.

    rclpy's own throttle goes by the place in the source: there one camera's warnings would hide another's.
    """

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._said: dict[Hashable, float] = {}

    def __call__(self, about: Hashable, now: float | None = None) -> bool:
        """Whether it is time to speak about it again; `now` in seconds of a steady clock."""
        now = time.monotonic() if now is None else now
        self._said = {thing: at for thing, at in self._said.items() if now - at < self._period_s}
        if about in self._said:
            return False
        self._said[about] = now
        return True


class RosHandler(logging.Handler):
    """Passes records of level INFO and above to a node's logger, until it is closed."""

    def __init__(self, logger: Any) -> None:
        super().__init__(logging.INFO)
        self._logger = logger
        PACKAGE.setLevel(logging.INFO)
        PACKAGE.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        # rclpy knows a call by its place in the source and lets no place change its severity: one line each.
        if record.levelno >= logging.WARNING:
            self._logger.warning(record.getMessage())
        else:
            self._logger.info(record.getMessage())

    def close(self) -> None:
        PACKAGE.removeHandler(self)
        super().close()
