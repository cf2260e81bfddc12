"""What each runtime makes of a bundle's dense segmenter, in turn in one process, at the size that it sees.

Shape shorthand: h, w low resolution.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rich.progress import track

from sparserefine_ros.benchmarks.clock import device_name, now
from sparserefine_ros.errors import BundleError, ExportError, ParameterError
from sparserefine_ros.segmenter.bundle import Bundle
from sparserefine_ros.segmenter.preprocess import normalise
from sparserefine_ros.segmenter.segmenter import Segmenter

WARM_UP = 3


@torch.inference_mode()
def measure(bundle: Bundle, runtimes: Sequence[str], device: str, precision: str, repeats: int) -> dict[str, Any]:
    """The table as plain data.

    Keys: ``rows`` {runtime: ms, p10, p90, ratio (median of each round's own, over the first that runs), difference
    (largest of the logits over the largest logit, from that same one)}, ``missing`` {runtime: why}, and the setting.
    How long each takes to start cannot be told in one process: the first pays for what all of them load.
    """
    segmenters: dict[str, tuple[Segmenter, torch.Tensor]] = {}
    rows: dict[str, dict[str, float]] = {}
    missing: dict[str, str] = {}
    low, expected = (0, 0), torch.empty(0)
    for name in track(runtimes, description="starting each runtime"):
        try:
            segmenter = Segmenter(bundle, device, precision, refine=False, runtime=name)
        except (ParameterError, BundleError, ExportError) as error:
            missing[name] = str(error)
            continue
        low = segmenter.low_size(bundle.native_size)
        rng = np.random.default_rng(0)
        pixels = torch.from_numpy(rng.integers(0, 256, (1, *low, 3), dtype=np.uint8)).to(segmenter.device)
        images = normalise(pixels)
        logits = segmenter.dense(images).float().cpu()
        expected = expected if segmenters else logits
        difference = float((logits - expected).abs().max() / expected.abs().max())
        rows[name] = {"difference": difference}
        segmenters[name] = (segmenter, images)
    times: dict[str, list[float]] = {name: [] for name in segmenters}
    for turn in range(WARM_UP + repeats):
        for name, (segmenter, images) in segmenters.items():
            begin = now(segmenter.device)
            segmenter.dense(images)
            spent = now(segmenter.device) - begin
            if turn >= WARM_UP:
                times[name].append(spent)
    for name, row in rows.items():
        p10, median, p90 = (float(v) for v in np.percentile(times[name], (10, 50, 90)))
        ratios = [a / b for a, b in zip(times[name], next(iter(times.values())), strict=True)]
        row.update(ms=median, p10=p10, p90=p90, ratio=statistics.median(ratios))
    where = next((s.device for s, _ in segmenters.values()), torch.device("cpu"))
    return {
        "bundle": bundle.name, "size": list(low), "precision": precision, "repeats": repeats, "rows": rows,
        "missing": missing, "device": device_name(where), "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }  # fmt: skip


def markdown(table: dict[str, Any]) -> str:
    """One row a runtime; then the setting."""
    lines = ["| runtime | ms | over the first | difference |", "|---|---|---|---|"]
    for name, row in table["rows"].items():
        lines.append(
            f"| {name} | {row['ms']:.1f} ({row['p10']:.1f}–{row['p90']:.1f}) | {row['ratio']:.2f} "
            f"| {row['difference']:.1e} |"
        )
    height, width = table["size"]
    missing = "".join(f" Not measured: {name} ({why})." for name, why in table["missing"].items())
    lines += [
        "",
        f"Dense segmenter of {table['bundle']} at {width}x{height}, {table['precision']}, {table['device']}, "
        f"{table['threads']} threads, torch {table['torch']}. Medians (10th to 90th percentile) of {table['repeats']} "
        f"rounds in turn after {WARM_UP}.{missing}",
    ]
    return "\n".join(lines)
