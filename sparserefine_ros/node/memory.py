"""Large buffers stay with the process."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
LARGEST = 32 << 20  # bytes; more is not accepted as a threshold for mmap
KEPT = 256 << 20


def keep_large_buffers() -> None:
    """Lets glibc keep what is freed, up to 256 MB, rather than give it back to the kernel and ask for it again.

    A camera sends buffers of the same few megabytes over and over; handed back, each costs thousands of page faults a
    frame, up to 4 ms for 6 MB. Does nothing where the C library has no mallopt.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST)
        mallopt(M_TRIM_THRESHOLD, KEPT)
