"""The sparse U-Net for inference: what `SparseUNet` gives in evaluation mode, with everything fused that can be.

A pre-activation block reads relu(norm(x)) and adds to x, so whoever writes x writes relu(norm(x)) beside it, with the
norm of each reader. The norm between the two convolutions of a block folds into the first, a 1x1 shortcut becomes part
of the second convolution, and both halves of a skip concatenation are written where they will be read.

Shape shorthand: N_l sites at level l, C_l channels there.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparserefine_ros.networks.unet import ResidualBlock, SiteNorm, SparseUNet, Stage
from sparserefine_ros.sparse import KernelMap, Pyramid
from sparserefine_ros.sparse.backends import Backend, Output


@dataclass(frozen=True)
class _Norm:
    """Batch normalisation in evaluation mode: scale * x + shift."""

    scale: Tensor
    shift: Tensor

    @staticmethod
    def of(norm: SiteNorm, dtype: torch.dtype) -> _Norm:
        mean, variance = norm.running_mean, norm.running_var
        assert mean is not None and variance is not None
        scale = norm.weight.double() / (variance.double() + norm.eps).sqrt()
        shift = norm.bias.double() - mean.double() * scale
        return _Norm(_copy(scale, dtype), _copy(shift, dtype))

    def part(self, start: int, stop: int) -> _Norm:
        return _Norm(self.scale[start:stop].contiguous(), self.shift[start:stop].contiguous())

    def activation(self, tensor: Tensor) -> Output:
        return Output(tensor, self.scale, self.shift, relu=True)


@dataclass(frozen=True)
class _Block:
    """A residual block: conv1 gives relu(conv + bias), conv2 adds x or its 1x1 projection."""

    norm1: _Norm
    conv1: Any
    bias: Tensor
    conv2: Any
    width: int
    projects: bool

    @staticmethod
    def of(block: ResidualBlock, backend: Backend, dtype: torch.dtype) -> _Block:
        norm2 = _Norm.of(block.norm2, torch.float64)
        projection = block.shortcut.weight.T if isinstance(block.shortcut, nn.Linear) else None  # [Cin, Cout]
        return _Block(
            _Norm.of(block.norm1, dtype),
            backend.pack(_copy(block.conv1.weight * norm2.scale, dtype)),
            _copy(norm2.shift, dtype),
            backend.pack(
                _copy(block.conv2.weight, dtype),
                None if projection is None else _copy(projection, dtype),
            ),
            block.conv2.cout,
            projection is not None,
        )


@dataclass(frozen=True)
class _Level:
    """One level of the U; the last has blocks before alone."""

    before: list[_Block]
    after: list[_Block]
    width: int
    norm_down: _Norm | None = None
    down: Any = None
    norm_up: _Norm | None = None
    up: Any = None


class FusedUNet:
    """Runs the weights of ``unet`` on ``backend``. Its weights are copies: later changes of ``unet`` do not show.

    Buffers are kept from call to call and grow to the largest frame seen, so one instance serves one thread at a time
    and a result is valid until the next call.
    """

    @torch.no_grad()
    def __init__(self, unet: SparseUNet, backend: Backend, dtype: torch.dtype = torch.float32) -> None:
        self.backend, self.dtype, self.device = backend, dtype, unet.stem.weight.device
        self.stem = backend.pack(_copy(unet.stem.weight, dtype))
        self.norm = _Norm.of(unet.norm, dtype)
        self.levels: list[_Level] = []
        stage: Stage | None = unet.stage
        while stage is not None:
            before = [self._block(b) for b in stage.before]
            level = _Level(before, [], before[0].width)
            if stage.inner is not None:
                level = replace(
                    level,
                    after=[self._block(b) for b in stage.after],
                    norm_down=_Norm.of(stage.norm_down, dtype),
                    down=backend.pack(_copy(stage.down.weight, dtype)),
                    norm_up=_Norm.of(stage.norm_up, dtype),
                    up=backend.pack(_copy(stage.up.weight, dtype)),
                )
            self.levels.append(level)
            stage = stage.inner
        self._buffers: dict[str, Tensor] = {}

    def with_own_buffers(self) -> FusedUNet:
        """The same weights, in memory shared with these; buffers that no call of this one replaces."""
        other = copy(self)
        other._buffers = {}
        return other

    def release(self) -> None:
        """Gives back the memory of its buffers, which the next call takes anew; the last result is gone."""
        self._buffers.clear()

    def _block(self, block: nn.Module) -> _Block:
        assert isinstance(block, ResidualBlock)
        return _Block.of(block, self.backend, self.dtype)

    @torch.no_grad()
    def __call__(self, x: Tensor, pyramid: Pyramid) -> Tensor:
        """[N_0, in_channels] to [N_0, C_0], both in the order of ``pyramid.levels[0]``; valid until the next call."""
        raw, act = self._pair(0, pyramid)
        first = self.levels[0].before[0]
        self.backend.conv(
            x.to(self.dtype), self.stem, pyramid.submanifold[0], [Output(raw), first.norm1.activation(act)]
        )
        features = self._buffer("features", len(pyramid.levels[0]), self.levels[0].width)
        self._level(0, raw, act, pyramid, self.norm.activation(features))
        return features

    def _level(self, index: int, raw: Tensor, act: Tensor, pyramid: Pyramid, final: Output) -> None:
        """From ``raw`` [N_l, C_l] and ``act``, what the first block reads of it, to ``final``; both are overwritten."""
        level = self.levels[index]
        neighbours = pyramid.submanifold[index]
        if level.down is None:
            self._blocks(level.before, index, raw, act, None, neighbours, [final])
            return
        assert level.norm_down is not None and level.norm_up is not None
        n, width = len(raw), level.width
        strided, reader = pyramid.strided[index], level.after[0].norm1
        cat, cat_act = (self._buffer(f"{index} {name}", n, 2 * width) for name in ("cat", "cat act"))
        skip = [Output(cat[:, :width]), reader.part(0, width).activation(cat_act[:, :width])]
        self._blocks(level.before, index, raw, act, None, neighbours, [*skip, level.norm_down.activation(act)])
        below_raw, below_act = self._pair(index + 1, pyramid)
        below = self.levels[index + 1].before[0].norm1.activation(below_act)
        self.backend.conv(act, level.down, strided, [Output(below_raw), below])
        up = self._buffer(f"{index} up", len(below_raw), below_raw.shape[1])
        self._level(index + 1, below_raw, below_act, pyramid, level.norm_up.activation(up))
        raised = [Output(cat[:, width:]), reader.part(width, 2 * width).activation(cat_act[:, width:])]
        self.backend.conv(up, level.up, strided.transposed, raised)
        self._blocks(level.after, index, raw, act, (cat, cat_act), neighbours, [final])

    def _blocks(
        self,
        blocks: list[_Block],
        index: int,
        raw: Tensor,
        act: Tensor,
        wide: tuple[Tensor, Tensor] | None,
        neighbours: KernelMap,
        final: list[Output],
    ) -> None:
        """Residual blocks in a row, working in ``raw`` and ``act``; the first reads ``wide`` instead where given."""
        for i, block in enumerate(blocks):
            x, x_act = wide if wide and i == 0 else (raw, act)
            hidden = self._buffer(f"{index} hidden", len(raw), block.width)
            self.backend.conv(x_act, block.conv1, neighbours, [Output(hidden, None, block.bias, relu=True)])
            last = i + 1 == len(blocks)
            outputs = final if last else [Output(raw), blocks[i + 1].norm1.activation(act)]
            skip = {"shortcut": x} if block.projects else {"add": x}
            self.backend.conv(hidden, block.conv2, neighbours, outputs, **skip)

    def _pair(self, index: int, pyramid: Pyramid) -> tuple[Tensor, Tensor]:
        """The buffers of a level's features, as they are and as the next layer reads them."""
        n, width = len(pyramid.levels[index]), self.levels[index].width
        return self._buffer(f"{index} raw", n, width), self._buffer(f"{index} act", n, width)

    def _buffer(self, name: str, rows: int, channels: int) -> Tensor:
        """[rows, channels], uninitialised, in memory kept under ``name``."""
        kept = self._buffers.get(name)
        if kept is None or kept.numel() < rows * channels:
            kept = torch.empty(rows * channels, dtype=self.dtype, device=self.device)
            self._buffers[name] = kept
        return kept[: rows * channels].view(rows, channels)


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
