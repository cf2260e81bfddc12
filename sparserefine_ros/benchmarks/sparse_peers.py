"""Others at the work of the sparse U-Net: milliseconds a frame, or None and why it is not measured."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from sparserefine_ros.benchmarks import spconv_peer
from sparserefine_ros.benchmarks.clock import timed
from sparserefine_ros.benchmarks.dense_peer import DenseUNet
from sparserefine_ros.benchmarks.sparse_case import Case
from sparserefine_ros.networks.fused_unet import FusedUNet
from sparserefine_ros.networks.unet import SparseUNet
from sparserefine_ros.sparse.backends import Backend
from sparserefine_ros.sparse.backends.torchsparse_backend import TorchsparseBackend

Peer = tuple[float | None, str]


def dense_ms(case: Case, unet: SparseUNet, mask: Tensor, x: Tensor) -> Peer:
    """One pass after one on a corner: on a CPU it takes half a minute."""
    step = 2 ** (len(case.channels) - 1)
    if any(side % step for side in case.size):
        return None, f"halves {case.size[1]}x{case.size[0]} to whole pixels only where {step} divides both"
    network = DenseUNet(unet.to(case.dtype))
    image = torch.randn(1, 3, *case.size, device=case.device, dtype=case.dtype)
    with torch.inference_mode():
        corner = max(64, step)
        network(image[..., :corner, :corner])
        repeats = 1 if case.device.type == "cpu" else 20
        times = [timed(lambda: network(image), case.device) for _ in range(repeats)]
    unet.float()
    return statistics.median(times), ""


def spconv_ms(case: Case, unet: SparseUNet, mask: Tensor, x: Tensor) -> Peer:
    if not spconv_peer.installed():
        return None, "not installed"
    if case.stride != "dilate":
        return None, "has no floor strides"
    sites = Backend().pyramid(mask, 1, case.stride).levels[0]
    if len(sites) == 0:
        return None, "takes no frame without selected pixels"
    if case.device.type != "cuda" and case.dtype != torch.float32:
        return None, "on a CPU it is compared in float32 alone"
    if case.device.type == "cuda":
        peer = spconv_peer.SpconvUNet(unet.to(case.dtype))
        with torch.inference_mode():
            times = [timed(lambda: peer(x, sites), case.device) for _ in range(30)][10:]
        unet.float()
        return statistics.median(times), ""
    with tempfile.TemporaryDirectory() as folder:
        job, answer = Path(folder) / "job", Path(folder) / "answer"
        state = {"state": unet.state_dict(), "channels": list(case.channels), "blocks": case.blocks}
        torch.save({**state, "x": x, "sites": sites.sites, "shape": list(sites.shape)}, job)
        done = subprocess.run(
            [sys.executable, "-m", spconv_peer.__name__, str(job), str(answer)],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]  # killed, it says nothing
            return None, f"failed: {said[-1]}"
        theirs = torch.load(answer, weights_only=True)["features"]
    backend = Backend()
    with torch.inference_mode():
        mine = FusedUNet(unet, backend)(x, backend.pyramid(mask, len(case.channels), case.stride))
    error, largest = float((mine - theirs).abs().max()), float(theirs.abs().max())
    if not error <= 1e-3 * largest:  # NaN compares false
        return None, f"its result differs from ours by {error:.1e}, where the largest value is {largest:.1e}"
    return float(done.stdout.split()[-1]), ""


def torchsparse_ms(case: Case, unet: SparseUNet, mask: Tensor, x: Tensor) -> Peer:
    """Its matrix products through our adapter: on our maps, which cost less than its own."""
    if why := TorchsparseBackend.missing(case.device):
        return None, why
    net = FusedUNet(unet, TorchsparseBackend(), case.dtype)

    def frame() -> Tensor:
        return net(x, net.backend.pyramid(mask, len(case.channels), case.stride))

    with torch.inference_mode():
        times = [timed(frame, case.device) for _ in range(30)][10:]
    return statistics.median(times), ""
