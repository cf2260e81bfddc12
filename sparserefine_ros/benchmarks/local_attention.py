"""Local attention against the unfold formulation, in one run: time, memory, and how far both are from the floor.

    python -m sparserefine_ros.benchmarks.local_attention [--json FILE]

Times are medians over rounds in which both run once. Memory is measured in a fresh process each: how far the peak of
the resident set (on CUDA, of what torch allocated) rises above what stood there with the inputs in place; a small
problem has run before, so that libraries are loaded. The floor is the arithmetic at the rate of the machine's own
matrix product plus every input read and every output written once, at the rate of its own copy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparserefine_ros.benchmarks.clock import device_name, matmul_gflops, now
from sparserefine_ros.benchmarks.unfold_attention import unfold_attention
from sparserefine_ros.networks.local_attention import QueryKeyValue, local_attention

WAYS = ("ours", "unfold")


@dataclass(frozen=True)
class Case:
    """What is measured. The defaults are one layer of the paper's network on a Cityscapes frame, 1024x2048."""

    grid: tuple[int, int] = (32, 64)  # superpixels
    cell: tuple[int, int] = (4, 4)  # pixels of one superpixel's cell
    channels: int = 256
    heads: int = 2
    device: str = "cpu"

    @property
    def multiply_adds(self) -> int:
        """Both directions, scores and sums: every pixel with 9 superpixels in all channels."""
        return 4 * 9 * self._pixels * self.channels

    @property
    def input_bytes(self) -> int:
        """Queries, keys and values in float32."""
        return 3 * (self._pixels + self.grid[0] * self.grid[1]) * self.channels * 4

    @property
    def output_bytes(self) -> int:
        return self.input_bytes // 3

    @property
    def _pixels(self) -> int:
        return self.grid[0] * self.grid[1] * self.cell[0] * self.cell[1]

    def inputs(self, way: str) -> tuple[QueryKeyValue, QueryKeyValue]:
        """Random pixels and superpixels in the layout that ``way`` takes."""
        (gy, gx), (h, w), g = self.grid, self.cell, torch.Generator().manual_seed(0)
        shapes: list[tuple[int, ...]] = [(1, self.channels, gy * h, gx * w), (1, self.channels, gy, gx)]
        if way == "ours":
            shapes = [(1, gy, gx, h * w, self.channels), (1, gy, gx, self.channels)]
        pixels, superpixels = (
            QueryKeyValue(*(torch.randn(shape, generator=g).to(self.device) for _ in range(3))) for shape in shapes
        )
        return pixels, superpixels

    def run(self, way: str, inputs: tuple[QueryKeyValue, QueryKeyValue]) -> tuple[Tensor, Tensor]:
        if way == "ours":
            return local_attention(*inputs, self.heads)
        return unfold_attention(*inputs, self.heads, self.cell)


@torch.inference_mode()
def measure(case: Case, repeats: int = 5) -> dict[str, Any]:
    """The figures as plain data.

    Keys: ``case``, ``machine``, ``ms`` and ``peak_mb`` {ours, unfold: float} (memory on top of the inputs),
    ``input_mb``, ``time_ratio`` and ``memory_ratio`` (unfold over ours), ``memory_ratio_with_inputs``,
    ``floor`` {multiply_adds, mb, gflops, gbytes_s, ms}.
    """
    device = torch.device(case.device)
    inputs = {way: case.inputs(way) for way in WAYS}
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    gflops, gbytes = [], []
    for turn in range(repeats + 1):  # the first warms up
        for way in WAYS:
            start = now(device)
            case.run(way, inputs[way])
            if turn:
                times[way].append(now(device) - start)
        gflops.append(matmul_gflops(device, torch.float32))
        gbytes.append(_copy_rate(inputs["ours"][0].query))
    ms = {way: statistics.median(values) for way, values in times.items()}
    peak = {way: _peak_in_a_fresh_process(case, way) for way in WAYS}
    rate, copy = statistics.median(gflops), statistics.median(gbytes)
    moved = case.input_bytes + case.output_bytes
    return {
        "case": asdict(case),
        "machine": {
            "device": device_name(device), "threads": torch.get_num_threads(), "torch": str(torch.__version__),
            "repeats": repeats,
        },
        "ms": ms, "time_ratio": ms["unfold"] / ms["ours"],
        "input_mb": case.input_bytes / 1e6, "peak_mb": {way: value / 1e6 for way, value in peak.items()},
        "memory_ratio": peak["unfold"] / peak["ours"],
        "memory_ratio_with_inputs": (peak["unfold"] + case.input_bytes) / (peak["ours"] + case.input_bytes),
        "floor": {
            "multiply_adds": case.multiply_adds, "mb": moved / 1e6, "gflops": rate, "gbytes_s": copy,
            "ms": 2 * case.multiply_adds / rate / 1e6 + moved / copy / 1e6,
        },
    }  # fmt: skip


