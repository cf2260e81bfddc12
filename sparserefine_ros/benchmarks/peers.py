"""SparseRefine beside what the paper compares it with, on the logits of one dense segmenter.

Every row but HR dense starts from the same low-resolution prediction; those that refine selected pixels refine the
same ones. Accuracy, work and time as in `evaluation.compare`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sparserefine_ros.datasets.base import Sample
from sparserefine_ros.errors import ParameterError
from sparserefine_ros.evaluation.compare import HR, LR, WARM_UP, compare_segmenters, figure, frames, refined_name
from sparserefine_ros.networks.registry import REFINERS, build
from sparserefine_ros.segmenter.bundle import Bundle, NetworkSpec, save_network
from sparserefine_ros.segmenter.fitting import why_not_repeatable
from sparserefine_ros.segmenter.segmenter import Segmenter
from sparserefine_ros.training.bundle import copy_dense

BILATERAL, POINTREND, POINTREND_SELECTED = "LR + bilateral", "LR + PointRend", "LR + PointRend, selected pixels"
REPEAT = "LR + repeat, untrained"


def measure(
    bundle: Bundle,
    samples: Sequence[Sample],
    pointrend: Bundle | None = None,
    patches: Sequence[int] = (256, 512),
    patch_densities: Sequence[float] = (0.0,),
    device: str = "auto",
    precision: str = "fp32",
    threshold: float | None = None,
) -> dict[str, Any]:
    """The table of `evaluation.compare.compare_segmenters`, a row for each peer.

    pointrend: a bundle with a trained PointRend over the dense segmenter of ``bundle``; None leaves it out.
    patches, patch_densities: sizes and densities as `PatchRefiner` takes them, a row for each pair.
    Raises ParameterError where the two bundles do not give the same logits.
    """
    if pointrend:
        _check_same_logits(bundle, pointrend)
    with TemporaryDirectory() as folder:
        plain = copy_dense(bundle, Path(folder))

        def untrained(network: str, args: dict[str, Any]) -> NetworkSpec:
            module = build(REFINERS, network, len(bundle.classes), args)
            return save_network(plain.path, module, network, args, f"{network}.safetensors")

        high = Segmenter(bundle, device, precision, refine=False, scale=1.0)
        low = Segmenter(bundle, device, precision, threshold, refine=False)
        refined: dict[str, Bundle] = {}
        if bundle.refiner and bundle.refiner.network in ("sparserefine", "repeat"):
            refined[refined_name(bundle)] = bundle
        refined[BILATERAL] = replace(plain, refiner=untrained("bilateral", {}))
        if not why_not_repeatable(high.dense, low.dense, low.device):
            refined[REPEAT] = replace(plain, refiner=untrained("repeat", {}))
        if pointrend and pointrend.refiner:
            refined[POINTREND] = pointrend
            everywhere = replace(pointrend.refiner, args={**pointrend.refiner.args, "where": "entropy"})
            refined[POINTREND_SELECTED] = replace(pointrend, refiner=everywhere)
        for size in patches:
            for density in patch_densities:
                spec = untrained("patches", {"size": size, "density": density})
                refined[patches_name(size, density)] = replace(plain, refiner=spec)
        threshold = low.entropy_threshold  # everyone's
        segmenters = {HR: high, LR: low}
        segmenters |= {name: Segmenter(one, device, precision, threshold) for name, one in refined.items()}
        return compare_segmenters(segmenters, samples)


def patches_name(size: int, density: float) -> str:
    """How a row of patches is called."""
    return f"LR + patches of {size}" + (f", over {100 * density:g} % selected" if density else "")


def markdown(table: dict[str, Any]) -> str:
    """One line a row, then the setting."""
    lines = [
        "| | mIoU | as HR | pixels worked on | GMAC | MACs / HR | time / HR | ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in table["rows"].items():
        ratio = table["ratios"].get(name, {"macs": 1.0, "time": 1.0})
        density = f"{row['density']:.1%}" if "density" in row else "–"
        lines.append(
            f"| {name} | {figure(100 * row['miou'])} | {row['agreement']:.1%} | {density} | {figure(row['macs_g'])} "
            f"| {figure(ratio['macs'])} | {figure(ratio['time'])} | {figure(row['ms'], 0)} |"
        )
    height, width = table["size"]
    lines += [
        "",
        f"{table['bundle']}, {frames(table['frames'])} of {width}x{height}, threshold {table['threshold']:.4f} nats, "
        f"{table['device']} with {table['threads']} threads, {table['precision']}, torch {table['torch']}; medians of "
        f"one interleaved run after {WARM_UP} frames, from camera pixels to mask; a ratio is the median of each "
        "frame's own ratio.",
    ]
    return "\n".join(lines)


def _check_same_logits(bundle: Bundle, pointrend: Bundle) -> None:
    if pointrend.refiner is None or pointrend.refiner.network != "pointrend":
        raise ParameterError(f"bundle {pointrend.name!r} has no refiner pointrend; train one: `sparserefine train`")
    for what in ("dense", "native", "scale", "temperature"):
        ours, theirs = getattr(bundle, what), getattr(pointrend, what)
        if ours != theirs:
            raise ParameterError(
                f"bundles {bundle.name!r} and {pointrend.name!r} differ in {what}: {ours} and {theirs}; train "
                f"pointrend with `bundle: {bundle.name}` in its recipe"
            )
