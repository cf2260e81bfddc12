"""Decoders stage by stage: multiply-adds, parameters and time, as in Table IV of the superpixel paper.

Weights are random: this is about cost alone. Times are medians over rounds in which every network runs once.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from sparserefine_ros.benchmarks.clock import device_name, now
from sparserefine_ros.networks.macs import flop_counter
from sparserefine_ros.networks.registry import DENSE, build
from sparserefine_ros.networks.superpixel import PAPER

CLASSES = 19  # as in Cityscapes
BASELINE = "per-pixel"
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "per-pixel": ("compact", {}),
    "offset learning": ("compact", {"offsets": True}),
    "superpixel": ("superpixel", {"channels": 64}),
    "OffSeg-T": ("offseg", {"variant": "T"}),
    "OffSeg-B": ("offseg", {"variant": "B"}),
    "OffSeg-L": ("offseg", {"variant": "L"}),
    "superpixel ResNet-50": ("superpixel", {"backbone": "resnet50", **PAPER}),
    "superpixel ConvNeXt-L": ("superpixel", {"backbone": "convnext_large", **PAPER}),
}
"""Rows by name. The first three share one encoder; the last two need the package transformers."""
STAGES: dict[str, dict[str, str]] = {
    "compact": {"encode": "backbone", "classifier": "classifier"},
    "superpixel": {
        "backbone": "backbone", "hypercolumn": "hypercolumn", "tokenize": "tokenization",
        "attend": "self-attention", "project": "association",
    },
    "offseg": {"encoder": "backbone", "fuse": "fusion", "classifier": "offsets"},
}  # fmt: skip
"""By network: its methods and submodules, and the stages that they are. What remains is "other"."""


def measure(names: Sequence[str], size: tuple[int, int], device: torch.device, repeats: int) -> dict[str, Any]:
    """The table as plain data.

    Keys: the setting, ``missing`` {name: why}, and ``rows`` {name: {params_m, macs_g, ms, decoder_macs_g, decoder_ms,
    ratio (decoder time over the per-pixel decoder's, where that was measured), stages {stage: {macs_g, ms}}}}.
    """
    networks: dict[str, tuple[nn.Module, Mapping[str, str]]] = {}
    missing: dict[str, str] = {}
    for name in names:
        kind, args = NETWORKS[name]
        try:
            networks[name] = build(DENSE, kind, CLASSES, args).eval().to(device), STAGES[kind]
        except ValueError as error:  # a package is missing
            missing[name] = str(error)
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
    macs = {name: stage_macs(network, stages, image) for name, (network, stages) in networks.items()}
    times: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in networks}
    with Progress() as progress:
        row = progress.add_task("networks in turn", total=repeats + 1)
        for turn in range(repeats + 1):  # the first warms up
            for name, (network, stages) in networks.items():
                for stage, spent in by_stage(network, stages, image, lambda: now(device)).items():
                    if turn:
                        times[name][stage].append(spent)
            progress.advance(row)
    rows: dict[str, dict[str, Any]] = {}
    for name, (network, _) in networks.items():
        ms = {stage: statistics.median(values) for stage, values in times[name].items()}
        total, backbone = ms.pop("total"), ms["backbone"]
        work = macs[name]
        rows[name] = {
            "params_m": sum(p.numel() for p in network.parameters()) / 1e6,
            "macs_g": work["total"] / 1e9, "ms": total,
            "decoder_macs_g": (work["total"] - work["backbone"]) / 1e9, "decoder_ms": total - backbone,
            "stages": {stage: {"macs_g": work[stage] / 1e9, "ms": ms[stage]} for stage in ms},
        }  # fmt: skip
    for row_ in rows.values():
        row_["ratio"] = row_["decoder_ms"] / rows[BASELINE]["decoder_ms"] if BASELINE in rows else None
    return {
        "size": list(size), "classes": CLASSES, "device": device_name(device), "threads": torch.get_num_threads(),
        "torch": str(torch.__version__), "repeats": repeats, "rows": rows,
        "missing": missing,
    }  # fmt: skip


def stage_macs(network: nn.Module, stages: Mapping[str, str], image: Tensor) -> dict[str, float]:
    """Multiply-adds by stage and in "total"."""
    with flop_counter() as counter:
        return by_stage(network, stages, image, lambda: counter.get_total_flops() / 2)


@torch.no_grad()
def by_stage(
    network: nn.Module, stages: Mapping[str, str], image: Tensor, read: Callable[[], float]
) -> dict[str, float]:
    """How far ``read`` rises within each stage of one forward pass, within "other" and in "total"."""
    spent: dict[str, float] = dict.fromkeys(stages.values(), 0.0)
    with ExitStack() as wraps:
        for name, stage in stages.items():
            wraps.enter_context(_watched(network, name, stage, read, spent))
        start = read()
        network(image)
        total = read() - start
    return {**spent, "other": total - sum(spent.values()), "total": total}


@contextmanager
def _watched(
    network: nn.Module, name: str, stage: str, read: Callable[[], float], spent: dict[str, float]
) -> Iterator[None]:
    """Adds to ``spent[stage]`` what every call of the method or submodule ``name`` adds to ``read``."""
    target = getattr(network, name)
    if isinstance(target, nn.Module):
        modules = target if isinstance(target, nn.ModuleList) else [target]

        def before(*_: Any) -> None:
            spent[stage] -= read()

        def after(*_: Any) -> None:
            spent[stage] += read()

        hooks = [h for m in modules for h in (m.register_forward_pre_hook(before), m.register_forward_hook(after))]
        yield
        for hook in hooks:
            hook.remove()
        return

    def method(*args: Any) -> Any:
        start = read()
        result = target(*args)
        spent[stage] += read() - start
        return result

    setattr(network, name, method)  # on the instance, over the class's
    yield
    delattr(network, name)


def markdown(result: dict[str, Any]) -> str:
    """One line a network."""
    lines = [
        "| | M parameters | GMAC | of which decoder | ms | of which decoder | decoder / per-pixel | ms by stage |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        stages = ", ".join(f"{stage} {values['ms']:.1f}" for stage, values in row["stages"].items())
        ratio = "–" if row["ratio"] is None else f"{row['ratio']:.2f}"
        lines.append(
            f"| {name} | {row['params_m']:.2f} | {row['macs_g']:.2f} | {row['decoder_macs_g']:.2f} | {row['ms']:.1f} "
            f"| {row['decoder_ms']:.1f} | {ratio} | {stages} |"
        )
    height, width = result["size"]
    missing = "".join(f" Not measured: {name} ({why})." for name, why in result["missing"].items())
    lines += [
        "",
        f"Images of {width}x{height}, {result['classes']} classes, float32, random weights; {result['device']}, "
        f"{result['threads']} threads, torch {result['torch']}. Medians of {result['repeats']} rounds in turn "
        f"after one.{missing}",
    ]
    return "\n".join(lines)
