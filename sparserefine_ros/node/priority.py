"""Threads that receive frames have real-time priority, where the system permits it.

A frame of megabytes passes from thread to thread: the middleware's, which copies it out of shared memory, then the
executor's, which takes it. Each is woken, and where the kernel puts it on a core that is busy (with the camera that
still sends, with the segmenter's threads) it waits there for a millisecond or two. With SCHED_FIFO it does not wait.
"""

from __future__ import annotations

import os
import re
import threading
from contextlib import suppress
from pathlib import Path

MIDDLEWARE = re.compile(r"dds\.(shm|udp)\.\d+")  # as Fast DDS from 2.11 on calls the threads that receive
TASKS = Path("/proc/self/task")


class ReceivePriority:
    """SCHED_FIFO for the calling thread and the middleware's.

    priority: 1 to 99, of the real-time ones; at 0 threads are left as they are.
    """

    def __init__(self, priority: int) -> None:
        self.priority, self.raised = priority, set[int]()

    @property
    def taken(self) -> int:
        """0 where the threads are as they were."""
        return self.priority if self.raised else 0

    def take(self) -> str:
        """Raises the threads that there are; returns why not, "" where it is done."""
        if not self.priority:
            return ""
        try:
            for thread in receiving_threads():
                _schedule(thread, os.SCHED_FIFO, self.priority)
                self.raised.add(thread)
        except OSError as error:
            self.give_back()
            return f"frames are received with normal priority: {error.strerror}"
        return ""

    def give_back(self) -> None:
        """The raised threads are normal again."""
        for thread in self.raised & _threads().keys():
            _schedule(thread, os.SCHED_OTHER, 0)
        self.raised.clear()


def receiving_threads() -> list[int]:
    """The calling thread and, where they bear their names, the middleware's."""
    return [threading.get_native_id(), *(thread for thread, name in _threads().items() if MIDDLEWARE.fullmatch(name))]


def _schedule(thread: int, policy: int, priority: int) -> None:
    """Of a thread that has ended, nothing. Threads and processes that it starts do not inherit this."""
    with suppress(ProcessLookupError):
        os.sched_setscheduler(thread, policy | os.SCHED_RESET_ON_FORK, os.sched_param(priority))


def _threads() -> dict[int, str]:
    """Of this process, by number: their names."""
    threads = {}
    for folder in TASKS.iterdir():
        try:
            threads[int(folder.name)] = (folder / "comm").read_text().strip()
        except OSError:  # it has ended
            continue
    return threads
