"""Sparse convolution for inference on a CPU, in C: tables in single passes, convolution without a gathered buffer.

Shape shorthand: as in `base`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int64, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparserefine_ros.native import PARALLEL, NativeError, address, load, parallel
from sparserefine_ros.sparse.backends.base import Backend, Output, check_weights
from sparserefine_ros.sparse.maps import STRIDE_PADDING, TAPS, KernelMap, TapGroup
from sparserefine_ros.sparse.pyramid import Pyramid, check_pyramid
from sparserefine_ros.sparse.sites import SiteSet, check_mask

CONV, MAPS = (Path(__file__).with_name(name) for name in ("cpu_conv.c", "cpu_maps.c"))
ALL_TAPS = tuple(range(TAPS))
MAX_OUTPUTS = 4
CHUNK = 240  # output rows whose inputs stay in second-level cache while one panel of weights after another passes
CACHE = 16e6  # bytes: an output larger than this is not in cache any more when the next layer reads it
# Blocks pay where a level has fewer of them than this many a site (a quarter where all are full), and a layer so many
# input channels (of fewer, transforms cost more than they save).
MAX_BLOCKS = 0.4
MIN_CHANNELS = 16
G = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
"""What Winograd's F(2, 3) makes of a kernel's three taps."""


class _Output(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("stride", c_int64), ("scale", c_void_p), ("shift", c_void_p), ("relu", c_int64)]


class _Layer(ctypes.Structure):
    """As ``struct layer`` in cpu_conv.c."""

    _fields_ = [
        ("x", c_void_p), ("x_stride", c_int64), ("n_in", c_int64), ("n_out", c_int64),
        ("table", c_void_p), ("rows", c_void_p), ("taps_count", c_int64), ("taps", c_int64 * TAPS),
        ("cin", c_int64), ("cout", c_int64), ("c2", c_int64),
        ("weight", c_void_p), ("x2", c_void_p), ("x2_stride", c_int64), ("weight2", c_void_p),
        ("add", c_void_p), ("add_stride", c_int64), ("zeros", c_void_p),
        ("room", c_void_p), ("room_size", c_int64), ("room_parts", c_int64),
        ("room_taken", c_uint64), ("large", c_int64),
        ("outputs_count", c_int64), ("outputs", _Output * MAX_OUTPUTS),
    ]  # fmt: skip


@dataclass(frozen=True)
class _Packed:
    """Weights in panels of as many output channels as a tile has; the last one is filled up with zeros."""

    weight: Tensor  # [panels, 9, Cin, panel]
    shortcut: Tensor | None  # [panels, C2, panel]
    cin: int
    cout: int
    c2: int

    @cached_property
    def planes(self) -> Tensor:
        """The kernels in Winograd's form, G g G^T: [panels, 16, Cin, panel]. Made when a frame first wants them."""
        kernel = self.weight.double().unflatten(1, (3, 3))  # [panels, kw, kh, Cin, panel]
        return torch.einsum("ah,bw,pwhio->pabio", G, G, kernel).flatten(1, 2).float().contiguous()


@dataclass(frozen=True, eq=False)
class BlockMap(KernelMap):
    """A submanifold map that also knows its sites by 2x2 blocks.

    patches: [blocks, 16] int32 input rows of the 4x4 patch around each block that holds a site, Ni where there is none.
        Rows from No on are read and not written: the first No of the input's are the output's.
    """

    patches: Tensor


