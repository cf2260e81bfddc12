"""Large images over Fast DDS: the profile they need, and the signs that it is missing.

Fast DDS's shared-memory segment holds 512 kB by default. A camera image does not fit, is cut into pieces, and
losing one piece loses the image: of 300 images of 6 MB, 0 to 56 arrive over best-effort QoS. With
config/fastdds.xml all do.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping
from pathlib import Path

# Fast DDS 3 (kilted and later) reads the first name and warns of the second, which Fast DDS 2 needs.
PROFILE_VARIABLES = ("FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE")
FAST_DDS_2 = ("humble", "iron", "jazzy")


def share_folders() -> list[Path]:
    """Where config/ may lie: the source checkout, ROS prefixes, the prefix this package is installed under."""
    above = Path(__file__).resolve().parents[2:7]  # PREFIX/lib/python3.x/site-packages and what holds it
    prefixes = [Path(p) for p in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep) if p]
    return [above[0], *(prefix / "share" / "sparserefine_ros" for prefix in (*prefixes, *above))]


def config_file(name: str) -> Path:
    """The path of config/`name`; FileNotFoundError with the places looked at."""
    candidates = [folder / "config" / name for folder in share_folders()]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"{name} is in none of: {', '.join(map(str, candidates))}; reinstall sparserefine_ros")


def has_profile(environment: Mapping[str, str] | None = None) -> bool:
    """Whether the user has told Fast DDS how to carry large images."""
    values = os.environ if environment is None else environment
    large_data = values.get("FASTDDS_BUILTIN_TRANSPORTS", "").startswith("LARGE_DATA")
    return large_data or any(values.get(name) for name in PROFILE_VARIABLES)


def profile_variable(environment: Mapping[str, str] | None = None) -> str:
    """The variable that names the profile in the ROS distribution of this environment; kilted where none is sourced."""
    values = os.environ if environment is None else environment
    return PROFILE_VARIABLES[values.get("ROS_DISTRO", "") in FAST_DDS_2]


def profile_env(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment variables that give a process the shipped profile; empty where the user has chosen one."""
    return {} if has_profile(environment) else {profile_variable(environment): str(config_file("fastdds.xml"))}


def remedy() -> str:
    """What to do about lost images."""
    try:
        file = str(config_file("fastdds.xml"))
    except FileNotFoundError:  # an incomplete installation; the node only gives advice here
        file = "config/fastdds.xml of this package's source"
    return (
        f"set {profile_variable()}={file} for every process that handles images "
        "(segment.launch.py sets it for the node)"
    )


def loses_images(rmw: str, environment: Mapping[str, str] | None = None) -> bool:
    """Whether images will be lost: `rmw` (rclpy.get_rmw_implementation_identifier()) is Fast DDS without a profile."""
    return "fastrtps" in rmw and not has_profile(environment)


def stamp_of(frame: bytes | memoryview) -> int | None:
    """header.stamp in nanoseconds of a serialized message that starts with a std_msgs/Header.

    After CDR's four bytes of encapsulation (the second is 1 for little-endian) come int32 seconds and uint32
    nanoseconds.
    """
    if len(frame) < 12:
        return None
    order = "little" if frame[1] & 1 else "big"
    seconds = int.from_bytes(frame[4:8], order, signed=True)  # type: ignore[arg-type]
    return seconds * 10**9 + int.from_bytes(frame[8:12], order)  # type: ignore[arg-type]


class Arrivals:
    """Watches frames arrive and says when they stop or when many are missing.

    Not thread-safe: the subscription callback and the diagnostics timer share one executor thread.
    """

    def __init__(self, silence_s: float = 3.0, window: int = 60, tolerated_loss: float = 0.4) -> None:
        self._silence_s, self._tolerated_loss = silence_s, tolerated_loss
        self._stamps: deque[int] = deque(maxlen=window)
        self._last: float | None = None

    def arrived(self, stamp_ns: int | None, now: float) -> None:
        """Notes a frame's stamp and its arrival at `now`, in seconds of a steady clock."""
        self._last = now
        if stamp_ns is not None:
            self._stamps.append(stamp_ns)

    def loss(self) -> float:
        """Estimated fraction of frames lost on the way, from the gaps between stamps; 0 while too few are known.

        The camera's period is taken as the second smallest gap, so that one irregular pair does no harm. Gaps that are
        silence are no loss: a camera that was off, a clock that jumped, a bag that begins again.
        """
        stamps = list(self._stamps)
        steps = (b - a for a, b in zip(stamps, stamps[1:], strict=False))
        gaps = sorted(step for step in steps if 0 < step <= self._silence_s * 1e9)
        if len(gaps) < 8:
            return 0.0
        return max(0.0, 1.0 - len(gaps) * gaps[1] / sum(gaps))

    def complaint(self, now: float, publishers: int, started: float) -> str:
        """What is wrong with the frames' arrival at `now`; empty when nothing is."""
        if publishers == 0:
            return ""
        silent = now - (started if self._last is None else max(self._last, started))
        if silent > self._silence_s:
            return f"no image for {silent:.0f} s although {publishers} publisher(s) offer the topic"
        if self.loss() > self._tolerated_loss:
            return f"about {100 * self.loss():.0f} % of the images are lost before they arrive"
        return ""
