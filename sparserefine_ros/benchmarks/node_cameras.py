"""How fairly several cameras are served that share one model: the part of `sparserefine bench node --cameras N`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparserefine_ros.evaluation.replay_metrics import percentiles

if TYPE_CHECKING:
    from sparserefine_ros.node.load import LoadLog

COUNTERS = ("received", "processed", "dropped")


def names(count: int) -> list[str]:
    """What `count` cameras are called."""
    return [f"camera{i + 1}" for i in range(count)]


def by_camera(log: LoadLog, cameras: list[str], first_ns: int) -> dict[str, Any]:
    """Each camera's frames and the milliseconds from stamp to publish, and how evenly the cameras were served.

    Counts are over the whole run, `received`, `processed` and `dropped` as the node tells them in /diagnostics (None
    where it did not); latencies are of frames stamped from ``first_ns`` on. Fairness is the most frames processed of a
    camera over the fewest, 1 at best, None where a camera got nothing.
    """
    rows: list[dict[str, Any]] = []
    for camera in cameras:
        stamps = [stamp for stamp in log.sent if log.camera[stamp] == camera]
        masks = sum(stamp in log.masks for stamp in stamps)
        told = [log.timing[stamp]["latency_ms"] for stamp in stamps if stamp >= first_ns and stamp in log.timing]
        counters = log.counters.get(camera, {})
        rows.append(
            {
                "camera": camera,
                "sent": len(stamps),
                "masks": masks,
                **{name: counters.get(name) for name in COUNTERS},
                "stamp_to_publish_ms": percentiles(told),
            }  # fmt: skip
        )
    served = [row["masks"] for row in rows]
    return {"cameras": rows, "fairness": max(served) / min(served) if min(served) else None, "strays": log.strays}


def markdown(result: dict[str, Any]) -> str:
    """A row for each camera."""
    lines = [
        "| camera | sent | received | processed | dropped | p50 ms | p95 ms | max ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["cameras"]:
        counts = [_or_dash(row[name]) for name in ("sent", *COUNTERS)]
        latency = [row["stamp_to_publish_ms"][p] for p in ("p50", "p95", "max")]
        lines.append(
            f"| {row['camera']} | " + " | ".join([*counts, *("–" if v is None else f"{v:.1f}" for v in latency)]) + " |"
        )
    fairness = "starved" if result["fairness"] is None else f"{result['fairness']:.3f}"
    lines.append(f"\nMost over fewest masks of a camera: {fairness}; masks on a wrong topic: {result['strays']}.")
    return "\n".join(lines)


def _or_dash(value: int | None) -> str:
    return "–" if value is None else str(value)
