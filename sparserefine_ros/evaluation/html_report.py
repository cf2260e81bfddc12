"""The report of an evaluation as a page for people: what `report.build` holds, drawn.

Shape shorthand: K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparserefine_ros.evaluation import page, report
from sparserefine_ros.evaluation.replay_metrics import PERCENTILES
from sparserefine_ros.evaluation.report_charts import COLOURS, density_recall_chart, latency_charts, reliability_chart
from sparserefine_ros.evaluation.worst_frames import ShownFrame


def write(result: Mapping[str, Any], choice: str, frames: Sequence[ShownFrame], path: Path) -> None:
    """Writes the page of ``result``; ``choice`` and ``frames`` as `worst_frames` gives them."""
    page.write("report.html.j2", context(result, choice, frames), path)


def context(result: Mapping[str, Any], choice: str, frames: Sequence[ShownFrame]) -> dict[str, Any]:
    """Everything that the template shows."""
    curves, scored = result["curves"], result["frames_scored"] > 0
    palette = zip(result["classes"]["names"], result["classes"]["palette"], strict=True)
    return {
        "title": f"{result['model']} on {result['bag']['name']}",
        "r": result,
        "remarks": report.remarks(result),
        "percentile_names": [*PERCENTILES, "max"],
        "classes": class_rows(result) if scored else [],
        "confusion": confusion_rows(result) if scored else [],
        "confusions": largest_confusions(result) if scored else [],
        "unlabelled_column": any(row[-1] for row in result["confusion"] or []),
        "reliability_chart": reliability_chart(curves["reliability"]) if curves else None,
        "density_recall_chart": density_recall_chart(curves) if curves else None,
        "latency": latency_charts(result),
        "stage_colours": COLOURS,
        "legend": [(name, _colour(rgb)) for name, rgb in palette],
        "choice": choice,
        "frames": frames,
        "setting": setting(result),
    }


def class_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """By class: name, colour, share of the labelled pixels, IoU with its interval, boundary IoU, precision, recall."""
    counts = np.array(result["confusion"], np.float64)  # [K, K + 1]
    hits, true, guessed = np.diagonal(counts), counts.sum(1), counts[:, :-1].sum(0)
    intervals = (result["intervals"] or {}).get("iou", {})
    rows = []
    for i, name in enumerate(result["classes"]["names"]):
        rows.append(
            {
                "name": name,
                "colour": _colour(result["classes"]["palette"][i]),
                "share": true[i] / max(counts.sum(), 1),
                "iou": result["iou"][name],
                "interval": intervals.get(name),
                "boundary_iou": result["boundary_iou_by_class"][name],
                "precision": hits[i] / guessed[i] if guessed[i] else None,
                "recall": hits[i] / true[i] if true[i] else None,
            }
        )
    return rows


def confusion_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """By true class: its cells, each the share of the class's pixels (None: no pixel), and what to say about it."""
    names = [*result["classes"]["names"], "unlabelled"]
    rows = []
    for i, counts in enumerate(result["confusion"]):
        total = sum(counts)
        cells = []
        for j, count in enumerate(counts):
            share = count / total if total else None
            note = f"{names[i]} taken for {names[j]}: {page.percent(share, 2)}, {count} pixels"
            cells.append({"share": share, "note": note, "right": i == j})
        rows.append({"name": names[i], "colour": _colour(result["classes"]["palette"][i]), "cells": cells})
    return rows


def largest_confusions(result: Mapping[str, Any], count: int = 8) -> list[dict[str, Any]]:
    """The pairs of true and predicted class with the most pixels, as shares of all wrong pixels."""
    counts = np.array(result["confusion"], np.float64)
    np.fill_diagonal(counts, 0)
    names = [*result["classes"]["names"], "unlabelled"]
    order = np.argsort(-counts, axis=None, kind="stable")[:count]
    pairs = [(int(k) // counts.shape[1], int(k) % counts.shape[1]) for k in order]
    return [
        {
            "true": names[i],
            "guess": names[j],
            "colour": _colour(result["classes"]["palette"][i]),
            "of_errors": counts[i, j] / counts.sum(),
        }
        for i, j in pairs
        if counts[i, j]
    ]


def setting(result: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, Any]]]]:
    """What it takes to run it again: (heading, rows of name and value)."""
    commit, hardware, bag = result["commit"], result["hardware"], result["bag"]
    state = "not from a git checkout" if commit is None else commit["sha"] + (" with changes" * commit["changed"])
    versions = [(name, value) for name, value in result["versions"].items() if value is not None]
    resolved = ("decoder", "entropy_threshold", "scale", "device", "precision", "sparse_backend", "runtime", "threads")
    replay = [(name, result[name]) for name in ("mode", "rate", "lossless", "node_exit_code") if name in result]
    return [
        ("Hardware", [(name, value or "none") for name, value in hardware.items()]),
        ("Versions", [("commit", state), *versions]),
        ("Configuration, as asked", list(result["parameters"].items())),
        ("Configuration, as run", [(name, result[name]) for name in resolved]),
        ("Weights, sha256", list(result["weights_sha256"].items())),
        ("Bag", [(name, value) for name, value in bag.items() if value is not None]),
        ("Replay", replay),
    ]


def _colour(rgb: Sequence[int]) -> str:
    """A class's colour for a style sheet: three integers, whatever the file held."""
    red, green, blue = (int(v) for v in rgb)
    return f"rgb({red},{green},{blue})"
