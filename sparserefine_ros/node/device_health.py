"""Memory and temperature, where they can be read without starting a program."""

from __future__ import annotations

import gc
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

MB = 1e6


def device_health(
    device: Any, proc: Path = Path("/proc"), thermal: Path = Path("/sys/class/thermal")
) -> dict[str, str]:
    """Diagnostic values: resident memory of this process, free and whole memory of a CUDA `device`, temperature.

    The temperature is the hottest thermal zone's, in degrees Celsius; a Jetson's GPU is among them. What cannot be
    read is left out.
    """
    values: dict[str, str] = {}
    resident = _resident_bytes(proc / "self" / "status")
    if resident is not None:
        values["memory_rss_mb"] = f"{resident / MB:.0f}"
    torch = sys.modules.get("torch")
    if torch is not None and str(device).startswith("cuda"):
        try:
            free, total = torch.cuda.mem_get_info(device)
            values |= {"gpu_memory_free_mb": f"{free / MB:.0f}", "gpu_memory_total_mb": f"{total / MB:.0f}"}
        except RuntimeError:  # a driver that does not tell must not end the diagnostics
            pass
    zones = [_millidegrees(path) for path in sorted(thermal.glob("thermal_zone*/temp"))]
    known = [zone / 1000 for zone in zones if zone is not None]
    if known:
        values["temperature_c"] = f"{max(known):.1f}"
    return values


def free_memory() -> None:
    """Gives back what is no longer referred to; torch would keep a GPU's memory for itself."""
    gc.collect()  # a model's own cycles would keep it
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        with suppress(RuntimeError):  # after a CUDA error every call fails; the node must end all the same
            torch.cuda.empty_cache()


def _resident_bytes(status: Path) -> int | None:
    try:
        for line in status.read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024  # the file's unit is kB
    except (OSError, ValueError, IndexError):
        pass
    return None


def _millidegrees(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # zones that are switched off fail when read
        return None
