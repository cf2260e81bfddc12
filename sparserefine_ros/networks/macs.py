"""Multiply-adds of a network on a given input, counted while it runs.

Dense convolutions and matrix products are counted by torch's own FlopCounterMode; a sparse convolution does
(pairs of sites that its kernel connects) x Cin x Cout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sparserefine_ros.networks.bilateral import BilateralRefiner
from sparserefine_ros.networks.patches import PatchRefiner
from sparserefine_ros.networks.refiner import SparseRefiner
from sparserefine_ros.networks.registry import Refiner
from sparserefine_ros.networks.repeater import RepeatRefiner
from sparserefine_ros.networks.repetition_tables import Engine
from sparserefine_ros.sparse import StridedConv2d, SubmanifoldConv2d, TransposedConv2d


def dense_macs(call: Callable[[], Any]) -> int:
    """Multiply-adds of the dense operations inside ``call``."""
    with flop_counter() as counter:
        call()
    return int(counter.get_total_flops()) // 2


def flop_counter() -> FlopCounterMode:
    """torch's counter, which does not know its own CPU form of attention, taught it."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={attention: _attention_flops})


def _attention_flops(q: Any, k: Any, v: Any, *_args: Any, **_kwargs: Any) -> int:
    """q [B, heads, Q, D], k [B, heads, N, D], v [B, heads, N, V]: two products, each multiply-add two operations."""
    return int(2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3]))


class _CountingEngine(Engine):
    """Counts what is no product of matrices, and hence nothing to torch's counter."""

    by_channel = 0

    def conv_by_channel(self, x: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor) -> Tensor:
        self.by_channel += table.numel() * x.shape[1]
        return super().conv_by_channel(x, weight, bias, table)


@contextmanager
def counting_refiner_macs(refiner: Refiner) -> Iterator[list[int]]:
    """Within the block, every layer of ``refiner`` that runs appends its multiply-adds to the yielded list.

    The U-Net's layers run one by one for it, fused or not. What follows it, classifier and ensembler, may run in a
    kernel of its own, so its linear layers are counted by the U-Net's pixels.
    """
    counts: list[int] = []
    ends = (refiner.classifier, refiner.ensembler) if isinstance(refiner, SparseRefiner) else ()
    counted_by_unet = [layer for end in ends for layer in end.modules() if isinstance(layer, nn.Linear)]

    def sparse(module: Any, inputs: tuple[Any, ...], _output: Any) -> None:
        counts.append(inputs[1].pairs * module.weight.shape[1] * module.weight.shape[2])

    def linear(module: nn.Linear, inputs: tuple[Any, ...], _output: Any) -> None:
        counts.append(len(inputs[0]) * module.in_features * module.out_features)

    def unet(_module: Any, _inputs: tuple[Any, ...], output: Tensor) -> None:
        counts.append(len(output) * sum(layer.in_features * layer.out_features for layer in counted_by_unet))

    def bilateral(module: BilateralRefiner, _inputs: tuple[Any, ...], output: Tensor) -> None:
        counts.append(len(module.taps) ** 2 * output.numel())

    def patches(module: PatchRefiner, inputs: tuple[Any, ...], _output: Any) -> None:
        counts.append(dense_macs(lambda: module.forward(*inputs)))  # again: the dense segmenter is no part of it

    def repeat(module: RepeatRefiner, inputs: tuple[Any, ...], _output: Any) -> None:
        (network, selected, colours, kept), engine = inputs[:4], _CountingEngine()
        # Again, with torch's products for the engine's.
        counted = dense_macs(lambda: module.forward(network, selected, colours, kept, engine))
        counts.append(counted + engine.by_channel)

    hooks: list[Any] = []
    if isinstance(refiner, BilateralRefiner):
        hooks.append(refiner.register_forward_hook(bilateral))
    elif isinstance(refiner, PatchRefiner):
        hooks.append(refiner.register_forward_hook(patches))
    elif isinstance(refiner, RepeatRefiner):
        hooks.append(refiner.register_forward_hook(repeat))
    elif isinstance(refiner, SparseRefiner):
        hooks.append(refiner.unet.register_forward_hook(unet))
    for module in () if isinstance(refiner, RepeatRefiner) else refiner.modules():
        if isinstance(module, SubmanifoldConv2d | StridedConv2d | TransposedConv2d):
            hooks.append(module.register_forward_hook(sparse))
        elif isinstance(module, nn.Linear) and module not in counted_by_unet:
            hooks.append(module.register_forward_hook(linear))
    fused = refiner.fused if isinstance(refiner, SparseRefiner) else None
    if fused:
        refiner.fused = None
    try:
        yield counts
    finally:
        if fused:
            refiner.fused = fused
        for hook in hooks:
            hook.remove()
