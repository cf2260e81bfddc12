#!/usr/bin/env python3
"""Starts and stops the node again and again, and fails where threads, handles or memory grow.

    .venv/bin/python scripts/start_stops.py                               # 1000 lives in one process, 5 processes
    .venv/bin/python scripts/start_stops.py --lives 1000 --processes 20 --json start_stops.json

A life: configure (a trivial model from its files, topics), activate, one frame segmented and published, deactivate,
cleanup. A process: start, SIGINT when it is ready (every other time: while it loads), status 0 within 15 s.
"""  # fmt: skip

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import rclpy  # noqa: E402
from rclpy.context import Context  # noqa: E402
from rclpy.lifecycle import TransitionCallbackReturn  # noqa: E402
from rclpy.parameter import Parameter  # noqa: E402
from std_msgs.msg import Header  # noqa: E402

from sparserefine_ros.benchmarks.node_overhead import Resources, write_trivial_bundle  # noqa: E402
from sparserefine_ros.node.cdr import image_parts  # noqa: E402
from sparserefine_ros.node.process import NodeProcess, free_domain_id  # noqa: E402
from sparserefine_ros.node.segment_node import SegmentNode  # noqa: E402

SIZE = (240, 320)
SETTLED = 0.2  # share of the lives after which nothing may grow any more
MAX_MB_PER_1000 = 20.0
PATIENCE_S = 60.0


def live(node: SegmentNode, frame: bytes) -> None:
    """One life; RuntimeError where a transition fails or the frame gets no mask."""
    node.start()
    [camera] = node.cameras
    node._receive(camera, frame)
    deadline = time.monotonic() + PATIENCE_S
    while not camera.counters.processed:
        if time.monotonic() > deadline or camera.counters.failed or camera.counters.malformed:
            raise RuntimeError(f"the frame got no mask: {camera.counters}")
        time.sleep(0.001)
    for trigger in (node.trigger_deactivate, node.trigger_cleanup):
        if trigger() != TransitionCallbackReturn.SUCCESS:
            raise RuntimeError(f"{trigger.__name__} failed: {node._failure}")


def lives(number: int, bundle: Path) -> dict[str, Any]:
    """Lives of one node in this process, and what of the process has grown after the first SETTLED of them."""
    context = Context()
    rclpy.init(context=context, domain_id=free_domain_id())
    overrides = [
        Parameter("model", value=str(bundle)), Parameter("device", value="cpu"), Parameter("threads", value=1),
    ]  # fmt: skip
    node = SegmentNode(context=context, parameter_overrides=overrides)
    frame = b"".join(image_parts(Header(), np.full((*SIZE, 3), 99, np.uint8), "rgb8"))
    seen = Resources(os.getpid())
    start = time.monotonic()
    for done in range(number):
        live(node, frame)
        seen.look(done, every=0)
    seconds = time.monotonic() - start
    node.destroy_node()
    context.try_shutdown()
    first = round(SETTLED * number)
    slope = float(np.polyfit(range(first, number), seen.rss_mb[first:], 1)[0]) if number > 2 else 0.0
    return {
        "lives": number, "seconds": seconds, "rss_mb_first": seen.rss_mb[first], "rss_mb_last": seen.rss_mb[-1],
        "rss_mb_per_1000": 1000 * slope, "handles_first": seen.handles[first], "handles_last": seen.handles[-1],
        "threads_first": seen.threads[first], "threads_last": seen.threads[-1],
    }  # fmt: skip


def processes(number: int, bundle: Path) -> dict[str, Any]:
    """Processes one after the other; NodeError where one does not end with status 0 within 15 s."""
    parameters = {"model": str(bundle), "device": "cpu", "threads": 1}
    started: list[float] = []
    stopped: list[float] = []
    for serial in range(number):
        words = "ready" if serial % 2 == 0 else "loading"
        begin = time.monotonic()
        with NodeProcess(parameters, {}, {"ROS_DOMAIN_ID": str(free_domain_id())}) as node:
            while words not in node.log.read_text():
                node.check()
                if time.monotonic() > begin + PATIENCE_S:
                    raise RuntimeError(f"not {words} after {PATIENCE_S:.0f} s: {node.tail()}")
                time.sleep(0.02)
            if words == "ready":
                started.append(time.monotonic() - begin)
            end = time.monotonic()
        stopped.append(time.monotonic() - end)
    return {"processes": number, "start_s_max": max(started, default=None), "stop_s_max": max(stopped, default=None)}


def grown(result: dict[str, Any]) -> list[str]:
    """What is wrong with the figures."""
    wrong = []
    if result["lives"] >= 100 and result["rss_mb_per_1000"] > MAX_MB_PER_1000:
        wrong.append(f"memory grows by {result['rss_mb_per_1000']:.1f} MB in 1000 lives, at most {MAX_MB_PER_1000:g}")
    for name in ("handles", "threads"):
        if result[f"{name}_last"] > result[f"{name}_first"] + 1:
            wrong.append(f"{name} grew from {result[f'{name}_first']} to {result[f'{name}_last']}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lives", type=int, default=1000, help="of one node in this process (default: 1000)")
    parser.add_argument("--processes", type=int, default=5, help="started and stopped (default: 5)")
    parser.add_argument("--json", type=Path, help="where the figures go")
    args = parser.parse_args()
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("ROS_LOG_DIR", folder)
        bundle = write_trivial_bundle(Path(folder) / "trivial", SIZE)
        result = lives(args.lives, bundle) | processes(args.processes, bundle)
    text = json.dumps(result, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    wrong = grown(result)
    print("; ".join(wrong), file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
