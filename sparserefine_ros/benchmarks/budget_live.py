"""The latency budget on the live node: `sparserefine bench budget`.

A bag of the procedural street whose clutter changes is sent three times through the real node over DDS, every frame
stamped as it leaves: with the bundle's threshold, with a budget, and dense. Latency is the node's, from stamp to
publish; accuracy is against the bag's ground truth.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparserefine_ros.datasets.base import Sample
from sparserefine_ros.datasets.street import Street
from sparserefine_ros.errors import BagError, SparseRefineError
from sparserefine_ros.evaluation import bag_messages as messages
from sparserefine_ros.evaluation import files
from sparserefine_ros.evaluation.bag_writer import START_NS, BagWriter
from sparserefine_ros.evaluation.bags import Bag
from sparserefine_ros.evaluation.mask_spool import MaskSpool
from sparserefine_ros.evaluation.metrics import ConfusionMatrix
from sparserefine_ros.evaluation.replay_metrics import percentiles
from sparserefine_ros.evaluation.report import hardware, versions
from sparserefine_ros.node.process import NodeError, NodeProcess, free_domain_id
from sparserefine_ros.segmenter.bundle import Bundle
from sparserefine_ros.segmenter.segmenter import Segmenter

DRIVES, FRAMES_A_DRIVE = 16, 2  # that frames are picked from
PICKED = 8  # calmest and most cluttered frames
STRETCH = 40  # frames that are calm, then as many that are cluttered, and so on
STRETCHES = 4
SEED = 9000  # drives that no bundle was trained on
RUNS: dict[str, dict[str, Any]] = {"fixed": {}, "budget": {}, "dense": {"decoder": "dense"}}


def make_bag(path: Path, bundle: Bundle, size: tuple[int, int], rate_hz: float) -> None:
    """Calm and cluttered stretches by turns: the frames of which most and least would be refined, of some drives."""
    segmenter = Segmenter(bundle, "cpu")
    found: list[tuple[float, Sample]] = []
    for drive in range(DRIVES):
        street = Street(frames=FRAMES_A_DRIVE * 20, seed=SEED + drive, size=size)
        for i in range(FRAMES_A_DRIVE):
            sample = street[i * 20]
            found.append((segmenter.segment([sample.image])[0].density, sample))
    found.sort(key=lambda pair: pair[0])
    calm, cluttered = ([sample for _, sample in part] for part in (found[:PICKED], found[-PICKED:]))
    with BagWriter(path, bundle.classes) as bag:
        for i in range(STRETCH * STRETCHES):
            part = cluttered if i // STRETCH % 2 else calm
            sample = part[i % PICKED]
            bag.write(sample.image, sample.label, START_NS + round(i * 1e9 / rate_hz))


def measure(
    model: str, path: Path | None, size: tuple[int, int], rate_hz: float, budget_ms: float | None
) -> dict[str, Any]:
    """Runs the bag at ``path`` (made of frames of ``size`` where there is none) through the node, in RUNS' ways.

    ``budget_ms`` None takes the middle between the fixed threshold's p95 on the calmer half of the frames and its
    median on the others. Raises BagError for a bag without ground truth, NodeError where the node fails.
    """
    bundle = Bundle.load(model)
    with tempfile.TemporaryDirectory() as scratch:
        path = path or Path(scratch) / "bag"
        if not path.exists():
            make_bag(path, bundle, size, rate_hz)
        with Bag(path) as bag:
            bag.check(bundle.classes)
            frames, labels = [frame.data for frame in bag.frames()], dict(bag.labels())
            truth = [labels.get(messages.stamp_ns(frame)) for frame in frames]
            image_topic = bag.image_topic
            if not labels or bag.compressed:
                raise BagError(f"{path} needs raw images and ground truth; make one with `sparserefine make-bag`")
    runs: dict[str, dict[str, Any]] = {}
    for name, parameters in RUNS.items():
        if name == "budget":
            budget_ms = budget_ms or _middle(runs["fixed"]["timeline"])
            parameters = {"latency_budget_ms": round(budget_ms, 1)}
        runs[name] = _run(model, parameters, frames, truth, bundle, rate_hz)
    assert budget_ms is not None
    for run in runs.values():
        latencies = [row["latency_ms"] for row in run["timeline"]]
        run["late"] = float(np.mean(np.asarray(latencies) > budget_ms))
    return {
        "budget_ms": round(budget_ms, 1), "model": bundle.name, "entropy_threshold": bundle.entropy_threshold,
        "frames": len(frames), "size": next(list(label.shape) for label in truth if label is not None),
        "rate_hz": rate_hz, "image_topic": image_topic, "stretch": STRETCH,
        "runs": runs, "hardware": hardware(), "versions": versions(),
    }  # fmt: skip


def _run(
    model: str,
    parameters: Mapping[str, Any],
    frames: list[bytes],
    truth: list[np.ndarray | None],
    bundle: Bundle,
    rate_hz: float,
) -> dict[str, Any]:
    try:
        from sparserefine_ros.node.load import Camera
        from sparserefine_ros.node.replay import transport_environment
    except ImportError as error:
        raise SparseRefineError(
            f"this measures the live node, and {error.name or error} is missing: source a ROS 2 environment or install "
            "this package's `ros` extra"
        ) from error
    environment, domain_id = transport_environment(), free_domain_id()
    asked = {"model": model, "device": "cpu", "qos_reliability": "reliable", **parameters}
    with MaskSpool() as spool:
        with (
            NodeProcess(asked, {}, {**environment, "ROS_DOMAIN_ID": str(domain_id)}) as node,
            Camera(domain_id, environment, reliable=True, keep=spool.put) as camera,
        ):
            camera.ready(node.check)
            log = camera.run(frames, rate_hz, lambda now_s: node.check())
        matrix = ConfusionMatrix(bundle.classes)
        timeline: list[dict[str, Any]] = []
        for i, stamp in enumerate(log.sent):
            mask, label = spool.get(stamp), truth[i]
            if mask is not None and label is not None:
                matrix.update(label, mask)
            if stamp in log.timing:
                told = log.timing[stamp]
                timeline.append({"frame": i} | {k: told[k] for k in ("latency_ms", "entropy_threshold", "density")})
    if not timeline:
        raise NodeError(f"the node answered none of {len(frames)} frames at {rate_hz:g} Hz; lower --rate, or --size")
    for row in timeline:
        if not np.isfinite(row["entropy_threshold"]):  # left dense; JSON knows no infinity
            row["entropy_threshold"] = None
    thresholds = [row["entropy_threshold"] for row in timeline]
    return {
        "parameters": dict(parameters),
        "masks": len(log.masks),
        "latency_ms": percentiles(row["latency_ms"] for row in timeline)
        | {"p95": float(np.quantile([row["latency_ms"] for row in timeline], 0.95))},
        "miou": matrix.miou(),
        "density": float(np.mean([row["density"] for row in timeline])),
        "dense_frames": thresholds.count(None),
        "timeline": timeline,
    }


def _middle(timeline: list[dict[str, Any]]) -> float:
    """Between the p95 of the calmer half of the frames and the median of the others."""
    by_density = sorted(timeline, key=lambda row: row["density"])
    calm, cluttered = (
        [row["latency_ms"] for row in part]
        for part in (by_density[: len(by_density) // 2], by_density[len(by_density) // 2 :])
    )
    return float((np.quantile(calm, 0.95) + np.median(cluttered)) / 2)


def markdown(result: dict[str, Any]) -> str:
    """The figures as a table."""
    titles = ("", "p50 ms", "p95 ms", "p99 ms", "late", "density", "mIoU", "masks")
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for name, run in result["runs"].items():
        latency = " | ".join(f"{run['latency_ms'][p]:.0f}" for p in ("p50", "p95", "p99"))
        lines.append(
            f"| {name} | {latency} | {100 * run['late']:.1f} % | {100 * run['density']:.1f} % | "
            f"{100 * run['miou']:.2f} | {run['masks']} |"
        )
    lines.append(
        f"\nBudget {result['budget_ms']:g} ms; {result['frames']} frames at {result['rate_hz']:g} Hz, bundle "
        f"{result['model']}, threshold {result['entropy_threshold']:g} nats; {result['hardware']['cpu']}, "
        f"{result['hardware']['cores']} cores."
    )
    return "\n".join(lines)


def draw(result: dict[str, Any], file: Path) -> None:
    """Latency, threshold and density over time, with the fixed threshold and with the budget."""
    from matplotlib.figure import Figure  # imported late: slow, and only drawing needs it

    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    for name, colour in (("fixed", "#7f7f7f"), ("budget", "#d62728")):
        rows = result["runs"][name]["timeline"]
        seconds = [row["frame"] / result["rate_hz"] for row in rows]
        for axis, key in zip(axes, ("latency_ms", "entropy_threshold", "density"), strict=True):
            values = [np.nan if row[key] is None else row[key] for row in rows]
            label = {"fixed": "fixed threshold", "budget": "with the budget"}[name]
            axis.plot(seconds, values, ".-", markersize=4, linewidth=1, color=colour, label=label)
    axes[0].axhline(result["budget_ms"], color="black", linestyle="--", label="the budget")
    for axis, label in zip(axes, ("stamp to publish, ms", "entropy threshold, nats", "density"), strict=True):
        axis.set(ylabel=label, ylim=(0, None))
        axis.grid(alpha=0.3)
        end = result["frames"] / result["rate_hz"]
        step = result["stretch"] / result["rate_hz"]
        for start in np.arange(step, end, 2 * step):
            axis.axvspan(start, min(start + step, end), color="#1f77b4", alpha=0.08)
    axes[0].legend(loc="lower right")
    axes[2].set(xlabel="seconds; shaded: cluttered frames; without a dot in the middle: left dense")
    figure.suptitle(f"{result['model']}: fixed threshold and a budget of {result['budget_ms']:g} ms")
    files.write_figure(file, figure)
