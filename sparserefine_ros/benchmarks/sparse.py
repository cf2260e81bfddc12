"""The sparse U-Net on one mask: every engine in turn, and then the peers, in one run.

Times of engines are medians over rounds in which every engine runs once, so that they share whatever the machine is
doing; a peer's passes come after them (`sparse_peers`), and its ratio may hold what the machine did in between. All
include the neighbour maps, which a frame has to build too. Useful work is pairs of sites times channels: what padding,
zeros or bounds cost counts as time, never as work. An engine that needs fewer multiplications, as Winograd's, may so
exceed what the machine's matrix product reaches.
"""

from __future__ import annotations

import statistics
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from sparserefine_ros.benchmarks.clock import device_name, matmul_gflops, now, peak_megabytes, timed
from sparserefine_ros.benchmarks.sparse_case import Case
from sparserefine_ros.benchmarks.sparse_peers import dense_ms, spconv_ms, torchsparse_ms
from sparserefine_ros.networks.fused_unet import FusedUNet
from sparserefine_ros.networks.graphed_unet import GraphedUNet
from sparserefine_ros.networks.refiner import SparseRefiner
from sparserefine_ros.networks.selectors import upsample_nearest
from sparserefine_ros.segmenter.head import build_head
from sparserefine_ros.sparse import KernelMap, Pyramid
from sparserefine_ros.sparse.backends import Backend, Output, pick_backend

CLASSES = 19  # as in Cityscapes
DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4)
MEGAPIXELS = {0.5: (512, 1024), 2.1: (1024, 2048), 4.7: (1536, 3072), 8.4: (2048, 4096)}


class LevelTimer(Backend):
    """Another backend, every layer timed by the level it works on."""

    def __init__(self, backend: Backend, device: torch.device) -> None:
        self.backend, self.device = backend, device
        self.labels: dict[int, str] = {}
        self.ms: dict[str, float] = defaultdict(float)
        self.macs: dict[str, int] = defaultdict(int)
        self._pairs: dict[int, int] = {}

    def pyramid(self, mask: Tensor, levels: int, stride: str) -> Pyramid:
        pyramid = self.backend.pyramid(mask, levels, stride)
        self.labels = {id(m): f"level {level}" for level, m in enumerate(pyramid.submanifold)}
        for level, m in enumerate(pyramid.strided):
            self.labels[id(m)] = self.labels[id(m.transposed)] = f"between {level} and {level + 1}"
        self._pairs = {}
        return pyramid

    def pack(self, weight: Tensor, shortcut: Tensor | None = None) -> Any:
        return self.backend.pack(weight, shortcut)

    def conv(
        self,
        x: Tensor,
        packed: Any,
        kernel_map: KernelMap,
        outputs: Sequence[Output],
        add: Tensor | None = None,
        shortcut: Tensor | None = None,
    ) -> None:
        start = now(self.device)
        self.backend.conv(x, packed, kernel_map, outputs, add=add, shortcut=shortcut)
        label = self.labels[id(kernel_map)]
        self.ms[label] += now(self.device) - start
        pairs = self._pairs.setdefault(id(kernel_map), kernel_map.pairs)
        self.macs[label] += conv_macs(pairs, x, outputs, shortcut)


def conv_macs(pairs: int, x: Tensor, outputs: Sequence[Output], shortcut: Tensor | None) -> int:
    """Useful multiply-adds of one `Backend.conv` over so many ``pairs`` of sites."""
    each = pairs * x.shape[1] + (0 if shortcut is None else shortcut.numel())
    return each * outputs[0].tensor.shape[1]


