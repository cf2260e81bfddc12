"""The five segmenters that SparseRefine was published with, each with its refiner, and what they cost on paper.

Nothing here computes: parameters and multiply-adds are counted on torch's meta device, whose tensors have shapes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparserefine_ros.benchmarks.masks import edge_mask
from sparserefine_ros.benchmarks.sparse import conv_macs
from sparserefine_ros.networks.fused_unet import FusedUNet
from sparserefine_ros.networks.macs import dense_macs
from sparserefine_ros.networks.refiner import SparseRefiner
from sparserefine_ros.networks.registry import DENSE, build
from sparserefine_ros.segmenter.preprocess import low_resolution_size
from sparserefine_ros.sparse import KernelMap
from sparserefine_ros.sparse.backends import Backend, Output

CLASSES = 19  # as in Cityscapes
SIX_STAGES = (32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class PaperModel:
    """A dense segmenter, and how the paper refines it."""

    network: str  # a name of networks.registry.DENSE
    args: Mapping[str, Any]
    density: float  # Table A1
    scale: float = 0.5  # low resolution over native resolution (Table A2)
    channels: Sequence[int] = field(default=SIX_STAGES)  # of the refiner; its parameters in Table 1 tell how many

    def dense(self) -> nn.Module:
        """Raises ValueError where a package is missing."""
        module: nn.Module = build(DENSE, self.network, CLASSES, self.args)
        return module.eval()

    def refiner(self, stride: str = "dilate") -> SparseRefiner:
        return SparseRefiner(CLASSES, **self.refiner_args(stride)).eval()

    def refiner_args(self, stride: str = "dilate") -> dict[str, Any]:
        return {"channels": self.channels, "stride": stride}

    def low_size(self, size: tuple[int, int]) -> tuple[int, int]:
        return low_resolution_size(size, self.scale)

    def selected(self, size: tuple[int, int], batch: int = 1) -> Tensor:
        """bool [batch, H, W]: a selection of the model's density."""
        return torch.cat([edge_mask(*size, self.density, seed) for seed in range(batch)])


MODELS = {
    "hrnet-w48": PaperModel("hrnet", {"width": 48}, 0.118),
    "segformer-b5": PaperModel("segformer", {"size": "b5", "offsets": False}, 0.139),
    "mask2former-t": PaperModel("mask2former", {"size": "t"}, 0.241, channels=SIX_STAGES[:5]),
    "mask2former-l": PaperModel("mask2former", {"size": "l"}, 0.350),
    "segnext-l": PaperModel("segnext", {"size": "L", "offsets": False}, 0.100, scale=0.625),
}


def params_m(model: PaperModel) -> dict[str, float]:
    """Millions of parameters: "dense", "refiner"."""
    parts = {"dense": _on_meta(model.dense), "refiner": _on_meta(model.refiner)}
    return {name: sum(p.numel() for p in module.parameters()) / 1e6 for name, module in parts.items()}


def gmacs(model: PaperModel, size: tuple[int, int], stride: str = "dilate") -> dict[str, float]:
    """Billions of multiply-adds for one frame of ``size``: "hr", "lr", "refiner" (its own, without "lr")."""
    network = _on_meta(model.dense)
    counts = {}
    for name, seen in (("hr", size), ("lr", model.low_size(size))):
        image = torch.empty(1, 3, *seen, device="meta")
        with torch.inference_mode():
            counts[name] = dense_macs(partial(network, image)) / 1e9
    return {**counts, "refiner": refiner_macs(partial(model.refiner, stride), model.selected(size)) / 1e9}


def refiner_macs(make: Callable[[], SparseRefiner], selected: Tensor) -> int:
    """Multiply-adds that a refiner spends on a selection, bool [B, H, W]."""
    refiner = _on_meta(make)
    counter = CountingBackend()
    pyramid = counter.pyramid(selected, refiner.levels, refiner.stride)
    sites = len(pyramid.levels[0])
    FusedUNet(refiner.unet, counter)(torch.empty(sites, refiner.unet.stem.weight.shape[1], device="meta"), pyramid)
    ends = [m for part in (refiner.classifier, refiner.ensembler) for m in part.modules() if isinstance(m, nn.Linear)]
    return counter.macs + sites * sum(m.in_features * m.out_features for m in ends)


class CountingBackend(Backend):
    """Neighbour maps as ever; convolutions are counted and not done."""

    def __init__(self) -> None:
        self.macs = 0

    def pack(self, weight: Tensor, shortcut: Tensor | None = None) -> Tensor:
        return weight

    def conv(
        self,
        x: Tensor,
        packed: Any,
        kernel_map: KernelMap,
        outputs: Sequence[Output],
        add: Tensor | None = None,
        shortcut: Tensor | None = None,
    ) -> None:
        self.macs += conv_macs(kernel_map.pairs, x, outputs, shortcut)


def _on_meta(make: Callable[[], Any]) -> Any:
    with torch.device("meta"):
        # transformers makes a few of its tensors elsewhere; torch's counter stumbles over weights handed to a module.
        return make().to("meta").requires_grad_(False)