def markdown(result: dict[str, Any]) -> str:
    ms, peak, floor, case = (result[key] for key in ("ms", "peak_mb", "floor", "case"))
    grid, cell, machine = case["grid"], case["cell"], result["machine"]
    return "\n".join(
        [
            f"Local attention, {grid[0]}x{grid[1]} superpixels over {cell[0]}x{cell[1]} pixels each, "
            f"{case['channels']} channels, {case['heads']} heads, float32; {machine['device']}, "
            f"{machine['threads']} thread(s)",
            "",
            "| | time, ms | memory on top of the inputs, MB |",
            "|---|---|---|",
            f"| ours | {ms['ours']:.1f} | {peak['ours']:.0f} |",
            f"| unfold | {ms['unfold']:.1f} | {peak['unfold']:.0f} |",
            f"| ratio | {result['time_ratio']:.1f} | {result['memory_ratio']:.1f} |",
            "",
            f"With the inputs ({result['input_mb']:.0f} MB) the ratio of memory is "
            f"{result['memory_ratio_with_inputs']:.1f}. Floor: {floor['multiply_adds'] / 1e9:.2f} G multiply-adds at "
            f"{floor['gflops']:.0f} GFLOP/s and {floor['mb']:.0f} MB at {floor['gbytes_s']:.1f} GB/s: "
            f"{floor['ms']:.1f} ms, {ms['ours'] / floor['ms']:.1f} times less than ours.",
        ]
    )


def _copy_rate(tensor: Tensor) -> float:
    """GB/s, read and written, into memory that is already there."""
    target = torch.empty_like(tensor)
    target.zero_()
    start = now(tensor.device)
    target.copy_(tensor)
    return 2 * tensor.numel() * tensor.element_size() / (now(tensor.device) - start) / 1e6


def _peak_in_a_fresh_process(case: Case, way: str) -> int:
    """Bytes that one call needs on top of its inputs."""
    command = [sys.executable, "-m", __spec__.name, "--memory-of", way, "--case", json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {way} failed: {done.stderr.strip()[-500:]}")
    return int(done.stdout)


@torch.inference_mode()
def _own_peak(case: Case, way: str) -> int:
    small = replace(case, grid=(2, 2))
    small.run(way, small.inputs(way))
    inputs = case.inputs(way)
    if case.device == "cpu":
        # The high-water mark is set back to what is resident now. (ru_maxrss would keep the mark of the process that
        # started this one.)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        case.run(way, inputs)
        return _status("VmHWM") - before
    torch.cuda.reset_peak_memory_stats(case.device)
    before = torch.cuda.memory_allocated(case.device)
    case.run(way, inputs)
    return torch.cuda.max_memory_allocated(case.device) - before


def _status(name: str) -> int:
    """Bytes of an entry of Linux's /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Local attention against the unfold formulation.")
    parser.add_argument("--json", type=Path, help="also save the figures here")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)  # how a fresh process is asked
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print(_own_peak(Case(**args.case), args.memory_of))
        return
    if args.repeats < 1:
        parser.error(f"--repeats is {args.repeats}; give 1 or more")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    result = measure(Case(device=args.device), args.repeats)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result))


if __name__ == "__main__":
    main()
