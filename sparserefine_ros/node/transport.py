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

FEW = 8  # frames, or gaps between them, that tell nothing yet
COUNTED_LOSS, ESTIMATED_LOSS = 0.2, 0.4  # more is worth a complaint


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
    """Whether the user has told Fast DDS how to carry large images, in a way that it heeds.

    Fast DDS 2 reads the second of the PROFILE_VARIABLES alone, 3 both; neither says much of a file that is not there.
    LARGE_DATA of 2 loses images all the same, and so does that of 3 where discovery keeps to this machine.
    """
    values = os.environ if environment is None else environment
    second = profile_variable(values) == PROFILE_VARIABLES[1]
    files = (values.get(name, "") for name in PROFILE_VARIABLES[second:])
    return any(Path(file).is_file() for file in files) or (not second and _large_data(values))


def _large_data(values: Mapping[str, str]) -> bool:
    local = values.get("ROS_AUTOMATIC_DISCOVERY_RANGE", "").upper() == "LOCALHOST" or (
        values.get("ROS_LOCALHOST_ONLY") == "1"
    )
    return values.get("FASTDDS_BUILTIN_TRANSPORTS", "").startswith("LARGE_DATA") and not local


def profile_variable(environment: Mapping[str, str] | None = None) -> str:
    """The variable that names the profile in the ROS distribution of this environment; kilted where none is sourced."""
    values = os.environ if environment is None else environment
    return PROFILE_VARIABLES[values.get("ROS_DISTRO", "") in FAST_DDS_2]


def profile_env(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment variables that give a process the shipped profile; empty where the user has chosen one."""
    return {} if has_profile(environment) else {profile_variable(environment): str(config_file("fastdds.xml"))}


def remedy(everywhere: bool = True) -> str:
    """What to do about lost images, for every process, or for those of the publishers alone."""
    try:
        file = str(config_file("fastdds.xml"))
    except FileNotFoundError:  # an incomplete installation; the node only gives advice here
        file = "config/fastdds.xml of this package's source"
    setting = f"set {profile_variable()}={file}"
    if everywhere:
        return f"{setting} for every process that handles images (segment.launch.py sets it for the node)"
    return f"if images are large, {setting} for the process that publishes them too"


def on_fast_dds(rmw: str) -> bool:
    """`rmw` is rclpy.get_rmw_implementation_identifier()."""
    return "fastrtps" in rmw


def loses_images(rmw: str, environment: Mapping[str, str] | None = None) -> bool:
    """Whether images will be lost: `rmw` is Fast DDS without a profile."""
    return on_fast_dds(rmw) and not has_profile(environment)


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

    def __init__(self, silence_s: float = 3.0, window: int = 60) -> None:
        self._silence_s = silence_s
        self._stamps: deque[int] = deque(maxlen=window)
        self._lost: deque[int | None] = deque(maxlen=window)
        self._last: float | None = None

    def arrived(self, stamp_ns: int | None, now: float, lost: int | None = None) -> None:
        """Notes a frame's stamp and its arrival at `now`, in seconds of a steady clock.

        lost: how many are missing so far, by their publishers' numbers; None where the middleware gives none.
        """
        self._last = now
        self._lost.append(lost)
        if stamp_ns is not None:
            self._stamps.append(stamp_ns)

    def loss(self) -> float:
        """Fraction of frames lost on the way, of the last ones; 0 while too few are known."""
        counted = self._counted()
        return self._estimated() if counted is None else counted

    def _counted(self) -> float | None:
        """By the publishers' numbers; None where there are none."""
        lost = [count for count in self._lost if count is not None]
        if not lost:
            return None
        missing, received = lost[-1] - lost[0], len(lost) - 1
        return missing / (missing + received) if missing + received >= FEW else 0.0

    def _estimated(self) -> float:
        """From the gaps between stamps. The camera's period is taken as the smallest gap but for a fifth of them, so
        that uneven stamps do no harm. Gaps that are silence are no loss: a camera that was off, a clock that jumped, a
        bag that begins again.
        """
        stamps = list(self._stamps)
        steps = (b - a for a, b in zip(stamps, stamps[1:], strict=False))
        gaps = sorted(step for step in steps if 0 < step <= self._silence_s * 1e9)
        if len(gaps) < FEW:
            return 0.0
        return max(0.0, 1.0 - len(gaps) * gaps[len(gaps) // 5] / sum(gaps))

    def silent_s(self, now: float, started: float) -> float | None:
        """For how long no frame has come, where that is too long; a subscription that `started` may wait as long."""
        silent = now - (started if self._last is None else max(self._last, started))
        return silent if silent > self._silence_s else None

    def complaint(self, now: float, publishers: int, started: float) -> str:
        """What is wrong with the frames' arrival at `now`; empty when nothing is."""
        if publishers == 0:
            return ""
        if (silent := self.silent_s(now, started)) is not None:
            return f"no image for {silent:.0f} s although {publishers} publisher(s) offer the topic"
        counted = self._counted()
        if counted is not None:
            return f"{100 * counted:.0f} % of the images are lost before they arrive" if counted > COUNTED_LOSS else ""
        estimated = self._estimated()
        if estimated > ESTIMATED_LOSS:
            return f"about {100 * estimated:.0f} % of the images seem lost, by the gaps between their stamps"
        return ""
