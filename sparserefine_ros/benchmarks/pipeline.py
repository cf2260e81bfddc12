"""SparseRefine beside what it speeds up: each of the paper's models dense at native resolution, dense at low, refined.

Weights are random, and which pixels are refined is given, at the density that the paper reports for the model: this is
about cost alone. Frames lie on the device already; every way ends in class ids of native size.

Shape shorthand: B images, K classes, H, W native size, h, w low resolution.
"""

from __future__ import annotations

import gc
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from sparserefine_ros.benchmarks.clock import device_name, now
from sparserefine_ros.benchmarks.paper_models import CLASSES, MODELS, gmacs, params_m
from sparserefine_ros.errors import is_out_of_memory
from sparserefine_ros.networks.graphed import Graphed
from sparserefine_ros.networks.macs import counting_refiner_macs
from sparserefine_ros.networks.repeater import RepeatRefiner, check_repeatable
from sparserefine_ros.networks.repetition_recording import record
from sparserefine_ros.networks.selectors import upsample_nearest
from sparserefine_ros.segmenter.dense import PRECISIONS, fold_batch_norm, ready
from sparserefine_ros.segmenter.engine_trial import Case, fastest
from sparserefine_ros.segmenter.fitting import why_not_repeatable
from sparserefine_ros.segmenter.head import build_head
from sparserefine_ros.segmenter.refining import Repeats, Seen, Sparse
from sparserefine_ros.sparse.backends import pick_backend

WAYS = ("hr", "lr", "refined")
REPEATED = "repeated"
"""One way more, where it is asked for and the model can be repeated at single sites."""
STAGES = ("dense", "select", "refine", "merge")
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Setting:
    """What all rows have in common."""

    size: tuple[int, int] = (1024, 2048)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    warmup: int = 1
    repeats: int = 3
    stride: str = "dilate"
    backend: str = "auto"
    graph: bool = False  # the dense segmenter as a CUDA graph
    repeat: bool = False  # also refined by `networks.repetition`, in the place of the sparse network


class Pipeline:
    """One model at one precision and batch size; what `Segmenter` does with a batch, from frames to class ids."""

    def __init__(self, name: str, setting: Setting, precision: str, batch: int) -> None:
        model, self.device, self.dtype = MODELS[name], setting.device, PRECISIONS[precision]
        torch.manual_seed(0)
        network = ready(fold_batch_norm(model.dense()), self.device, self.dtype)
        self.network = Graphed(lambda images: (network(images),)) if setting.graph else network
        self.plain = network
        refiner = model.refiner(setting.stride).to(self.device)
        backend = pick_backend(setting.backend, self.device, self.dtype)
        if setting.backend == "auto":
            args = model.refiner_args(setting.stride)
            backend = fastest(Case(CLASSES, args, setting.size, str(self.device), precision))
        self.backend = backend.name
        self.refining = Sparse(refiner, backend, self.dtype, None)
        self.repeating: Repeats | None = None
        if setting.repeat and not why_not_repeatable(network, network, self.device):
            self.repeating = Repeats(RepeatRefiner(), backend, self.dtype, network)
            self.recorded = check_repeatable(network, network, self.device)
            self.plain_head = build_head(self.repeating.network, self.device)
        self.head = build_head(refiner, self.device)
        self.size, low = setting.size, model.low_size(setting.size)
        native = torch.randint(256, (batch, *self.size, 3), dtype=torch.uint8).to(self.device)
        self.images, self.low = (
            torch.randn(batch, 3, *size).to(self.device, memory_format=torch.channels_last) for size in (self.size, low)
        )
        selected = model.selected(self.size, batch).to(self.device)
        self.seen = Seen(selected, native, native, None, None)  # the refiner reads colours alone

    def hr(self) -> Tensor:  # -> [B, H, W]
        return self._dense(self.images).argmax(1)

    def lr(self) -> Tensor:  # -> [B, H, W]
        return upsample_nearest(self._dense(self.low).argmax(1), self.size)

    def refined(self, stage: Callable[[str], Any] = lambda name: nullcontext()) -> Tensor:  # -> [B, H, W]
        with stage("dense"):
            logits = self._dense(self.low)
        with stage("select"):
            initial = self.head.initial(logits)
            ids, confidence = (upsample_nearest(t, self.size) for t in (initial.mask, initial.confidence))
            upsample_nearest(initial.entropy > 1.0, self.size)  # random weights: it costs, and decides nothing
        with stage("refine"):
            refined = self.refining(self.seen)
            assert refined is not None
        with stage("merge"):
            self.head.merge(refined.features, logits, refined.sites, ids, confidence)
        return ids

    def repeated(self) -> Tensor:  # -> [B, H, W]
        assert self.repeating is not None
        logits, kept = record(self.plain, self.low, self.recorded)
        initial = self.plain_head.initial(logits)
        ids, confidence = (upsample_nearest(t, self.size) for t in (initial.mask, initial.confidence))
        upsample_nearest(initial.entropy > 1.0, self.size)
        refined = self.repeating(replace(self.seen, kept=kept))
        assert refined is not None
        self.plain_head.merge(refined.features, logits, refined.sites, ids, confidence)
        return ids

    def repeated_gmac(self) -> float:
        """Billions of multiply-adds an image that repetition adds to those at low resolution."""
        assert self.repeating is not None
        _, kept = record(self.plain, self.low, self.recorded)
        with counting_refiner_macs(self.repeating.network) as counts:
            self.repeating(replace(self.seen, kept=kept))
        return sum(counts) / 1e9 / len(self.low)

    def _dense(self, images: Tensor) -> Tensor:  # [B, 3, h, w] -> [B, K, h, w]
        logits = self.network(images)
        return logits[0] if isinstance(logits, tuple) else logits


