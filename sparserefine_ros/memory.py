"""Large buffers stay with the process, in large pages."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # mallopt(3)
LARGEST = 32 << 20  # bytes; more is not accepted as a threshold for mmap
KEPT, ALL = 256 << 20, (1 << 31) - 1
TUNABLES, HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"


def keep_large_buffers() -> None:
    """Lets glibc keep what is freed, up to 256 MB, rather than give it back to the kernel and ask for it again.

    A camera sends buffers of the same few megabytes over and over; handed back, each costs thousands of page faults a
    frame, up to 4 ms for 6 MB. Does nothing where the C library has no mallopt.
    """
    _mallopt({M_MMAP_THRESHOLD: LARGEST, M_TRIM_THRESHOLD: KEPT})


def keep_every_buffer() -> None:
    """The same without a bound, for a process that does one thing and ends.

    The maps of a whole network at 2048x1024 are 32 MB and more each, and a frame has hundreds of them.
    """
    _mallopt({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: ALL})


def _mallopt(options: Mapping[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in options.items():
            mallopt(option, value)


def huge_pages_env(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment variables with which a new process's malloc asks the kernel for pages of 2 MB instead of 4 kB.

    An image lies in 1500 small pages or three large ones, and every copy must look them up: with large ones the node
    has a 6 MB image 0.4 ms sooner. Empty where the user has decided; without effect where kernel or C library know no
    such thing (glibc before 2.35).
    """
    tunables = (os.environ if environment is None else environment).get(TUNABLES, "")
    if HUGE_PAGES in tunables:
        return {}
    return {TUNABLES: ":".join(filter(None, (tunables, f"{HUGE_PAGES}=1")))}
