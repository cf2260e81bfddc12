"""The engine of a repeated network on a CPU in float32: tables and interpolations in C, convolutions on `CpuBackend`.

Shape shorthand: as in `repetition_tables`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from sparserefine_ros.native import address, load, parallel
from sparserefine_ros.networks.repetition_tables import Corners, Engine, Form, Grid, Rows, Size, axis, by_tap
from sparserefine_ros.sparse import KernelMap, SiteSet
from sparserefine_ros.sparse.backends.cpu import MAX_BLOCKS, BlockMap, CpuBackend

KERNEL = Path(__file__).with_name("repetition_cpu.c")
CHUNK = 1024  # sites a thread takes at a time
BY_CHANNEL = 64  # of a convolution by channels, whose rows a core's cache should hold
BLOCKS_OF = Form((3, 3), 1, (1, 1), 1)  # the convolution that `CpuBackend` can do by 2x2 blocks


class _LookUp(ctypes.Structure):
    """As ``struct look_up`` in repetition_cpu.c."""

    _fields_ = [
        ("number", c_void_p), ("base", c_void_p), ("offsets", c_void_p), ("taps", c_int64), ("table", c_void_p),
    ]  # fmt: skip


class _ByChannel(ctypes.Structure):
    """As ``struct by_channel`` in repetition_cpu.c."""

    _fields_ = [
        ("rows", c_void_p), ("weight", c_void_p), ("bias", c_void_p), ("table", c_void_p), ("taps", c_int64),
        ("channels", c_int64), ("count", c_int64), ("out", c_void_p),
    ]  # fmt: skip


class _Corners(ctypes.Structure):
    """As ``struct corners`` in repetition_cpu.c."""

    _fields_ = [
        ("image", c_void_p), ("row", c_void_p), ("column", c_void_p), ("top", c_void_p), ("left", c_void_p),
        ("down", c_void_p), ("right", c_void_p), ("height", c_int64), ("width", c_int64), ("number", c_void_p),
        ("rows", c_void_p), ("stride", c_int64), ("channels", c_int64), ("out", c_void_p), ("read", c_void_p),
    ]  # fmt: skip


class CpuCorners(Corners):
    """Positions and weights are worked out where they are used."""

    def __init__(self, sites: SiteSet, here: Size, there: Size, number: Tensor | None = None) -> None:
        self.sites, self.here, self.there, self.number = sites, here, there, number
        axes = [axis(size, other, sites.device) for size, other in zip(here, there, strict=True)]
        self.kept = [places.contiguous() for places in sites.sites.unbind(1)]
        self.kept += [first.int() for first, _ in axes] + [weight.float() for _, weight in axes]

    def _job(self) -> _Corners:
        height, width = self.there
        pointers = (tensor.data_ptr() for tensor in self.kept)
        return _Corners(*pointers, height=height, width=width, number=address(self.number))

    def mark(self, read: Tensor) -> None:
        job = self._job()
        job.read = read.data_ptr()
        parallel(load(KERNEL), "sr_mark", job, len(self.sites), CHUNK)

    def through(self, number: Tensor) -> Corners:
        return CpuCorners(self.sites, self.here, self.there, number)

    def blend(self, rows: Tensor) -> Tensor:
        out = torch.empty(len(self.sites), rows.shape[1])
        job, rows = self._job(), rows if rows.stride(1) == 1 else rows.contiguous()
        job.rows, job.stride, job.channels, job.out = rows.data_ptr(), rows.stride(0), rows.shape[1], out.data_ptr()
        parallel(load(KERNEL), "sr_blend", job, len(self.sites), CHUNK)
        return out


class CpuEngine(Engine):
    """For inference. Raises NativeError where the kernel cannot be compiled."""

    def __init__(self, backend: CpuBackend) -> None:
        super().__init__(backend)
        load(KERNEL)

    def look_up(self, number: Tensor, base: Tensor, offsets: Sequence[int]) -> Tensor:
        steps, table = torch.tensor(offsets), torch.empty(len(base), len(offsets), dtype=torch.int32)
        job = _LookUp(number.data_ptr(), base.data_ptr(), steps.data_ptr(), len(offsets), table.data_ptr())
        parallel(load(KERNEL), "sr_look_up", job, len(base), CHUNK)
        return table

    def conv_by_channel(self, x: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor) -> Tensor:
        out, x = torch.empty(len(table), x.shape[1]), x.contiguous()
        taps = by_tap(weight)[:, 0].contiguous()
        bias = x.new_zeros(x.shape[1]) if bias is None else bias
        job = _ByChannel(
            x.data_ptr(), taps.data_ptr(), bias.data_ptr(), table.data_ptr(), table.shape[1], x.shape[1], len(x),
            out.data_ptr(),
        )  # fmt: skip
        parallel(load(KERNEL), "sr_by_channel", job, len(table), BY_CHANNEL)
        return out

    def kernel_map(self, source: Grid, found: Rows, table: Tensor, form: Form) -> KernelMap:
        plain = super().kernel_map(source, found, table, form)
        if form != BLOCKS_OF:
            return plain
        blocks = SiteSet.from_mask(F.max_pool2d(source.active.float(), 2, ceil_mode=True) > 0)
        if len(blocks) > MAX_BLOCKS * plain.n_out:
            return plain
        offsets = [y * found.wide + x for y in range(4) for x in range(4)]
        patches = self.look_up(found.number, blocks.flat_in(found.tall, found.wide, stride=2), offsets)
        return BlockMap(plain.n_in, plain.n_out, plain.forward, (), patches)

    def corners(self, sites: SiteSet, here: Size, there: Size, dtype: torch.dtype) -> Corners:
        if dtype != torch.float32:
            return super().corners(sites, here, there, dtype)
        return CpuCorners(sites, here, there)