def measure(
    names: Sequence[str], setting: Setting, precisions: Sequence[str], batches: Sequence[int]
) -> dict[str, Any]:
    """The table as plain data.

    Keys: ``setting``, ``params_m`` {model: millions, dense}, ``missing`` {model: why}, ``models`` {model: params_m
    {dense, refiner}, gmac {hr, lr, refiner}, density, rows}. A row is one precision and batch size: ``hr``, ``lr`` and
    ``refined`` {ms, p10, p90, mean_ms} an image (or "out of memory"), ``stages`` {stage: ms an image} of the last,
    ``speedup`` (hr over refined; None where one is missing) and ``backend``. Times are medians over rounds in which
    every way runs once. Where the setting asks for it and the model can be repeated, a row has ``repeated`` as well,
    with ``repeated_speedup`` and ``repeated_gmac``.
    """
    result: dict[str, Any] = {"params_m": {}, "missing": {}, "models": {}}
    for name in names:
        try:
            params = params_m(MODELS[name])
        except ValueError as error:  # a package is missing
            result["missing"][name] = str(error)
            continue
        result["params_m"][name] = params["dense"]
        result["models"][name] = {
            "params_m": params, "gmac": gmacs(MODELS[name], setting.size, setting.stride),
            "density": MODELS[name].density, "low_size": list(MODELS[name].low_size(setting.size)), "rows": [],
        }  # fmt: skip
    with Progress() as progress:
        task = progress.add_task("models", total=len(result["models"]) * len(precisions) * len(batches))
        for name, entry in result["models"].items():
            for precision in precisions:
                for batch in batches:
                    progress.update(task, description=f"{name} {precision} batch {batch}")
                    entry["rows"].append(measure_row(name, setting, precision, batch))
                    progress.advance(task)
    result["setting"] = {
        "size": list(setting.size), "device": device_name(setting.device), "torch": str(torch.__version__),
        "threads": torch.get_num_threads(), "warmup": setting.warmup, "repeats": setting.repeats,
        "stride": setting.stride, "graph": setting.graph, "repeat": setting.repeat, "weights": "random",
        "selection": "synthetic, at the paper's density",
    }  # fmt: skip
    return result


