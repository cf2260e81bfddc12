"""Stamps out of order, from the past and the future; a camera that falls silent and comes back. docs/faults.md."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy")

import test_cameras  # noqa: E402
from test_cameras import Bench, StandIn, rows  # noqa: E402

from sparserefine_ros.node import camera  # noqa: E402
from sparserefine_ros.node.transport import Arrivals  # noqa: E402

context, make = test_cameras.context, test_cameras.make

OK, WARN = b"\0", b"\1"
HOUR_S = 3600


class Budgeted(StandIn):
    """Lets the latency budget choose, and keeps what it chose."""

    refines = True

    def __init__(self) -> None:
        super().__init__()
        self.chosen: list[float | None] = []

    def segment(self, images: list[np.ndarray], refine: bool | None = None, choose: Any = None) -> Any:
        if choose is not None:
            self.chosen.append(choose(np.full((1, 2, 3), 0.7, np.float32), images[0].size // 3))
        return super().segment(images, refine)


def test_stamps_backward_and_from_the_future(make: Callable[..., Bench]) -> None:
    """Every frame is published; those older than the last are counted stale; latencies count from receipt, and the
    diagnostics say so, until stamps can be believed again; the budget never takes such an age for latency."""
    bench = make(latency_budget_ms=30000.0)
    bench.segmenter = Budgeted()
    bench.start()
    now = lambda: int(time.time())  # noqa: E731
    steps: list[tuple[Callable[[], int], bool, int]] = [  # stamp, believed, stale so far
        (now, True, 0),
        (lambda: now() + HOUR_S, False, 0),  # the future
        (lambda: now() - HOUR_S, False, 1),  # backward
        (lambda: 0, False, 2),  # no stamp
        (lambda: -5, False, 3),  # before 1970
        (lambda: 2**31 - 1, False, 3),
        (now, True, 4),
    ]
    for number, (make_stamp, believed, stale) in enumerate(steps, 1):
        stamp = make_stamp()
        bench.feed("", number, stamp=stamp)
        bench.settled()
        counts = bench.counts("")
        assert (counts["received"], counts["processed"], counts.get("stale", 0)) == (number, number, stale), stamp
        values = rows(bench.diagnostics()[0])
        assert values["latency_counts_from"].startswith("stamp" if believed else "receipt: stamps are far"), stamp
        assert ("transport_ms" in values) == believed, "what was not measured is no 0"
        assert 0 <= float(values["latency_ms"]) < 10000 and values["degraded"] == "", stamp
    assert bench.masks[""] == list(range(1, len(steps) + 1))
    assert bench.segmenter.chosen == [0.5] * len(steps), "there was time for the lowest threshold at every frame"


def test_frames_out_of_order_are_published_in_the_order_they_come(make: Callable[..., Bench]) -> None:
    bench = make().start()
    for number, stamp in enumerate((10, 12, 11, 14, 13, 15), 1):
        bench.feed("", number, stamp=stamp)
        bench.settled()
    assert bench.masks[""] == [1, 2, 3, 4, 5, 6]
    assert bench.counts("") == {"received": 6, "processed": 6, "stale": 2}


def test_a_clock_that_jumps_is_no_loss_of_images() -> None:
    """One stamp from another year, in either direction, makes no gap of years in which frames are missed."""
    for jump in (HOUR_S, -HOUR_S):
        watch = Arrivals()
        for i in range(40):
            stamp_s = i / 30 + (jump if i == 20 else 0)
            watch.arrived(round(stamp_s * 1e9), i / 30)
        assert watch.loss() < 0.05 and watch.complaint(40 / 30, 1, 0.0) == "", jump


def test_a_camera_falls_silent_and_comes_back(make: Callable[..., Bench]) -> None:
    """The diagnostics warn and name it while the other goes on; with its first frames they are ok again."""
    bench = make(cameras=["front", "left"]).start()
    for its in bench.node.cameras:
        its.publishers = lambda: 1
        its.arrivals._silence_s = 0.3
    stamp_ms = 0

    def shoot(*names: str) -> None:
        nonlocal stamp_ms
        stamp_ms += 10
        for name in names:
            bench.feed(name, 3, header=test_cameras.Header(stamp=stamp(stamp_ms)))
        bench.settled()

    for _ in range(15):
        shoot("front", "left")
    assert [s.level for s in bench.diagnostics()] == [OK, OK, OK]
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        shoot("left")
        time.sleep(0.02)
    node, front, left = bench.diagnostics()
    assert (node.level, front.level, left.level) == (WARN, WARN, OK)
    assert node.message.startswith("front: no image for ") and "although 1 publisher(s)" in front.message
    stamp_ms += 10_000  # the camera's clock went on
    for _ in range(15):
        shoot("front", "left")
    node, front, left = bench.diagnostics()
    assert (node.level, front.level, left.level) == (OK, OK, OK), front.message
    assert float(rows(front)["loss"]) < 0.05


def test_images_that_are_lost_are_told_with_a_remedy(make: Callable[..., Bench]) -> None:
    """Also where it is the camera's process that lacks what the node has."""
    bench = make(cameras=["front"]).start()
    (its,) = bench.node.cameras
    its.publishers = lambda: 1
    lost = [0]
    bench.node._qos.lost = lambda subscription: lost[0]
    said: list[str] = []
    bench.node.get_logger = lambda: SimpleNamespace(warning=said.append)
    for _ in range(10):
        bench.feed("front", 3)
        bench.settled()
    assert bench.diagnostics()[1].level == OK and not said
    lost[0] = 90
    bench.feed("front", 3)
    bench.settled()
    bench.node._rmw, bench.node._lossy = "rmw_fastrtps_cpp", False
    node, front = bench.diagnostics()
    assert (node.level, front.level) == (WARN, WARN) and rows(front)["lost"] == "90" and rows(front)["loss"] == "0.90"
    assert front.message.startswith("90 % of the images are lost before they arrive; if images are large, set FASTDDS_")
    assert front.message.endswith("fastdds.xml for the process that publishes them too")
    assert said == [f"{its.image_topic}: {front.message}"]
    bench.node._rmw = "rmw_cyclonedds_cpp"
    assert bench.diagnostics()[1].message == "90 % of the images are lost before they arrive" and len(said) == 1


