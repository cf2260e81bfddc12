"""What the live node adds to its segmenter: `sparserefine bench node`.

The real node in a process of its own, over real DDS, with a model so small that the segmenter hardly counts. Overhead
is the time from a frame's stamp to the return of its last publish, less the segmenter's own time: the camera's publish,
the transport, the wait, decoding, messages, publishing. Run for long it is the soak: memory and handles over time.

Camera and node share the cores unless they are split. A Linux guest of KVM takes a core that has halted for one that
the host has pre-empted: it wakes the receiving threads on the core where the camera is still sending, where each waits
for 1 to 2 ms. It does not wait with real-time priority (`node.priority`), nor where the cores are split, or kept from
halting (`chrt --idle 0` of an endless loop on each).
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparserefine_ros.benchmarks import node_cameras
from sparserefine_ros.datasets.classes import CITYSCAPES
from sparserefine_ros.errors import SparseRefineError
from sparserefine_ros.evaluation.bag_messages import image_message
from sparserefine_ros.evaluation.replay_metrics import percentiles
from sparserefine_ros.evaluation.report import hardware, versions
from sparserefine_ros.networks.compact import CompactSegmenter
from sparserefine_ros.node.parameters import BY_NAME, Value
from sparserefine_ros.node.process import NodeProcess, free_domain_id
from sparserefine_ros.node.transport import PROFILE_VARIABLES
from sparserefine_ros.segmenter.bundle import Bundle, save_network

NETWORK_ARGS: dict[str, Any] = {"widths": [8, 8, 8, 8], "depths": [1, 1, 1]}
SCALE = 0.0625  # of the dense segmenter's input: a sixteenth of the width
WARMUP_S = 1.0  # left out of the figures
COPIED = 200_000_000  # bytes, several times what caches hold: its frames are copied to know what a copy takes
EVERY_S = 1.0  # between two looks at memory and handles
LONG_S = 60.0  # of a shorter run a growth in an hour says nothing: buffers still come to have their size


@dataclass
class Resources:
    """Memory and handles of a process over time."""

    pid: int
    seconds: list[float] = field(default_factory=list)
    rss_mb: list[float] = field(default_factory=list)
    handles: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)

    def look(self, now_s: float, every: float = EVERY_S) -> None:
        """Notes the present state, at most once in `every` seconds."""
        if self.seconds and now_s - self.seconds[-1] < every:
            return
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{self.pid}/status").read_text().splitlines() if ":" in line
        )
        self.seconds.append(round(now_s, 3))
        self.rss_mb.append(int(status["VmRSS"].split()[0]) / 1024)
        self.threads.append(int(status["Threads"]))
        self.handles.append(len(os.listdir(f"/proc/{self.pid}/fd")))

    def report(self) -> dict[str, Any]:
        """The series, and their slopes over the second half, when buffers have their size; None for a short run."""
        half = len(self.seconds) // 2
        long = len(self.seconds) > 4 and self.seconds[-1] - self.seconds[0] >= LONG_S - EVERY_S
        hours = np.asarray(self.seconds[half:]) / 3600
        result: dict[str, Any] = {
            "every_s": EVERY_S, "rss_mb": [round(mb, 2) for mb in self.rss_mb], "handles": self.handles,
            "threads": self.threads,
        }  # fmt: skip
        for name, series in (("rss_mb", self.rss_mb), ("handles", self.handles)):
            slope = float(np.polyfit(hours, series[half:], 1)[0]) if long else None
            result[f"{name}_per_hour"] = slope
            result[f"{name}_first_last"] = [series[half], series[-1]] if series else None
        return result


def write_trivial_bundle(path: Path, size: tuple[int, int]) -> Path:
    """A bundle of random weights whose dense segmenter sees next to nothing of a frame of ``size`` (H, W)."""
    torch.manual_seed(0)
    network = CompactSegmenter(len(CITYSCAPES), **NETWORK_ARGS)
    Bundle(
        path=path, name="trivial", classes=CITYSCAPES, scale=SCALE, native_size=size,
        dense=save_network(path, network, "compact", NETWORK_ARGS, "dense.safetensors"),
    ).save()  # fmt: skip
    return path


def measure(
    size: tuple[int, int],
    rate_hz: float,
    duration_s: float,
    cameras: int = 1,
    split: bool = False,
    receive_priority: int = BY_NAME["receive_priority"].default,
) -> dict[str, Any]:
    """Frames of ``size`` (H, W) rgb8 at ``rate_hz`` from each camera for ``duration_s``; the figures are of all.

    split: the first core is the cameras', all others the node's; else the scheduler places them.
    receive_priority: the node's parameter; what the system permitted is among the figures.

    Raises NodeError where the node fails.
    """
    try:
        from sparserefine_ros.node.load import Camera
        from sparserefine_ros.node.replay import ros_versions, transport_environment
    except ImportError as error:
        raise SparseRefineError(
            f"this measures the live node, and {error.name or error} is missing: source a ROS 2 environment or install "
            "this package's `ros` extra"
        ) from error
    rng = np.random.default_rng(0)
    frames = [image_message(rng.integers(0, 256, (*size, 3), np.uint8), "rgb8", 1, "camera") for _ in range(3)]
    environment, domain_id = transport_environment(), free_domain_id()
    with tempfile.TemporaryDirectory() as folder:
        bundle = write_trivial_bundle(Path(folder) / "trivial", size)
        names = node_cameras.names(cameras) if cameras > 1 else []
        cores = cores_of(split)
        parameters: dict[str, Value] = {
            "model": str(bundle), "device": "cpu", "threads": 1, "cameras": names, "receive_priority": receive_priority,
        }  # fmt: skip
        with (
            running_on(cores["node"]),
            NodeProcess(parameters, {}, {**environment, "ROS_DOMAIN_ID": str(domain_id)}) as node,
            running_on(cores["camera"]),
            Camera(domain_id, environment, names=names or [""]) as camera,
        ):
            camera.ready(node.check)
            priority = os.sched_getparam(node.pid).sched_priority
            resources = Resources(node.pid)

            def tick(now_s: float) -> None:
                node.check()
                resources.look(now_s)

            count = round((WARMUP_S + duration_s) * rate_hz) * cameras
            log = camera.run(islice(cycle(frames), count), rate_hz, tick)
    first = log.sent[0] + WARMUP_S * 1e9
    sent = [stamp for stamp in log.sent if stamp >= first]
    told = {stamp: log.timing[stamp] for stamp in sent if stamp in log.timing}
    masks = {stamp: log.masks[stamp] for stamp in sent if stamp in log.masks}
    span_s = (max(masks.values()) - min(masks.values())) / 1e9 if len(masks) > 1 else 0.0
    several = {"by_camera": node_cameras.by_camera(log, names, int(first))} if names else {}
    return {
        "overhead_ms": _percentiles({s: t["latency_ms"] - t["segment_ms"] for s, t in told.items()}),
        "stamp_to_publish_ms": _percentiles({s: t["latency_ms"] for s, t in told.items()}),
        "stamp_to_arrival_ms": _percentiles({s: (at - s) / 1e6 for s, at in masks.items()}),
        "segmenter_ms": _percentiles({s: t["segment_ms"] for s, t in told.items()}),
        "decode_ms": _percentiles({s: t["decode_ms"] for s, t in told.items()}),
        "publish_ms": _percentiles({s: t["publish_ms"] for s, t in told.items()}),
        "transport_ms": _percentiles({s: t["transport_ms"] for s, t in told.items() if "transport_ms" in t}),
        "wait_ms": _percentiles({s: t["wait_ms"] for s, t in told.items()}),
        "copy_ms": copy_ms(len(frames[0])),
        "rate_hz": (len(masks) - 1) / span_s if span_s else 0.0,
        "frames": {"sent": len(sent), "masks": len(masks), "lost": len(sent) - len(masks)},
        **several,
        "camera": {
            "cameras": cameras, "hz": rate_hz, "size": list(size), "encoding": "rgb8", "duration_s": duration_s,
            "latest_ms": log.late_s * 1e3,
        },
        "cores": cores,
        "receive_priority": priority,
        "transport_profile": _profile({**os.environ, **environment}),
        "memory": resources.report(),
        "hardware": hardware(),
        "versions": {**versions(), **ros_versions()},
    }  # fmt: skip


def copy_ms(n: int) -> float:
    """Milliseconds to copy ``n`` bytes that no cache holds; median. Most of the overhead is such copies."""
    count = max(3, COPIED // n)
    sources, targets = np.ones((count, n), np.uint8), np.ones((count, n), np.uint8)
    times = []
    for source, target in zip(sources, targets, strict=True):
        start = time.perf_counter()
        target[:] = source
        times.append((time.perf_counter() - start) * 1e3)
    return float(np.median(times))


def cores_of(split: bool) -> dict[str, list[int]]:
    """The cores of this process, for camera and node: all for both, unless they are ``split`` and more than one."""
    cores = sorted(os.sched_getaffinity(0))
    if split and len(cores) > 1:
        return {"camera": cores[:1], "node": cores[1:]}
    return {"camera": cores, "node": cores}


@contextmanager
def running_on(cores: list[int]) -> Iterator[None]:
    """Where this thread runs meanwhile, and whatever processes and threads it starts."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _profile(environment: Mapping[str, str]) -> str | None:
    return next((Path(environment[name]).name for name in PROFILE_VARIABLES if environment.get(name)), None)


