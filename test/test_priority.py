"""Real-time priority for the threads that receive frames, and for no others."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from sparserefine_ros.node.priority import ReceivePriority

ME = 0  # the calling thread
OURS = {"main", "dds.shm.1", "dds.udp.1", "dds.shm.wdog"}


def permitted() -> bool:
    """Whether this process may have real-time threads."""
    allowed = []

    def attempt() -> None:
        try:
            os.sched_setscheduler(ME, os.SCHED_FIFO, os.sched_param(1))
            allowed.append(True)
        except PermissionError:
            pass

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return bool(allowed)


def real_time(process: int) -> dict[str, int]:
    """Priority by name of the real-time threads of a process; its first is called main."""
    found = {}
    for folder in Path(f"/proc/{process}/task").iterdir():
        thread = int(folder.name)
        with suppress(OSError):  # it has ended
            if os.sched_getscheduler(thread) & ~os.SCHED_RESET_ON_FORK == os.SCHED_FIFO:
                name = "main" if thread == process else (folder / "comm").read_text().strip()
                found[name] = os.sched_getparam(thread).sched_priority
    return found


def ours() -> dict[str, int]:
    """The real-time ones among the main thread and those that a test has started.

    Others of this process may be a node's that an earlier test has left to the garbage collector.
    """
    return {name: priority for name, priority in real_time(os.getpid()).items() if name in OURS}


@contextmanager
def thread_called(name: str) -> Iterator[None]:
    started, done = threading.Event(), threading.Event()

    def run() -> None:
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(name)
        started.set()
        done.wait()

    thread = threading.Thread(target=run)
    thread.start()
    started.wait()
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.mark.skipif(not permitted(), reason="real-time priorities are not permitted here")
def test_threads_that_receive_are_raised_and_given_back() -> None:
    policies = []
    with thread_called("dds.shm.1"), thread_called("dds.udp.1"), thread_called("dds.shm.wdog"):
        priority = ReceivePriority(7)
        try:
            assert priority.take() == "" and priority.taken == 7
            assert ours() == {"main": 7, "dds.shm.1": 7, "dds.udp.1": 7}
            child = threading.Thread(target=lambda: policies.append(os.sched_getscheduler(ME)))
            child.start()
            child.join()
        finally:
            priority.give_back()
        assert ours() == {} and priority.taken == 0
    assert policies == [os.SCHED_OTHER], "threads started by a raised one are normal"


@pytest.mark.skipif(not permitted(), reason="real-time priorities are not permitted here")
def test_threads_may_end_meanwhile() -> None:
    with thread_called("dds.shm.1"):
        priority = ReceivePriority(1)
        assert priority.take() == ""
    priority.give_back()
    assert ours() == {}


def test_without_permission_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    priority = ReceivePriority(1)
    assert priority.take() == "frames are received with normal priority: Operation not permitted"
    assert priority.taken == 0


def test_zero_leaves_threads_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_setscheduler", lambda *_: pytest.fail("touched"))
    priority = ReceivePriority(0)
    assert priority.take() == "" and priority.taken == 0
    priority.give_back()