class CpuBackend(Backend):
    """float32 on the CPU; needs a C compiler the first time."""

    name = "cpu"
    dtypes = (torch.float32,)

    def __init__(self) -> None:
        self._conv, self._maps = load(CONV), load(MAPS)
        for function in (self._conv.sr_panel, self._conv.sr_patches, self._conv.sr_room):
            function.restype = c_int64
        for function in (self._maps.sr_count, self._maps.sr_count_blocks):
            function.restype = c_int64
        self._chunk = self._conv.sr_patches()
        self._zeros, self._room = torch.zeros(0), torch.empty(0)

    @classmethod
    def missing(cls, device: torch.device) -> str | None:
        if device.type != "cpu":
            return "it is for the CPU"
        try:
            load(CONV), load(MAPS), load(PARALLEL)
        except NativeError as error:
            return str(error)
        return None

    def pack(self, weight: Tensor, shortcut: Tensor | None = None) -> _Packed:
        check_weights(weight, shortcut)
        _, cin, cout = weight.shape
        panels = self._panels(weight)
        c2 = 0 if shortcut is None else len(shortcut)
        return _Packed(panels, None if shortcut is None else self._panels(shortcut), cin, cout, c2)

    def _panels(self, weight: Tensor) -> Tensor:
        """[..., Cout] to [panels, ..., panel]."""
        panel = int(self._conv.sr_panel(c_int64(weight.shape[-1])))
        padded = F.pad(weight.float(), (0, -weight.shape[-1] % panel))
        return padded.unflatten(-1, (-1, panel)).movedim(-2, 0).contiguous()

    def conv(
        self,
        x: Tensor,
        packed: Any,
        kernel_map: KernelMap,
        outputs: Sequence[Output],
        add: Tensor | None = None,
        shortcut: Tensor | None = None,
    ) -> None:
        _check("features", x, kernel_map.n_in, packed.cin)
        if (shortcut is None) != (packed.shortcut is None):
            raise ValueError("a shortcut is given exactly when its weight was packed")
        for name, tensor, channels in (("shortcut", shortcut, packed.c2), ("add", add, packed.cout)):
            if tensor is not None:
                _check(name, tensor, kernel_map.n_out, channels)
        if len(outputs) > MAX_OUTPUTS:
            raise ValueError(f"{len(outputs)} outputs: at most {MAX_OUTPUTS}")
        if len(self._zeros) < packed.cin:
            self._zeros = torch.zeros(packed.cin)
        layer = _Layer(
            x=x.data_ptr(), x_stride=x.stride(0), n_in=kernel_map.n_in, n_out=kernel_map.n_out,
            cin=packed.cin, cout=packed.cout, c2=packed.c2, weight=packed.weight.data_ptr(),
            weight2=address(packed.shortcut), x2=address(shortcut), x2_stride=_stride(shortcut),
            add=address(add), add_stride=_stride(add), zeros=self._zeros.data_ptr(), outputs_count=len(outputs),
            large=kernel_map.n_out * packed.cout * x.element_size() > CACHE,
        )  # fmt: skip
        for slot, out in zip(layer.outputs, outputs, strict=False):
            _check("output", out.tensor, kernel_map.n_out, packed.cout)
            slot.data, slot.stride, slot.relu = out.tensor.data_ptr(), out.tensor.stride(0), out.relu
            for vector in (out.scale, out.shift):
                if vector is not None:
                    _check("scale or shift as a row", vector[None], 1, packed.cout)
            slot.scale, slot.shift = address(out.scale), address(out.shift)
        if isinstance(kernel_map, BlockMap) and packed.cin >= MIN_CHANNELS:
            self._blocks(layer, packed, kernel_map.patches)
            return
        for group in kernel_map.forward:
            layer.table, layer.rows = group.table.data_ptr(), address(group.rows)
            layer.taps_count = len(group.taps)
            layer.taps[: len(group.taps)] = group.taps
            parallel(self._conv, "sr_conv", layer, len(group.table), CHUNK)

    def _blocks(self, layer: _Layer, packed: _Packed, patches: Tensor) -> None:
        """The layer by 2x2 blocks; room for its intermediate values is kept from call to call."""
        layer.room_parts, layer.room_size = min(torch.get_num_threads(), 64), self._conv.sr_room(c_int64(packed.cin))
        if len(self._room) < layer.room_parts * layer.room_size:
            self._room = torch.empty(layer.room_parts * layer.room_size)
        layer.room, layer.weight, layer.table = self._room.data_ptr(), packed.planes.data_ptr(), patches.data_ptr()
        parallel(self._conv, "sr_blocks", layer, len(patches), self._chunk)

    def pyramid(self, mask: Tensor, levels: int, stride: str) -> Pyramid:
        check_mask(mask)
        check_pyramid(levels, stride)
        if mask.device.type != "cpu":
            raise ValueError(f"mask is on {mask.device}: the cpu backend takes it on the CPU")
        padding = STRIDE_PADDING[stride]
        sites = [self._sites(mask.contiguous())]
        strided = []
        for _ in range(levels - 1):
            fine = sites[-1]
            batch, height, width = fine.shape
            size = (batch, *(max(0, (side - 1 + 2 * padding) // 2) for side in (height, width)))
            coarse = torch.empty(size, dtype=torch.bool)
            self._call("sr_coarse", fine.sites, len(fine), padding, *size, coarse)
            sites.append(self._sites(coarse))
            strided.append(self._strided(fine, sites[-1], padding))
        return Pyramid(stride, tuple(sites), tuple(map(self._submanifold, sites)), tuple(strided))

    def _sites(self, mask: Tensor) -> SiteSet:
        batch, height, width = mask.shape
        n = int(self._maps.sr_count(c_void_p(mask.data_ptr()), c_int64(mask.numel())))
        sites, flat = torch.empty(n, 3, dtype=torch.int64), torch.empty(n, dtype=torch.int64)
        grid = torch.empty(batch, height + 2, width + 2, dtype=torch.int32)
        self._call("sr_sites", mask, batch, height, width, n, sites, flat, grid)
        return SiteSet.of(sites, (batch, height, width), flat, grid)

    def _submanifold(self, sites: SiteSet) -> KernelMap:
        table = torch.empty(len(sites), TAPS, dtype=torch.int32)
        self._call("sr_neighbours", sites.bordered_grid, *sites.shape[1:], sites.sites, len(sites), table)
        group, mirrored = (TapGroup(None, taps, table) for taps in (ALL_TAPS, ALL_TAPS[::-1]))
        n, where = len(sites), (sites.bordered_grid, *sites.shape[1:], sites.sites, len(sites))
        blocks = int(self._maps.sr_count_blocks(*_arguments(where)))
        if blocks > MAX_BLOCKS * n:
            return KernelMap(n, n, (group,), (mirrored,))
        patches = torch.empty(blocks, 16, dtype=torch.int32)
        self._call("sr_patches", *where, patches)
        return BlockMap(n, n, (group,), (mirrored,), patches)

    def _strided(self, fine: SiteSet, coarse: SiteSet, padding: int) -> KernelMap:
        down = torch.empty(len(coarse), TAPS, dtype=torch.int32)
        self._call("sr_windows", fine.bordered_grid, *fine.shape[1:], coarse.sites, len(coarse), padding, down)
        counts = torch.empty(4, dtype=torch.int64)
        self._call("sr_parities", fine.sites, len(fine), padding, counts)
        groups = []
        for parity, count in enumerate(counts.tolist()):
            row_taps, column_taps = ((1,) if odd else (0, 2) for odd in (parity // 2, parity % 2))
            taps = tuple(kh + 3 * kw for kw in column_taps for kh in row_taps)
            table = torch.empty(count, len(taps), dtype=torch.int32)
            groups.append(TapGroup(torch.empty(count, dtype=torch.int64), taps, table))
        rows = (c_void_p * 4)(*(address(group.rows) for group in groups))
        tables = (c_void_p * 4)(*(group.table.data_ptr() for group in groups))
        grid = coarse.bordered_grid
        self._call("sr_above", grid, *coarse.shape[1:], fine.sites, len(fine), padding, rows, tables)
        return KernelMap(len(fine), len(coarse), (TapGroup(None, ALL_TAPS, down),), tuple(groups))

    def _call(self, function: str, *arguments: Any) -> None:
        getattr(self._maps, function)(*_arguments(arguments))


def _arguments(values: Sequence[Any]) -> list[Any]:
    """Tensors go as addresses, integers as int64."""
    return [
        c_void_p(a.data_ptr()) if isinstance(a, Tensor) else c_int64(a) if isinstance(a, int) else a for a in values
    ]


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def _check(name: str, tensor: Tensor, rows: int, channels: int) -> None:
    if tensor.shape != (rows, channels):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: give [{rows}, {channels}]")
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}: the cpu backend takes float32 on the CPU")
    if channels > 1 and tensor.stride(1) != 1:
        raise ValueError(f"{name} has stride {tensor.stride(1)} between channels: they must be adjacent")
