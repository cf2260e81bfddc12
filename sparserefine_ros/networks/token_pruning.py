"""Token pruning of a Swin transformer in the manner of SparseViT: unimportant windows skip the blocks of a stage.

Chen et al., 2023, "SparseViT: Revisiting Activation Sparsity for Efficient High-Resolution Vision Transformer" (arXiv
2303.17605); what SparseRefine is compared with in its Table 3a. A window's importance is the L2 norm of what enters the
stage, so that all blocks of a stage agree (their "shared scoring"); a pruned window keeps its tokens as they are, and
every pixel still has a feature. The blocks are the package transformers' own: their norms, attention and perceptrons
run, on fewer windows.

Shape shorthand: B images, C channels, h, w a stage's size in tokens, s a window's side, L = s s its tokens, n windows
of an image once it is padded to whole ones, k those that are kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def prune_windows(backbone: Any, keep: Sequence[float]) -> None:
    """From here on ``backbone``, transformers' SwinBackbone, computes only a share of the windows of each stage.

    keep: shares of the windows that are kept, one a stage, above 0 and at most 1; 1 leaves a stage as it is.
    Weights and their names stay. Raises ValueError for other shares or another number of them.
    """
    stages = backbone.swin.encoder.layers
    if len(keep) != len(stages) or not all(0 < share <= 1 for share in keep):
        raise ValueError(f"keep is {list(keep)}; give {len(stages)} shares above 0 and at most 1, one a stage")
    for stage, share in zip(stages, keep, strict=True):
        if share == 1:
            continue
        pruning = StagePruning(share)
        stage.register_forward_pre_hook(pruning.score)
        for block in stage.blocks:
            block.forward = partial(pruned_block, block, pruning)


class StagePruning:
    """Which windows a stage keeps: decided where a frame enters it, for both partitions its blocks take turns with."""

    def __init__(self, keep: float) -> None:
        self.keep = keep
        self.energy = torch.empty(0)  # [B, h, w, 1]: squared L2 norm of every token
        self.kept: dict[int, Tensor] = {}  # by the partition's shift

    def score(self, _stage: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Before the stage runs on ``inputs``: tokens [B, h w, C], (h, w)."""
        tokens, (height, width) = inputs
        self.energy = tokens.detach().float().square().sum(-1).view(len(tokens), height, width, 1)
        self.kept.clear()

    def choose(self, block: Any) -> Tensor:
        """[B, k] int64: the windows of largest L2 norm in the partition of ``block``."""
        if block.shift_size not in self.kept:
            norms = partition(block, self.energy).sum((2, 3))  # [B, n]
            count = math.ceil(self.keep * norms.shape[1])
            self.kept[block.shift_size] = norms.topk(count, 1, sorted=False).indices
        return self.kept[block.shift_size]


def pruned_block(
    block: Any,
    pruning: StagePruning,
    hidden_states: Tensor,
    input_dimensions: tuple[int, int],
    always_partition: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """SwinLayer's forward pass, on the windows that ``pruning`` keeps. hidden_states: [B, h w, C].

    In training, drop path acts on windows, not on images.
    """
    if not always_partition:
        block.set_shift_and_window_size(input_dimensions)
    height, width = input_dimensions
    batch, _, channels = hidden_states.shape
    windows = partition(block, hidden_states.view(batch, height, width, channels))  # [B, n, L, C]
    kept = pruning.choose(block)  # [B, k]
    images = torch.arange(batch, device=kept.device)[:, None]
    x = windows[images, kept].flatten(0, 1)  # [B k, L, C]
    normed = block.layernorm_before(x)
    tall, wide = (-(-size // block.window_size) * block.window_size for size in input_dimensions)
    if (tall, wide) != (height, width):  # what pads the image is zero behind the norm
        inside = partition(block, normed.new_ones(1, height, width, 1))[0]  # [n, L, 1]
        normed = normed * inside[kept.flatten()]
    mask = block.get_attn_mask(tall, wide, dtype=normed.dtype, device=normed.device)  # [n, L, L] where windows shift
    attended, _ = block.attention(normed, None if mask is None else mask[kept.flatten()], **kwargs)
    x = x + block.drop_path(block.dropout(attended))
    x = x + block.dropout(block.mlp(block.layernorm_after(x)))
    windows = windows.index_put((images, kept), x.unflatten(0, kept.shape).to(windows.dtype))
    return merge(block, windows, input_dimensions).flatten(1, 2), None


def partition(block: Any, x: Tensor) -> Tensor:
    """The windows [B, n, L, C] of ``x`` [B, h, w, C], padded with zeros and shifted as ``block`` does."""
    side, (height, width) = block.window_size, x.shape[1:3]
    x = block.cyclic_shift(block.maybe_pad(x, height, width)[0])
    x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # [B, rows, s, columns, s, C]
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def merge(block: Any, windows: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, h, w, C]: `partition` undone, for ``size`` (h, w)."""
    side, (height, width) = block.window_size, size
    rows, columns = -(-height // side), -(-width // side)
    x = windows.unflatten(2, (side, side)).unflatten(1, (rows, columns))  # [B, rows, columns, s, s, C]
    x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # [B, padded h, padded w, C]
    return block.cyclic_shift(x, reverse=True)[:, :height, :width]
