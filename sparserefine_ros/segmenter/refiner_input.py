"""What the sparse U-Net is shown of its pixels.

Shape shorthand: B images, K classes, H, W native size, h, w low resolution, N pixels.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from sparserefine_ros.native import address, load_if_possible, parallel
from sparserefine_ros.networks.selectors import nearest_index
from sparserefine_ros.segmenter.head import gather_initial
from sparserefine_ros.segmenter.preprocess import normalise_pixels
from sparserefine_ros.sparse import SiteSet

KERNEL = Path(__file__).with_name("input_kernel.c")
CHUNK = 1024  # pixels a thread takes at a time


def refiner_input(sites: SiteSet, native: Tensor, probabilities: Tensor | None = None) -> Tensor:
    """[N, 3 or 3 + K]: colours at ``sites`` of ``native`` [B, H, W, 3] uint8, normalised, and context where given.

    probabilities: [B, K, h, w] of the initial prediction.
    """
    library = load_if_possible(KERNEL) if native.device.type == "cpu" else None
    if library is not None and (probabilities is None or probabilities.dtype == torch.float32):
        return _in_c(library, sites, native, probabilities)
    pixels = normalise_pixels(native.view(-1, 3)[sites.flat])
    return pixels if probabilities is None else torch.cat([pixels, gather_initial(probabilities, sites)], 1)


class _Input(ctypes.Structure):
    """As ``struct input`` in input_kernel.c."""

    _fields_ = [
        ("sites", c_void_p), ("native", c_void_p), ("normalised", c_void_p), ("probabilities", c_void_p),
        ("rows", c_void_p), ("columns", c_void_p), ("height", c_int64), ("width", c_int64), ("low_height", c_int64),
        ("low_width", c_int64), ("classes", c_int64), ("out", c_void_p),
    ]  # fmt: skip


def _in_c(library: ctypes.CDLL, sites: SiteSet, native: Tensor, probabilities: Tensor | None) -> Tensor:
    _, height, width = sites.shape
    at, native, table = sites.sites.contiguous(), native.contiguous(), _normalised()
    rows = columns = last = None
    h = w = classes = 0
    if probabilities is not None:
        _, classes, h, w = probabilities.shape
        last = probabilities.permute(0, 2, 3, 1).contiguous()  # as they come: no copy
        rows, columns = nearest_index(h, height, native.device), nearest_index(w, width, native.device)
    out = torch.empty(len(sites), 3 + classes)
    job = _Input(
        at.data_ptr(), native.data_ptr(), table.data_ptr(), address(last), address(rows), address(columns), height,
        width, h, w, classes, out.data_ptr(),
    )  # fmt: skip
    parallel(library, "sr_input", job, len(sites), CHUNK)
    return out


@cache
@torch.inference_mode(False)  # whoever asks first
def _normalised() -> Tensor:
    """[3, 256]: what `normalise_pixels` makes of every value of a channel."""
    values = torch.arange(256, dtype=torch.uint8)
    return normalise_pixels(values[:, None].expand(-1, 3)).T.contiguous()
