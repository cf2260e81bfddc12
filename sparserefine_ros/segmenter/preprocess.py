"""From camera pixels to network input, and results back to the host.

Shape shorthand: B images, H, W native size, h, w low-resolution size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

# The usual ImageNet statistics of RGB in [0, 1]; any fixed pair would do for networks trained from scratch.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def low_resolution_size(size: tuple[int, ...], scale: float) -> tuple[int, int]:
    """(h, w) of an image of ``size`` (H, W) at ``scale``; at least one pixel."""
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """``image`` [H, W, 3] uint8 at ``size`` (h, w), averaging over the area so that nothing aliases."""
    if image.shape[:2] == size:
        return image
    shrinks = size[0] <= image.shape[0]
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def shrink(images: Tensor, size: tuple[int, int]) -> Tensor:
    """``images`` [B, H, W, 3] uint8 at ``size`` (h, w), on the device they are on.

    As `resize`: the very same at 1 : 2, where halves are rounded up as OpenCV does; elsewhere halves go to even, and a
    few values differ by one, as OpenCV adds up with rounded weights.
    """
    (batch, height, width, _), (h, w) = images.shape, size
    if (height, width) == size:
        return images
    if (height, width) == (2 * h, 2 * w):
        total = images.view(batch, h, 2, w, 2, 3).sum((2, 4), dtype=torch.int32)
        return ((total + 2) >> 2).to(torch.uint8)
    if h > height:  # a camera smaller than the one size that an ONNX file takes
        exact = F.interpolate(images.permute(0, 3, 1, 2).float(), size, mode="bilinear", align_corners=False)
        return exact.permute(0, 2, 3, 1).round().to(torch.uint8).contiguous()
    rows = averaged(images.float().transpose(0, 1), h, math.ceil(height / h) + 1)  # [h, B, W, 3]
    both = averaged(rows.transpose(0, 2), w, math.ceil(width / w) + 1)  # [w, B, h, 3]
    return both.permute(1, 2, 0, 3).round().to(torch.uint8).contiguous()


def averaged(x: Tensor, size: Any, taps: int) -> Tensor:
    """[H, ...] float to [size, ...]: every new row the mean of the old ones it covers, in shares of the area.

    In units of 1 / size of an old row, old row j spans [j size, (j + 1) size) and new row i [i H, (i + 1) H): shares
    are whole numbers, exact for every size. No new row touches more than ``taps`` old ones.
    """
    height = x.shape[0]
    index = torch.arange(size, device=x.device)
    first = index * height // size
    total = None
    for tap in range(taps):
        row = first + tap
        share = torch.minimum((row + 1) * size, (index + 1) * height) - torch.maximum(row * size, index * height)
        share = torch.where(1000 * share > size, share, 0)  # OpenCV leaves out what is less than 1/1000 of a row
        part = x.index_select(0, row.clamp(max=height - 1)) * share.float().view(-1, *(1,) * (x.dim() - 1))
        total = part if total is None else total + part
    assert total is not None
    return total / height


def upload(images: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """``images`` of one size as one tensor on ``device``, to a GPU from pinned memory: the host does not wait."""
    shape = (len(images), *images[0].shape)
    host = torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
    np.stack(images, out=host.numpy())
    return host.to(device, non_blocking=True)


def to_host(*tensors: Tensor) -> list[np.ndarray]:
    """Arrays of ``tensors``; the host waits once, for all of them."""
    waiting = [t for t in tensors if t.is_cuda]
    if not waiting:
        return [t.numpy() for t in tensors]
    pinned = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) if t.is_cuda else t for t in tensors]
    for host, tensor in zip(pinned, tensors, strict=True):
        if tensor.is_cuda:
            host.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(waiting[0].device).synchronize()
    return [t.numpy() for t in pinned]


def normalise(images: Tensor) -> Tensor:
    """uint8 RGB [B, H, W, 3] to float [B, 3, H, W] with zero mean and unit variance.

    The result is a view in channels-last order, which is what convolutions on CPU and tensor cores like best.
    """
    return normalise_pixels(images).permute(0, 3, 1, 2)


def normalise_pixels(pixels: Tensor) -> Tensor:
    """uint8 RGB [..., 3] to float [..., 3] with zero mean and unit variance."""
    mean, std = _statistics(pixels.device)
    return (pixels.float() - mean) / std


@cache
@torch.inference_mode(False)  # whoever asks first
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """255 times mean and deviation, sent once: a host waits for what it sends, and a CUDA graph cannot contain it."""
    return torch.tensor(MEAN, device=device) * 255, torch.tensor(STD, device=device) * 255
