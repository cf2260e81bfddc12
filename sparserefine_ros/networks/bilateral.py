"""A refiner that needs no training: joint bilateral upsampling (Kopf et al., SIGGRAPH 2007) at the selected pixels.

A selected pixel takes the mean of what the dense segmenter says around it, where neighbours count by their distance and
by how much their colour at low resolution is the pixel's own at native resolution:

    p'(i) = sum over j of w_ij p(j) / sum of w_ij,   w_ij = exp(-|x_i - x_j|^2 / 2 a^2 - |c_i - c_j|^2 / 2 b^2)

Shape shorthand: B images, K classes, H, W native size, h, w low resolution, N selected pixels, T taps of the window.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparserefine_ros.native import load_if_possible, parallel
from sparserefine_ros.networks.ensemblers import DirectEnsembler
from sparserefine_ros.networks.limits import check_whole
from sparserefine_ros.networks.selectors import nearest_index
from sparserefine_ros.sparse import SiteSet

CHUNK = 8192  # pixels a CPU core holds in its cache
GPU_CHUNK = 1 << 18  # pixels that keep a GPU busy, and take a few hundred MB with 25 taps
MIN_WIDTH = 1e-6  # of a Gaussian: those of a narrower one are all 0 in float32, and their mean is no number
MAX_RADIUS = 16  # 1089 taps; every pixel reads as many colours and probabilities
KERNEL = Path(__file__).with_name("bilateral_cpu.c")
TOGETHER = 256  # pixels a thread takes at a time in C


class BilateralRefiner(nn.Module):
    """Initial probabilities, half of them moved to where the colours say.

    Args:
        num_classes: K, whatever it is.
        radius: taps to every side.
        step: low-resolution pixels between taps.
        distance: a, in low-resolution pixels.
        colour: b, for RGB from 0 to 1.
        initial: share of the initial probabilities in the result.

    Raises ValueError for numbers that no mean can be taken with.
    """

    context = True  # reads the initial softmax

    def __init__(
        self,
        num_classes: int,
        radius: int = 2,
        step: int = 2,
        distance: float = 3.0,
        colour: float = 0.05,
        initial: float = 0.5,
    ) -> None:
        super().__init__()
        check_whole(0, MAX_RADIUS, radius=radius)
        check_whole(step=step)
        if not (distance >= MIN_WIDTH and colour >= MIN_WIDTH and 0 <= initial <= 1):
            raise ValueError(
                f"distance {distance}, colour {colour}, initial {initial}; give two numbers from {MIN_WIDTH} and a "
                "share from 0 to 1"
            )
        self.distance, self.colour, self.initial = distance, colour, initial
        self.register_buffer("taps", step * torch.arange(-radius, radius + 1), persistent=False)  # along an axis
        self.taps: Tensor
        self.classifier = nn.Identity()
        self.ensembler = DirectEnsembler()

    def forward(self, sites: SiteSet, native: Tensor, low: Tensor, probabilities: Tensor) -> Tensor:
        """Logarithms of the final probabilities at ``sites``, [N, K].

        native: [B, H, W, 3] uint8 RGB; low: [B, h, w, 3], the same at low resolution; probabilities: [B, K, h, w].
        """
        fits = probabilities.dtype == torch.float32 and low.shape[1:3] == probabilities.shape[2:]
        kernel = load_if_possible(KERNEL) if fits and native.device.type == "cpu" else None
        if kernel is not None:
            return self._in_c(kernel, sites, native.contiguous(), low.contiguous(), probabilities)
        rows = probabilities.permute(0, 2, 3, 1).reshape(-1, probabilities.shape[1])  # [B h w, K]
        colours = low.view(-1, 3).float() / 255  # [B h w, 3]
        down, right = self._axes(native.shape[1:3], low.shape[1:3], native.device)
        chunk = CHUNK if native.device.type == "cpu" else GPU_CHUNK
        parts = []
        for part, flat in zip(sites.sites.split(chunk), sites.flat.split(chunk), strict=True):
            image, row, column = part.unbind(1)
            base = image * low.shape[1]
            index = (base[:, None] + down.taps[row])[:, :, None] * low.shape[2] + right.taps[column][:, None]
            centre = (base + down.own[row]) * low.shape[2] + right.own[column]  # [n]
            distance = (down.squared[row][:, :, None] + right.squared[column][:, None]).flatten(1)  # [n, T]
            own = native.view(-1, 3)[flat].float() / 255  # [n, 3]
            difference = (colours[index.flatten(1)] - own[:, None]).square().sum(-1)  # [n, T]
            weight = (-distance - difference / (2 * self.colour**2)).softmax(1)
            mean = F.embedding_bag(index.flatten(1), rows, mode="sum", per_sample_weights=weight)  # [n, K]
            parts.append(torch.lerp(mean, rows[centre], self.initial))
        return torch.cat(parts).clamp_min(1e-10).log()

    def _in_c(self, kernel: ctypes.CDLL, sites: SiteSet, native: Tensor, low: Tensor, probabilities: Tensor) -> Tensor:
        (_, height, width), (_, classes, h, w) = sites.shape, probabilities.shape
        down, right = self._axes((height, width), (h, w), native.device)
        at, rows = sites.sites.contiguous(), probabilities.permute(0, 2, 3, 1).contiguous()
        out = torch.empty(len(sites), classes)
        tensors = (
            at, native, low, rows, down.taps, right.taps, down.squared, right.squared, down.own, right.own
        )  # fmt: skip
        job = _Bilateral(
            *(tensor.data_ptr() for tensor in tensors), height, width, h, w, len(self.taps), classes,
            1 / (2 * (255 * self.colour) ** 2), self.initial, out.data_ptr(),
        )  # fmt: skip
        parallel(kernel, "sr_bilateral", job, len(sites), TOGETHER)
        return out

    def _axes(self, size: tuple[int, ...], low_size: tuple[int, ...], device: torch.device) -> list[_Axis]:
        """Of rows and of columns. Taps outside the image are those of its edge."""
        axes = []
        for length, high in zip(low_size, size, strict=True):
            exact = (torch.arange(high, device=device) + 0.5) * (length / high) - 0.5  # pixel centres, in low pixels
            own = nearest_index(length, high, device)
            taps = own[:, None] + self.taps
            squared = (taps - exact[:, None]).square() / (2 * self.distance**2)
            axes.append(_Axis(own, taps.clamp(0, length - 1), squared))
        return axes


class _Axis(NamedTuple):
    """For each of H rows of native, or of its W columns."""

    own: Tensor  # [H] int64: of low, under the pixel
    taps: Tensor  # [H, 2 radius + 1] int64: of low, under the taps
    squared: Tensor  # [H, 2 radius + 1]: distances to the taps, squared, over twice the Gaussian's variance


class _Bilateral(ctypes.Structure):
    """As ``struct bilateral`` in bilateral_cpu.c."""

    _fields_ = [
        ("sites", c_void_p), ("native", c_void_p), ("low", c_void_p), ("probabilities", c_void_p), ("rows", c_void_p),
        ("columns", c_void_p), ("down", c_void_p), ("right", c_void_p), ("own_row", c_void_p), ("own_column", c_void_p),
        ("height", c_int64), ("width", c_int64), ("low_height", c_int64), ("low_width", c_int64), ("side", c_int64),
        ("classes", c_int64), ("colour", c_float), ("initial", c_float), ("out", c_void_p),
    ]  # fmt: skip
