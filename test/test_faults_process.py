"""Signals at any moment, subscribers in storms, starts and stops again and again. docs/faults.md.

SPARSEREFINE_RANDOM_SIGNALS=N adds N starts with signals at random moments; scripts/nightly.sh asks for a hundred.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

rclpy = pytest.importorskip("rclpy")

from ros_client import RELIABLE, Client, fill_image, isolated  # noqa: E402
from sensor_msgs.msg import Image  # noqa: E402
from std_msgs.msg import Header  # noqa: E402

from sparserefine_ros.benchmarks.node_overhead import Resources  # noqa: E402
from sparserefine_ros.node.process import NodeProcess  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
STOP_S = 15.0
START_S = 90.0  # on a machine that does other things as well
SUBSCRIBERS, WAVES = 30, 4
RANDOM = int(os.environ.get("SPARSEREFINE_RANDOM_SIGNALS", "0"))
INT, TERM = signal.SIGINT, signal.SIGTERM


@pytest.fixture(scope="module")
def domain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with isolated(tmp_path_factory.mktemp("log")) as number:
        yield number


def handles_signals(node: NodeProcess) -> bool:
    """Whether the node's own handler is there. Python has one for SIGINT from the start, but none for SIGTERM."""
    status = Path(f"/proc/{node.pid}/status").read_text()
    return bool(int(status.split("SigCgt:")[1].split()[0], 16) >> (TERM - 1) & 1)


def wait(node: NodeProcess, done: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + START_S
    while not done():
        node.check()
        assert time.monotonic() < deadline, f"waited {START_S} s for {what}: {node.tail()}"
        time.sleep(0.005)


def ended(node: NodeProcess, signals: tuple[signal.Signals, ...], pause_s: float = 0.02) -> None:
    """The signals, and a clean end: in time, status 0, nothing said of errors, nobody left behind."""
    process = node._process
    assert process is not None
    for number in signals:
        process.send_signal(number)
        time.sleep(pause_s)
    try:
        assert process.wait(STOP_S) == 0, node.tail(30)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"not ended {STOP_S} s after {signals}: {node.tail(30)}") from None
    said = node.log.read_text(errors="replace")
    for bad in ("Traceback", "terminate called", "Segmentation fault", "error:"):
        assert bad not in said, said
    with pytest.raises(ProcessLookupError):  # the node has a process group of its own
        os.killpg(process.pid, 0)


MOMENTS: list[tuple[str, float, tuple[signal.Signals, ...]]] = [
    ("handlers", 0.0, (INT,)),  # before anything is imported
    ("handlers", 0.2, (TERM,)),  # while rclpy is
    ("loading", 0.1, (INT, INT)),  # while torch is
    ("warming up", 0.0, (TERM, INT)),
    *(("handlers", random.uniform(0.0, 6.0), random.choice([(INT,), (TERM,), (INT, INT)])) for _ in range(RANDOM)),
]


@pytest.mark.parametrize(("stage", "delay_s", "signals"), MOMENTS)
def test_a_signal_ends_a_start_at_any_moment(
    domain: int, tiny_bundle: Path, tmp_path: Path, stage: str, delay_s: float, signals: tuple[signal.Signals, ...]
) -> None:
    parameters = {"model": str(tiny_bundle), "device": "cpu", "threads": 1}
    with NodeProcess(parameters, {}, {"ROS_DOMAIN_ID": str(domain)}, tmp_path / "log.txt") as node:
        if stage == "handlers":
            wait(node, lambda: handles_signals(node), stage)
        else:
            wait(node, lambda: stage in node.log.read_text(), stage)
        time.sleep(delay_s)
        ended(node, signals)


HANGING = """
import sys, time
from sparserefine_ros.node import main, worker
main.LAST_RESORT_S = 1.0
worker.Worker.stop = lambda *_: time.sleep(100)
sys.exit(main.main())
"""


def test_an_end_that_hangs_is_cut_short(domain: int, tiny_bundle: Path, tmp_path: Path) -> None:
    """As where a frame takes minutes, or a driver never returns."""
    parameters = {"model": str(tiny_bundle), "device": "cpu", "threads": 1}
    node = NodeProcess(parameters, {}, {"ROS_DOMAIN_ID": str(domain)}, tmp_path / "log.txt")
    node.command[1:3] = ["-c", HANGING]
    with node:
        wait(node, lambda: "ready" in node.log.read_text(), "ready")
        ended(node, (INT, INT))
        assert "not ended 1 s after the signal; ends now" in node.tail()


@pytest.fixture(scope="module")
def running(domain: int, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A node, a client connected to it, and a function that sends a frame and waits for its mask."""
    log = tmp_path_factory.mktemp("node") / "log.txt"
    parameters = {
        "model": str(tiny_bundle),
        "device": "cpu",
        "threads": 1,
        "queue": "all",
        "qos_reliability": "reliable",
    }
    client = Client(domain)
    with NodeProcess(parameters, {}, {"ROS_DOMAIN_ID": str(domain)}, log) as node:
        client.alive = node.check
        publisher = client.publisher(Image, "image")
        client.listen(Image, "segmentation/mask")

        def send(size: tuple[int, int] = (64, 96)) -> Header:
            header = client.header()
            publisher.publish(fill_image(Image(), header, np.full((*size, 3), 90, np.uint8), "rgb8"))
            return header

        client.until_matched(send, ["segmentation/mask"])
        yield node, client, send
    client.close()


def test_storms_of_subscribers(running: Any) -> None:
    """Thirty come and go at once, again and again: every frame gets its mask, handles and memory come back."""
    node, client, send = running
    topics = ("mask", "color", "overlay", "entropy", "confidence")

    def storm() -> None:
        got: list[Any] = []
        crowd = [
            client.node.create_subscription(Image, f"segmentation/{topics[i % len(topics)]}", got.append, RELIABLE)
            for i in range(SUBSCRIBERS)
        ]
        for _ in range(5):
            client.answer("segmentation/mask", send())
        client.until(lambda: got, "a mask for the crowd")
        for subscription in crowd:
            client.node.destroy_subscription(subscription)
        client.answer("segmentation/mask", send())

    def resources() -> tuple[float, int, int]:
        seen = Resources(node.pid)
        seen.look(0.0)
        return seen.rss_mb[0], seen.handles[0], seen.threads[0]

    storm()  # buffers grow to their size
    before = resources()
    for _ in range(WAVES):
        storm()
    client.until(lambda: resources()[1] <= before[1], f"the {before[1]} handles of before")
    after = resources()
    assert after[0] - before[0] < 20 and after[1:] <= before[1:], (before, after)


def test_signals_in_the_middle_of_a_frame(running: Any) -> None:
    """The last test of this node: a frame of seconds is in work, and two signals come."""
    node, client, send = running
    client.alive = lambda: None
    send((1000, 1400))
    client.executor.spin_once(timeout_sec=0.1)
    ended(node, (INT, INT))


def test_starts_and_stops_leave_nothing_behind(tmp_path: Path) -> None:
    """Twenty lives of one node; a thousand by scripts/nightly.sh."""
    file = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "scripts" / "start_stops.py"), "--lives", "20", "--processes", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--json", str(file)], env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(file.read_text())
    assert figures["lives"] == 20
    assert figures["handles_last"] <= figures["handles_first"] + 1
    assert figures["threads_last"] <= figures["threads_first"]
    assert figures["rss_mb_last"] - figures["rss_mb_first"] < 10
