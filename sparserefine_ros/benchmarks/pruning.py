"""What token pruning saves in Mask2Former's Swin: multiply-adds and time, as SparseRefine's Table 3a compares them.

Weights are random: this is about cost alone, and which windows are kept does not change it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from rich.progress import track

from sparserefine_ros.benchmarks.clock import device_name, now
from sparserefine_ros.benchmarks.paper_models import CLASSES
from sparserefine_ros.networks.macs import dense_macs
from sparserefine_ros.networks.mask2former import Mask2Former


@torch.inference_mode()
def measure(
    model: str, keeps: Sequence[Sequence[float]], size: tuple[int, int], device: torch.device, repeats: int
) -> dict[str, Any]:
    """Keys: ``rows``, each {keep, gmac, swin_gmac, ms, ratio over the unpruned model}, the unpruned first; the setting.

    Times are medians over rounds in which every row runs once. Raises ValueError as `Mask2Former`.
    """
    nets = []
    for keep in ([1.0] * 4, *keeps):
        torch.manual_seed(0)
        nets.append((list(keep), Mask2Former(CLASSES, model, keep=keep).eval().to(device)))
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
    rows: list[dict[str, Any]] = []
    for keep, net in track(nets, description="warming up"):
        encoder = net.model.pixel_level_module.encoder
        rows.append(
            {
                "keep": keep,
                "gmac": dense_macs(lambda net=net: net(image)) / 1e9,  # type: ignore[misc]
                "swin_gmac": dense_macs(lambda encoder=encoder: encoder(image)) / 1e9,  # type: ignore[misc]
            }
        )
    times: list[list[float]] = [[] for _ in nets]
    for _ in track(range(repeats), description="timing them in turn"):
        for (_, net), spent in zip(nets, times, strict=True):
            start = now(device)
            net(image)
            spent.append(now(device) - start)
    for row, spent in zip(rows, times, strict=True):
        row["ms"] = statistics.median(spent)
        row["ratio"] = statistics.median(a / b for a, b in zip(spent, times[0], strict=True))
    return {
        "model": model, "rows": rows, "size": list(size), "device": device_name(device), "repeats": repeats,
        "threads": torch.get_num_threads(), "torch": str(torch.__version__),
    }  # fmt: skip


def markdown(result: dict[str, Any]) -> str:
    """One line a row, then the setting."""
    lines = ["| windows kept, by stage | GMAC of Swin | GMAC | ms | time / unpruned |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        kept = ", ".join(f"{share:.0%}" for share in row["keep"])
        lines.append(f"| {kept} | {row['swin_gmac']:.1f} | {row['gmac']:.1f} | {row['ms']:.0f} | {row['ratio']:.2f} |")
    height, width = result["size"]
    lines += [
        "",
        f"Mask2Former-{result['model'].upper()} on {width}x{height}, random weights; median of {result['repeats']} "
        f"rounds in turn after one; {result['device']}, {result['threads']} threads, fp32, torch {result['torch']}.",
    ]
    return "\n".join(lines)