def measure(case: Case, backends: Sequence[str], repeats: int, peers: bool = True) -> dict[str, Any]:
    """The table as plain data; ``backends[0]`` is ours, to which ratios refer.

    Beside the triton backend its frames as CUDA graphs ("triton graph") are measured, in the same turns. A library that
    is among ``backends`` through its adapter is "... peer" where it works on its own.
    Keys: ``case``, ``totals`` {name: ms}, ``maps`` {name: ms}, ``levels`` [{level, ms, gmac, gflops, share}],
    ``ratios`` {gather_gemm, dense, spconv, torchsparse: time over ours, or None}, ``missing`` {peer: why},
    ``peak_gflops``, ``ends_ms`` (selection, classifier and ensembler), ``memory_mb`` (largest so far when ours had run
    once: the whole process, on CUDA torch's tensors).
    """
    unet, mask = case.unet(), case.mask()
    x = case.colours(int(mask.sum()))
    nets: dict[str, FusedUNet] = {}
    for name in backends:
        nets[name] = FusedUNet(unet, pick_backend(name, case.device, case.dtype), case.dtype)
        if name == backends[0]:  # before any other needs memory
            with torch.inference_mode():
                nets[name](x, nets[name].backend.pyramid(mask, len(case.channels), case.stride))
            memory = peak_megabytes(case.device)
    missing: dict[str, str] = {}
    replay = graph_frame(case, nets["triton"], mask, x, missing) if "triton" in nets else None
    totals: dict[str, list[float]] = defaultdict(list)
    maps: dict[str, list[float]] = defaultdict(list)
    peaks, levels, macs = [], defaultdict(list), {}
    timer = LevelTimer(nets[backends[0]].backend, case.device)
    ours = nets[backends[0]]
    with Progress() as progress, torch.inference_mode():
        row = progress.add_task("engines in turn", total=repeats + 1)
        for turn in range(repeats + 1):  # the first warms up
            for name, net in nets.items():
                start = now(case.device)
                pyramid = net.backend.pyramid(mask, len(case.channels), case.stride)
                built = now(case.device)
                net(x, pyramid)
                if turn:
                    maps[name].append(built - start)
                    totals[name].append(now(case.device) - start)
            if replay is not None:
                ms = timed(replay, case.device)
                if turn:
                    totals["triton graph"].append(ms)
            plain, ours.backend = ours.backend, timer
            timer.ms.clear()
            timer.macs.clear()
            ours(x, timer.pyramid(mask, len(case.channels), case.stride))
            ours.backend = plain
            if turn:
                peaks.append(matmul_gflops(case.device, case.dtype))
                macs = dict(timer.macs)
                for label, ms in timer.ms.items():
                    levels[label].append(ms)
            progress.advance(row)
    median = {name: statistics.median(times) for name, times in totals.items()}
    peak = statistics.median(peaks)
    table = []
    for label in sorted(levels, key=lambda name: (name.split()[1], name.startswith("between"))):
        ms = statistics.median(levels[label])
        gflops = 2 * macs[label] / ms / 1e6
        table.append({"level": label, "ms": ms, "gmac": macs[label] / 1e9, "gflops": gflops, "share": gflops / peak})
    result: dict[str, Any] = {
        "case": {
            "size": list(case.size), "density": case.density, "sites": len(x), "channels": list(case.channels),
            "blocks": case.blocks, "stride": case.stride, "device": device_name(case.device),
            "dtype": str(case.dtype).removeprefix("torch."), "threads": torch.get_num_threads(), "repeats": repeats,
            "torch": str(torch.__version__),
        },
        "ours": backends[0], "totals": median, "maps": {n: statistics.median(t) for n, t in maps.items()},
        "levels": table, "ends_ms": ends_ms(case, mask, repeats), "memory_mb": memory,
        "gmac": sum(macs.values()) / 1e9, "peak_gflops": peak, "missing": missing,
    }  # fmt: skip
    mine = median[backends[0]]
    ratios: dict[str, float | None] = {"gather_gemm": median["torch"] / mine if "torch" in median else None}
    if peers:
        for name, peer in (("dense", dense_ms), ("spconv", spconv_ms), ("torchsparse", torchsparse_ms)):
            peer_ms, why = peer(case, unet, mask, x)
            ratios[name] = None if peer_ms is None else peer_ms / mine
            label = f"{name} peer" if name in nets else name
            if peer_ms is None:
                result["missing"][label] = why
            else:
                result["totals"][label] = peer_ms
    return {**result, "ratios": ratios}


