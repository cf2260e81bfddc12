"""The sparse U-Net in spconv 2, to be measured beside ours where spconv is installed.

On a CPU spconv is right only with one thread (with more it has a data race), and the number of threads is a process'
own, so there it runs as a program: reads a job, prints its times, writes its features.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparserefine_ros.networks.unet import ResidualBlock, SparseUNet, Stage
from sparserefine_ros.sparse import SiteSet


def installed() -> bool:
    return find_spec("spconv") is not None


class SpconvUNet:
    """``unet`` with its sparse convolutions done by spconv. Strides must dilate as spconv's do, padding 0."""

    def __init__(self, unet: SparseUNet) -> None:
        import spconv.pytorch as spconv

        self.spconv, self.unet = spconv, unet
        self.layers: dict[int, nn.Module] = {}

    def __call__(self, x: Tensor, sites: SiteSet) -> Tensor:
        """[N, in_channels] to [N, C_0]; builds its own maps, as it has to for every frame."""
        batch, height, width = sites.shape
        indices = sites.sites.int().contiguous()  # spconv takes rows for granted, torch.nonzero gives columns
        tensor = self.spconv.SparseConvTensor(x, indices, [height, width], batch)
        tensor = self._conv(self.unet.stem, tensor, "SubMConv2d", "level 0", padding=1)
        tensor = self._stage(self.unet.stage, tensor)
        return F.relu(self.unet.norm(tensor.features))

    def _stage(self, stage: Stage, tensor: Any) -> Any:
        for block in stage.before:
            tensor = self._block(block, tensor, stage.level)
        if stage.inner is not None:
            key = f"stride {stage.level}"
            down = tensor.replace_feature(F.relu(stage.norm_down(tensor.features)))
            below = self._stage(stage.inner, self._conv(stage.down, down, "SparseConv2d", key, stride=2))
            below = below.replace_feature(F.relu(stage.norm_up(below.features)))
            up = self._conv(stage.up, below, "SparseInverseConv2d", key)
            tensor = tensor.replace_feature(torch.cat([tensor.features, up.features], 1))
            for block in stage.after:
                tensor = self._block(block, tensor, stage.level)
        return tensor

    def _block(self, block: nn.Module, tensor: Any, level: int) -> Any:
        assert isinstance(block, ResidualBlock)
        key = f"level {level}"
        y = tensor.replace_feature(F.relu(block.norm1(tensor.features)))
        y = self._conv(block.conv1, y, "SubMConv2d", key, padding=1)
        y = self._conv(block.conv2, y.replace_feature(F.relu(block.norm2(y.features))), "SubMConv2d", key, padding=1)
        return y.replace_feature(y.features + block.shortcut(tensor.features))

    def _conv(self, layer: Any, tensor: Any, kind: str, key: str, **options: int) -> Any:
        if id(layer) not in self.layers:
            conv = getattr(self.spconv, kind)(layer.cin, layer.cout, 3, bias=False, indice_key=key, **options)
            weight = layer.weight.detach().view(3, 3, layer.cin, layer.cout)  # [kw, kh, Cin, Cout]
            conv.weight = nn.Parameter(weight.permute(3, 1, 0, 2).contiguous())  # [Cout, kh, kw, Cin]
            self.layers[id(layer)] = conv.to(layer.weight.device)
        return self.layers[id(layer)](tensor)


def main() -> int:
    """A job is {channels, blocks, state, x, sites, shape}; the answer {features}, and milliseconds on stdout."""
    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=Path)
    parser.add_argument("answer", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    job = torch.load(args.job, weights_only=True)
    unet = SparseUNet(job["x"].shape[1], job["channels"], job["blocks"]).eval()
    unet.load_state_dict(job["state"])
    peer, sites = SpconvUNet(unet), SiteSet(job["sites"], tuple(job["shape"]))
    times = []
    with torch.inference_mode():
        for _ in range(args.repeats + 1):
            start = time.perf_counter()
            features = peer(job["x"], sites)
            times.append((time.perf_counter() - start) * 1e3)
    torch.save({"features": features}, args.answer)
    print(statistics.median(times[1:]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