@pytest.mark.parametrize(
    ("lost", "advice"),
    [
        (None, True),  # no message has come that bore a number: all may be lost
        (3, True),
        (0, False),  # a slow camera, or one that stopped
    ],
)
def test_a_publisher_that_sends_nothing_needs_no_profile(
    make: Callable[..., Bench], lost: int | None, advice: bool
) -> None:
    bench = make(cameras=["front"]).start()
    (its,) = bench.node.cameras
    its.publishers = lambda: 1
    its.arrivals._silence_s = 0.1
    bench.node._qos.lost = lambda subscription: lost
    bench.node._rmw, bench.node._lossy = "rmw_fastrtps_cpp", False
    if lost is not None:
        bench.feed("front", 3)
        bench.settled()
    time.sleep(0.15)
    _, front = bench.diagnostics()
    assert front.level == WARN and front.message.startswith("no image for ")
    assert ("FASTDDS_" in front.message) == advice
    assert ("it seems to send nothing" not in front.message) == advice


def test_a_model_that_hangs_is_told(make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames arrive and are replaced by newer ones: nothing fails, and yet nothing comes out."""
    monkeypatch.setattr(camera, "PATIENCE_S", 0.2)
    bench = make(cameras=["front", "left"]).start()
    for its in bench.node.cameras:
        its.publishers = lambda: 1
    time.sleep(0.3)  # before the first frame nobody waits
    bench.feed("left", 2)
    bench.settled()
    assert [s.level for s in bench.diagnostics()] == [OK, OK, OK]
    bench.busy()
    assert [s.level for s in bench.diagnostics()] == [OK, OK, OK]
    time.sleep(0.3)
    bench.feed("front", 3)
    node, front, left = bench.diagnostics()
    assert (node.level, front.level, left.level) == (WARN, WARN, OK)
    assert node.message.startswith("front: no mask for 0 s although images arrive")
    bench.segmenter.free.set()
    bench.settled()
    assert [s.level for s in bench.diagnostics()] == [OK, OK, OK]


def stamp(ms: int) -> Any:
    from builtin_interfaces.msg import Time

    return Time(sec=1 + ms // 1000, nanosec=ms % 1000 * 1_000_000)


def test_a_camera_whose_publisher_vanishes(make: Callable[..., Bench]) -> None:
    bench = make(cameras=["front", "left"]).start()
    front, left = bench.node.cameras
    left.publishers = lambda: 1
    for present, level in ((1, OK), (0, WARN), (1, OK)):
        front.publishers = lambda present=present: present
        for name in ("front", "left"):
            bench.feed(name, 3)
        bench.settled()
        node, its, other = bench.diagnostics()
        assert (node.level, its.level, other.level) == (level, level, OK)
        assert ("front: waiting: nobody publishes" in node.message) == (not present)