@torch.inference_mode()
def measure_row(name: str, setting: Setting, precision: str, batch: int) -> dict[str, Any]:
    """One precision and batch size; see `measure`."""
    row: dict[str, Any] = {"precision": precision, "batch": batch, "stages": None, "speedup": None}
    with _memory_freed():
        try:
            pipeline = Pipeline(name, setting, precision, batch)
        except (RuntimeError, MemoryError) as error:
            _only_memory(error)
            return {**row, **dict.fromkeys(WAYS, OUT_OF_MEMORY)}
        row["backend"] = pipeline.backend
        ways = (*WAYS, REPEATED) if pipeline.repeating else WAYS
        times: dict[str, list[float]] = {way: [] for way in ways}
        stages: dict[str, list[float]] = defaultdict(list)
        for turn in range(setting.warmup + setting.repeats):
            for way in list(times):
                try:
                    start = now(setting.device)
                    getattr(pipeline, way)()
                    spent = now(setting.device) - start
                except (RuntimeError, MemoryError) as error:
                    _only_memory(error)
                    del times[way]
                    continue
                if turn >= setting.warmup:
                    times[way].append(spent / batch)
        if "refined" in times:  # by themselves: waiting for the device after every stage takes time too
            for _ in range(max(1, setting.repeats // 10)):
                pipeline.refined(lambda stage: _timed(stage, stages, setting.device, batch))
            row["stages"] = {stage: statistics.median(stages[stage]) for stage in STAGES}
        if REPEATED in times:
            row["repeated_gmac"] = pipeline.repeated_gmac()
        del pipeline
    for way in ways:
        row[way] = _summary(times[way]) if way in times else OUT_OF_MEMORY
    for way, key in (("refined", "speedup"), (REPEATED, "repeated_speedup")):
        if "hr" in times and way in times:
            row[key] = row["hr"]["ms"] / row[way]["ms"]
    return row


@contextmanager
def _timed(stage: str, into: dict[str, list[float]], device: torch.device, batch: int) -> Iterator[None]:
    start = now(device)
    yield
    into[stage].append((now(device) - start) / batch)


def _summary(times: Sequence[float]) -> dict[str, float]:
    p10, median, p90 = (float(v) for v in np.percentile(times, (10, 50, 90)))
    return {"ms": median, "p10": p10, "p90": p90, "mean_ms": statistics.fmean(times)}


def _only_memory(error: RuntimeError | MemoryError) -> None:
    """Raises ``error`` again unless it says that memory ran out; then gives back what can be."""
    if not is_out_of_memory(error):
        raise error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _memory_freed() -> Iterator[None]:
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def markdown(result: dict[str, Any]) -> str:
    """One row a model, precision and batch size; then the setting."""
    lines = [
        "| model | parameters, M | GMAC | precision, batch | HR dense, ms | LR dense, ms | LR + SparseRefine, ms | "
        "speed-up | dense / select / refine / merge, ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    if repeat := result["setting"]["repeat"]:
        lines[0] += " + repeat, GMAC | LR + repeat, ms | speed-up |"
        lines[1] += "---|---|---|"
    for name, entry in result["models"].items():
        params, work = entry["params_m"], entry["gmac"]
        cost = [
            f"{params['dense']:.1f}, refined {params['dense'] + params['refiner']:.1f}",
            f"HR {work['hr']:.0f}, LR {work['lr']:.0f}, refined {work['lr'] + work['refiner']:.0f}",
        ]
        for row in entry["rows"]:
            times = [_cell(row[way]) for way in WAYS]
            speedup = f"{row['speedup']:.2f}" if row["speedup"] else "–"
            stages = " / ".join(f"{row['stages'][s]:.1f}" for s in STAGES) if row["stages"] else "–"
            cells = [name, *cost, f"{row['precision']}, {row['batch']}", *times, speedup, stages]
            if repeat:
                known = "repeated_gmac" in row
                cells += [f"{row['repeated_gmac']:.0f}" if known else "–", _cell(row.get(REPEATED, "–"))]
                cells += [f"{row['repeated_speedup']:.2f}" if "repeated_speedup" in row else "–"]
            lines.append(f"| {' | '.join(cells)} |")
    setting = result["setting"]
    height, width = setting["size"]
    graphs = "dense parts as CUDA graphs; " if setting["graph"] else ""
    missing = "".join(f" Not measured: {name} ({why})." for name, why in result["missing"].items())
    lines += [
        "",
        f"Random weights; selections are synthetic, at the paper's density. Median an image (10th to 90th percentile) "
        f"of {setting['repeats']} rounds in turn after {setting['warmup']}; frames of {width}x{height}, already on the "
        f"device; {graphs}stages timed apart; {setting['stride']} strides; {setting['device']}, "
        f"{setting['threads']} threads, torch {setting['torch']}.{missing}",
    ]
    return "\n".join(lines)


def _cell(way: dict[str, float] | str) -> str:
    return way if isinstance(way, str) else f"{way['ms']:.1f} ({way['p10']:.1f}–{way['p90']:.1f})"
