"""Whose frames are segmented next: equal shares, batches of one size, newest frames, nothing lost uncounted."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque

from hypothesis import given
from hypothesis import strategies as st

from sparserefine_ros.node.scheduler import Scheduler, choose

SIZES = ((64, 96), (48, 48), (8, 8))


def scheduler(max_batch: int, capacity: int = 1, window_s: float = 0.0, clock=time.monotonic) -> Scheduler[str]:
    return Scheduler(capacity, max_batch, window_s, clock)


@given(st.lists(st.sampled_from(SIZES), min_size=1, max_size=8), st.integers(1, 8), st.integers(1, 60))
def test_cameras_that_always_wait_get_equal_shares(sizes, max_batch, batches):
    """Whatever their sizes and the batch, no camera is ever more than one frame ahead of another."""
    line = scheduler(max_batch)
    cameras = [f"camera{i}" for i in range(len(sizes))]
    for camera in cameras:
        line.add(camera)
        line.put(camera, b"")
    got = Counter(dict.fromkeys(cameras, 0))
    for _ in range(batches):
        batch = line.take()
        taken = [camera for camera, _ in batch]
        assert 1 <= len(taken) <= max_batch and len(set(taken)) == len(taken)
        for camera in taken:
            line.measured(camera, sizes[cameras.index(camera)])
            got[camera] += 1
            assert line.put(camera, b"") == 0
        assert max(got.values()) - min(got.values()) <= 1
    rounds = len(cameras)  # until every size is known, frames go alone
    alike = len(set(sizes)) == 1
    if alike and batches > rounds:
        assert sum(got.values()) >= rounds + (batches - rounds) * min(max_batch, len(cameras))


STEPS = st.lists(st.tuples(st.sampled_from(["put", "put", "take", "gone", "back"]), st.integers(0, 4)), max_size=80)


@given(STEPS, st.integers(1, 4), st.integers(1, 3))
def test_nothing_is_lost_uncounted_and_nobody_is_passed_over(steps, max_batch, capacity):
    """Against a model in lists: newest frames in order, sizes in a batch alike, at most two turns before one's own."""
    line = scheduler(max_batch, capacity)
    waiting: dict[int, deque[bytes]] = {}
    ahead: dict[int, Counter] = {}  # how often others were served while a camera waited
    size = {i: SIZES[i % 2] for i in range(5)}
    known: set[int] = set()
    for serial, (step, i) in enumerate(steps):
        frame = serial.to_bytes(2, "big")
        if step == "back":
            line.add(str(i))
            waiting.setdefault(i, deque())
        elif step == "gone":
            assert line.remove(str(i)) == len(waiting.pop(i, ()))
            ahead.pop(i, None)
            known.discard(i)
        elif step == "put" and i not in waiting:
            assert line.put(str(i), frame) == 1, "a frame of a camera that is gone counts as dropped"
        elif step == "put":
            assert line.put(str(i), frame) == int(len(waiting[i]) == capacity)
            if not waiting[i]:
                ahead[i] = Counter()
            waiting[i] = deque([*waiting[i], frame][-capacity:])
        elif any(waiting.values()):
            batch = [(int(camera), data) for camera, data in line.take()]
            for camera, data in batch:
                assert data == waiting[camera].popleft()
                ahead.pop(camera)
            for other, count in ahead.items():
                count.update(camera for camera, _ in batch)
                assert max(count.values()) <= 2, f"{other} waits while others are served again and again"
            ahead |= {camera: Counter() for camera, _ in batch if waiting[camera]}
            if len(batch) > 1:
                assert {camera for camera, _ in batch} <= known, "a size that is not known shares no batch"
                assert len({size[camera] for camera, _ in batch}) == 1
            for camera, _ in batch:
                line.measured(str(camera), size[camera])
                known.add(camera)
        for i, frames in waiting.items():
            assert line.waiting(str(i)) == len(frames)
    assert line.close() == {str(i): len(frames) for i, frames in waiting.items()}
    assert line.take() == [] and line.put("0", b"") == 1


