"""The U-Net on every pixel in dense convolutions: what sparse refinement saves is measured against it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparserefine_ros.networks.unet import ResidualBlock, SparseUNet, Stage


class DenseUNet:
    """``unet`` on full images; strides as "floor" has them, whose levels halve evenly: 2^(levels - 1) divides sizes."""

    def __init__(self, unet: SparseUNet) -> None:
        self.unet = unet
        self.kernels = {
            id(layer): self._kernel(layer) for layer in unet.modules() if getattr(layer, "weight", None) is not None
        }

    def __call__(self, images: Tensor) -> Tensor:
        """[B, in_channels, H, W] to [B, C_0, H, W], channels last."""
        x = self._conv(self.unet.stem, images.to(memory_format=torch.channels_last))
        return _act(self.unet.norm, self._stage(self.unet.stage, x))

    def _stage(self, stage: Stage, x: Tensor) -> Tensor:
        for block in stage.before:
            x = self._block(block, x)
        if stage.inner is not None:
            down = F.conv2d(_act(stage.norm_down, x), self.kernels[id(stage.down)], stride=2, padding=1)
            y = _act(stage.norm_up, self._stage(stage.inner, down))
            kernel = self.kernels[id(stage.up)].transpose(0, 1)
            y = F.conv_transpose2d(y, kernel, stride=2, padding=1, output_padding=1)
            x = torch.cat([x, y], 1)
            for block in stage.after:
                x = self._block(block, x)
        return x

    def _block(self, block: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(block, ResidualBlock)
        y = self._conv(block.conv1, _act(block.norm1, x))
        y = self._conv(block.conv2, _act(block.norm2, y))
        if isinstance(block.shortcut, nn.Linear):
            x = F.conv2d(x, block.shortcut.weight[..., None, None])
        return x + y

    def _conv(self, layer: nn.Module, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernels[id(layer)], padding=1)

    @staticmethod
    def _kernel(layer: nn.Module) -> Tensor:
        weight: Tensor = layer.weight.detach()  # type: ignore[assignment, operator]
        if weight.dim() != 3:
            return weight
        kernel = weight.view(3, 3, *weight.shape[1:]).permute(3, 2, 1, 0)  # [Cout, Cin, kh, kw]
        return kernel.contiguous(memory_format=torch.channels_last)


def _act(norm: nn.BatchNorm1d, x: Tensor) -> Tensor:
    y = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
    return F.relu(y, inplace=True)