def graph_frame(
    case: Case, net: FusedUNet, mask: Tensor, x: Tensor, missing: dict[str, str]
) -> Callable[[], Any] | None:
    """Replays a frame of ``mask`` and the colours ``x``; None, and why in ``missing``, where that cannot be.

    Unlike the other rows it copies mask and image, and gathers ``x`` from the image.
    """
    image = torch.zeros(*mask.shape, 3, device=case.device, dtype=case.dtype)
    image[mask] = x
    graphed = GraphedUNet(net, case.stride, lambda sites, image: image.view(-1, 3)[sites.flat])
    with torch.inference_mode(), warnings.catch_warnings(record=True) as failures:
        warnings.simplefilter("always")
        for _ in range(3):  # finds the capacities, captures, replays
            _, features = graphed(mask, image)
        theirs = net(x, net.backend.pyramid(mask, len(case.channels), case.stride))
    if graphed.now.frame is None:
        missing["triton graph"] = str(failures[-1].message) if failures else "its frames did not fit"
        return None
    error = float((features - theirs).abs().max() / theirs.abs().max()) if len(theirs) else 0.0
    # Capacities choose other tiles, hence sums in another order.
    if not error <= max(1e-4, 10 * torch.finfo(case.dtype).eps):
        missing["triton graph"] = f"its result differs from triton's by {error:.1e} of the largest value"
        return None
    return lambda: graphed(mask, image)


def ends_ms(case: Case, mask: Tensor, repeats: int) -> float:
    """Everything per pixel around the U-Net: entropy, selection, masks, then classifier, ensembler and argmax."""
    height, width = case.size
    refiner = SparseRefiner(CLASSES, case.channels, case.stride, case.blocks).eval().to(case.device)
    head = build_head(refiner, case.device)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, CLASSES, height // 2, width // 2, generator=generator).to(case.device)
    logits = logits.contiguous(memory_format=torch.channels_last)  # as a dense segmenter leaves them
    sites = Backend().pyramid(mask, 1, case.stride).levels[0]
    features = torch.randn(len(sites), case.channels[0], generator=generator).to(case.device)

    def ends() -> None:
        initial = head.initial(logits)
        upsample_nearest(initial.entropy > 1.0, case.size)
        ids, confidence = (upsample_nearest(t, case.size) for t in (initial.mask, initial.confidence))
        head.merge(features, logits, sites, ids, confidence)

    with torch.inference_mode():
        return statistics.median([timed(ends, case.device) for _ in range(repeats + 1)][1:])


def sweep(case: Case, backend: str, repeats: int) -> dict[str, list[dict[str, float]]]:
    """Time of one backend over density at the case's size, and over image size at its density."""
    cases = {
        "density": [replace(case, density=d) for d in DENSITIES],
        "size": [replace(case, size=size) for size in MEGAPIXELS.values()],
    }
    out: dict[str, list[dict[str, float]]] = {}
    net = FusedUNet(case.unet(), pick_backend(backend, case.device, case.dtype), case.dtype)
    with Progress() as progress, torch.inference_mode():
        row = progress.add_task("over density and size", total=sum(map(len, cases.values())))
        for name, group in cases.items():
            out[name] = []
            for one in group:
                mask = one.mask()
                x = one.colours(int(mask.sum()))
                times = []
                for _ in range(repeats + 1):
                    start = now(case.device)
                    net(x, net.backend.pyramid(mask, len(case.channels), case.stride))
                    times.append(now(case.device) - start)
                megapixels = one.size[0] * one.size[1] / 1e6
                point = {"density": one.density, "megapixels": megapixels, "sites": float(len(x))}
                out[name].append({**point, "ms": statistics.median(times[1:])})
                progress.advance(row)
    return out