def filled(max_batch: int, sizes: dict[str, tuple[int, int]], **options) -> Scheduler[str]:
    """With every size known; nobody waits."""
    line = scheduler(max_batch, **options)
    for camera, size in sizes.items():
        line.add(camera)
        line.measured(camera, size)
    return line


def names(batch: list[tuple[str, bytes]]) -> str:
    return "".join(camera for camera, _ in batch)


def test_sizes_do_not_mix_and_a_batch_passes_nobody_over() -> None:
    line = filled(3, {"a": (2, 2), "b": (2, 2), "x": (9, 9), "c": (2, 2), "d": (2, 2)})
    taken = []
    for _ in range(6):
        for camera in "abxcd":
            line.put(camera, b"")
        taken.append(names(line.take()))
    # "cd": a beside them would have its third turn before x has its second
    assert taken == ["abc", "x", "dab", "cd", "x", "abc"]


def test_a_camera_that_comes_late_or_was_silent_has_no_claim_on_the_past() -> None:
    line = filled(1, {"a": (2, 2), "b": (2, 2), "late": (2, 2)})
    for _ in range(20):
        line.put("a", b"")
        line.put("b", b"")
        line.take()
    order = []
    for _ in range(9):
        for camera in ("a", "b", "late"):
            line.put(camera, b"")
        order.append(names(line.take()))
    assert Counter(order) == {"a": 3, "b": 3, "late": 3}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_batch_waits_no_longer_than_its_window() -> None:
    clock = Clock()
    line = filled(3, {"a": (2, 2), "b": (2, 2), "dead": (2, 2), "big": (9, 9)}, window_s=0.5, clock=clock)
    line.put("a", b"old")
    [a] = [x for x in line._lines.values() if len(x.queue)]
    assert line._patience([a]) == 0.5
    clock.now += 0.375
    line.put("a", b"newer")
    line.put("big", b"")
    assert line._patience([a]) == 0.125, "a newer frame does not begin the window anew"
    clock.now += 0.125
    assert line.take() == [("a", b"newer")], "the dead camera costs the window, not the frame"
    assert line.take() == [("big", b"")], "nobody else has its size: nothing to wait for"
    for camera in ("a", "b", "dead"):
        line.put(camera, b"")
    assert sorted(camera for camera, _ in line.take()) == ["a", "b", "dead"], "all are here: no waiting"


def test_a_fairer_camera_that_comes_late_does_not_begin_the_window_anew() -> None:
    clock = Clock()
    line = filled(3, {"a": (2, 2), "b": (2, 2), "dead": (2, 2)}, window_s=0.5, clock=clock)
    line._lines["a"].served = 1
    line.put("a", b"first")
    clock.now += 0.375
    line.put("b", b"")
    batch = choose(list(line._lines.values()), 3)
    assert batch == [line._lines["b"], line._lines["a"]] and line._patience(batch) == 0.125


def test_take_waits_for_the_others_and_wakes_when_they_come() -> None:
    line = filled(2, {"a": (2, 2), "b": (2, 2)}, window_s=5.0)
    got: list[list[tuple[str, bytes]]] = []
    thread = threading.Thread(target=lambda: got.append(line.take()))
    thread.start()
    line.put("a", b"1")
    time.sleep(0.05)
    assert got == []
    line.put("b", b"2")
    thread.join(2)
    assert got == [[("a", b"1"), ("b", b"2")]]
    line.put("a", b"3")
    thread = threading.Thread(target=lambda: got.append(line.take()))
    thread.start()
    line.remove("b")  # whom the batch waits for
    thread.join(2)
    assert got[1:] == [[("a", b"3")]]


def test_close_wakes_a_waiting_worker() -> None:
    line = filled(2, {"a": (2, 2)})
    got: list[object] = []
    thread = threading.Thread(target=lambda: got.append(line.take()))
    thread.start()
    line.close()
    thread.join(10)
    assert got == [[]]