def _percentiles(values: Mapping[int, float]) -> dict[str, float | None]:
    return percentiles(values.values())


def markdown(result: dict[str, Any]) -> str:
    """The figures as a table."""
    rows = {
        "overhead": "overhead_ms", "stamp to publish": "stamp_to_publish_ms", "segmenter": "segmenter_ms",
        "camera and transport": "transport_ms", "wait": "wait_ms", "decode": "decode_ms", "publish": "publish_ms",
    }  # fmt: skip
    lines = ["| ms | p50 | p99 | max |", "|---|---|---|---|"]
    for title, key in rows.items():
        lines.append(f"| {title} | " + " | ".join(_ms(result[key][p]) for p in ("p50", "p99", "max")) + " |")
    camera, memory, frames = result["camera"], result["memory"], result["frames"]
    height, width = camera["size"]
    each = f"from each of {camera['cameras']} cameras " if camera["cameras"] > 1 else ""
    lines.append(
        f"\n{frames['masks']} masks of {frames['sent']} frames, {width}x{height} {camera['encoding']} at "
        f"{camera['hz']:g} Hz {each}for {camera['duration_s']:g} s: {result['rate_hz']:.2f} masks a second; "
        f"{result['hardware']['cpu']}, {_cores(result['cores'])}, receive_priority {result['receive_priority']}, "
        f"{result['versions']['rmw']}."
    )
    if result["overhead_ms"]["p50"] is not None:
        lines.append(
            f"To copy a frame that no cache holds takes {result['copy_ms']:.2f} ms here: overhead's p50 is as long as "
            f"{result['overhead_ms']['p50'] / result['copy_ms']:.1f} copies."
        )
    if memory["rss_mb_first_last"] is not None:
        rates = {name: memory[f"{name}_per_hour"] for name in ("rss_mb", "handles")}
        megabytes, handles = ("" if rate is None else f" ({rate:+.1f} an hour)" for rate in rates.values())
        lines.append(
            f"Second half of the run: {memory['rss_mb_first_last'][0]:.1f} to {memory['rss_mb_first_last'][1]:.1f} MB"
            f"{megabytes}, {memory['handles_first_last'][0]} to {memory['handles_first_last'][1]} handles{handles}."
        )
    if "by_camera" in result:
        lines.append("\n" + node_cameras.markdown(result["by_camera"]))
    return "\n".join(lines)


def _cores(cores: Mapping[str, list[int]]) -> str:
    counts = {name: f"{len(ids)} core" + "s" * (len(ids) > 1) for name, ids in cores.items()}
    if cores["camera"] == cores["node"]:
        return f"{counts['node']} for camera and node"
    return f"{counts['camera']} for the camera, {counts['node']} for the node"


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
