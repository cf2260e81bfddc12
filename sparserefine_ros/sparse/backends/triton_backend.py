"""Sparse convolutions on NVIDIA GPUs in Triton: every `Backend.conv` is one kernel launch.

Shape shorthand
    Ni, No, Cin, Cout, C2, T   as in `triton_kernels`
The kernels need no compiler tool chain of CUDA, but Triton builds a small launcher with the C compiler and headers of
the Python it runs in. Every layer compiles once, in about a second, and is kept on disk (TRITON_CACHE_DIR).

Environment
    SPARSEREFINE_TRITON_TUNE=1   times a few tiles for every layer and number of rows (by powers of two) when first met,
                                 instead of choosing by rule: some minutes at first, and stutter as densities change
    TRITON_INTERPRET=1           set before Triton is first imported, runs the kernels on CPU tensors, slowly, for tests
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparserefine_ros.sparse.backends.base import Backend, Output, check_weights
from sparserefine_ros.sparse.backends.triton_tiles import Packed, Tile, candidates, fastest, interpreter_tile, pick_tile
from sparserefine_ros.sparse.maps import STRIDE_MODES, TAPS, KernelMap, TapGroup
from sparserefine_ros.sparse.pyramid import Pyramid

if TYPE_CHECKING:
    from types import ModuleType

MAX_OUTPUTS = 3
MAX_GROUPS = 4


class TritonBackend(Backend):
    """Implicit GEMM over the kernel map in Triton; accumulates in fp32 and rounds once, at the store."""

    name = "triton"
    dtypes = (torch.float32, torch.float16, torch.bfloat16)

    def __init__(self, tune: bool | None = None) -> None:
        """tune: times tiles instead of choosing by rule; None asks the environment."""
        self.tune = os.environ.get("SPARSEREFINE_TRITON_TUNE") == "1" if tune is None else tune
        self.tuned: dict[tuple[object, ...], Tile] = {}

    @classmethod
    def missing(cls, device: torch.device) -> str | None:
        try:
            kernels = _kernels()
        except ImportError as error:
            return f"Triton cannot be imported ({error}); install the triton wheel that fits this torch"
        if device.type == "cpu":
            return None if kernels.INTERPRETED else "it needs CUDA (TRITON_INTERPRET=1 runs it on the CPU, for tests)"
        if device.type != "cuda":
            return "it needs CUDA"
        if kernels.INTERPRETED:
            return "TRITON_INTERPRET is set, which is for tests on the CPU; unset it"
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            return "it needs CUDA compute capability 8.0 or newer (Ampere)"
        return _self_test(device)

    def pyramid(self, mask: Tensor, levels: int, stride: str) -> Pyramid:
        if mask.dim() != 3 or mask.dtype != torch.bool or levels < 1 or stride not in STRIDE_MODES:
            return super().pyramid(mask, levels, stride)  # which says what is wrong
        from sparserefine_ros.sparse.backends.triton_maps import build_pyramid

        with torch.cuda.device_of(mask):
            return build_pyramid(mask, levels, stride)

    def padded_pyramid(self, mask: Tensor, stride: str, capacities: Sequence[int]) -> tuple[Pyramid, Tensor]:
        """As ``pyramid``, with room for ``capacities`` [L] sites and without a host synchronisation.

        Nothing but the shape of ``mask`` decides which kernels run on how much memory, so a CUDA graph can hold it.
        Returns a pyramid whose every length is a capacity, the sites in use first and in order, and how many sites
        there are at each level, [L] int32 on the device. Where that exceeds a capacity nothing of the pyramid, or of
        what is computed with it, is of use, though nothing is written beside its place. Sites behind those in use are
        (0, 0, 0).
        """
        from sparserefine_ros.sparse.backends.triton_maps import build_padded_pyramid

        with torch.cuda.device_of(mask):
            return build_padded_pyramid(mask, stride, capacities)

    def pack(self, weight: Tensor, shortcut: Tensor | None = None) -> Packed:
        check_weights(weight, shortcut)
        cin, cout = weight.shape[1:]
        kp, np = _padded(cin), _padded(cout)
        c2 = 0 if shortcut is None else shortcut.shape[0]
        weight = F.pad(weight.detach(), (0, np - cout, 0, kp - cin)).contiguous()
        if shortcut is not None:
            shortcut = F.pad(shortcut.detach(), (0, np - cout, 0, _padded(c2) - c2)).contiguous()
        return Packed(weight, shortcut, cin, cout, c2)

    def conv(
        self,
        x: Tensor,
        packed: Packed,
        kernel_map: KernelMap,
        outputs: Sequence[Output],
        add: Tensor | None = None,
        shortcut: Tensor | None = None,
    ) -> None:
        if not 1 <= len(outputs) <= MAX_OUTPUTS:
            raise ValueError(f"{len(outputs)} outputs: the triton backend writes 1 to {MAX_OUTPUTS}")
        if len(kernel_map.forward) > MAX_GROUPS:
            raise ValueError(f"the kernel map has {len(kernel_map.forward)} groups of rows: at most {MAX_GROUPS}")
        _check(x, packed, kernel_map, outputs, add, shortcut)
        if kernel_map.n_out == 0:
            return
        with torch.cuda.device_of(x):
            tile = self._tile(x, packed, kernel_map, outputs, add, shortcut)
            _launch(tile, x, packed, kernel_map, outputs, add, shortcut)

    def _tile(
        self,
        x: Tensor,
        packed: Packed,
        kernel_map: KernelMap,
        outputs: Sequence[Output],
        add: Tensor | None,
        shortcut: Tensor | None,
    ) -> Tile:
        rows = kernel_map.n_out
        if not self.tune:
            return (
                interpreter_tile(packed) if x.device.type == "cpu" else pick_tile(packed, rows, _processors(x.device))
            )
        key = (
            packed.weight.shape, packed.weight.dtype, packed.c2, rows.bit_length(), len(kernel_map.forward),
            len(outputs), add is None, x.device,
        )  # fmt: skip
        if key not in self.tuned:
            # Into memory of their own: an output may be what is added.
            scratch = [replace(out, tensor=torch.empty_like(out.tensor)) for out in outputs]
            tiles = candidates(packed, rows, _processors(x.device))
            self.tuned[key] = fastest(
                tiles, lambda tile: _launch(tile, x, packed, kernel_map, scratch, add, shortcut), x.device
            )
        return self.tuned[key]


def _launch(
    tile: Tile,
    x: Tensor,
    packed: Packed,
    kernel_map: KernelMap,
    outputs: Sequence[Output],
    add: Tensor | None,
    shortcut: Tensor | None,
) -> None:
    groups = kernel_map.forward
    tables, column_major = _layout(groups)
    group_args: list[Any] = []
    blocks = 0
    for group, table in zip(groups, tables, strict=True):
        blocks += -(-len(table) // tile.rows)
        group_args += [table, group.rows, len(table), _code(group.taps), group.count]
    # Groups with counts have room for all rows each, but share them; every group may end in a block not full.
    blocks = min(blocks, -(-kernel_map.n_out // tile.rows) + len(groups) - 1)
    # Where groups are selected among, all four have to be of a kind: the first's tensors stand in, with no rows.
    absent = [*group_args[:2], 0, 0, group_args[4]] if len(groups) > 1 else [None, None, 0, 0, None]
    group_args += absent * (MAX_GROUPS - len(groups))
    output_args: list[Any] = []
    relu = 0
    for i, out in enumerate(outputs):
        output_args += [out.tensor, out.tensor.stride(0), out.scale, out.shift]
        relu |= out.relu << i
    output_args += [None, 0, None, None] * (MAX_OUTPUTS - len(outputs))
    _kernels().conv_kernel[(blocks * (packed.weight.shape[2] // tile.columns),)](
        x,
        x.stride(0),
        kernel_map.n_in,
        packed.weight,
        shortcut,
        0 if shortcut is None else shortcut.stride(0),
        packed.shortcut,
        add,
        0 if add is None else add.stride(0),
        *group_args,
        *output_args,
        **constants(packed, tile, relu, len(groups), column_major),
        num_warps=tile.warps,
    )


def constants(packed: Packed, tile: Tile, relu: int, groups: int, column_major: bool) -> dict[str, Any]:
    """What the kernel is compiled for. ``relu``: bit i for output i. ``groups``: of output rows."""
    return {
        "RELU": relu,
        "GROUPS": 1 if groups == 1 else MAX_GROUPS,
        "COLUMN_MAJOR": column_major,
        "CIN": packed.cin,
        "KP": packed.weight.shape[1],
        "C2": packed.c2,
        "K2P": 0 if packed.shortcut is None else packed.shortcut.shape[0],
        "COUT": packed.cout,
        "NP": packed.weight.shape[2],
        "PRECISION": _precision(packed.weight.dtype),
        "WIDEN": _kernels().INTERPRETED,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.depth,
        "IN_FLIGHT": tile.in_flight,
    }


def _padded(channels: int) -> int:
    """Channels as packed: a tensor core takes 16 at least, and above that whole tiles of 32 are worth the padding."""
    return 16 if channels <= 16 else -(-channels // 32) * 32


def _code(taps: tuple[int, ...]) -> int:
    """The taps of a group as one number: their count in the lowest four bits, then each in four bits."""
    return len(taps) + sum(tap << 4 * i + 4 for i, tap in enumerate(taps))


def _layout(groups: tuple[TapGroup, ...]) -> tuple[list[Tensor], bool]:
    """The tables as they lie in memory: all row-major (False) or all column-major (True)."""
    tables = [group.table for group in groups]
    if not all(table.is_contiguous() for table in tables) and all(table.t().is_contiguous() for table in tables):
        return tables, True
    return [table.contiguous() for table in tables], False


def _precision(dtype: torch.dtype) -> str:
    """fp32 on NVIDIA's tensor cores: three TF32 products give nearly all of its bits."""
    return "tf32x3" if dtype == torch.float32 and torch.version.hip is None else "ieee"


def _check(
    x: Tensor,
    packed: Packed,
    kernel_map: KernelMap,
    outputs: Sequence[Output],
    add: Tensor | None,
    shortcut: Tensor | None,
) -> None:
    """ValueError where a tensor does not fit: a kernel would read or write elsewhere in memory."""
    if (shortcut is None) != (packed.shortcut is None):
        raise ValueError("a shortcut is given exactly when its weight was packed")
    result = (kernel_map.n_out, packed.cout)
    _fits("x", x, (kernel_map.n_in, packed.cin), packed.weight)
    for out in outputs:
        _fits("an output", out.tensor, result, packed.weight)
    if add is not None:
        _fits("add", add, result, packed.weight)
    if shortcut is not None:
        _fits("shortcut", shortcut, (kernel_map.n_out, packed.c2), packed.weight)
    for out in outputs:
        for vector in (out.scale, out.shift):
            if vector is not None and (vector.shape != (packed.cout,) or vector.stride(0) != 1):
                raise ValueError(f"scale and shift have shape {tuple(vector.shape)}: give ({packed.cout},), contiguous")


def _fits(name: str, tensor: Tensor, shape: tuple[int, int], weight: Tensor) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: give {shape}")
    if tensor.stride(1) != 1 and shape[1] > 1:
        raise ValueError(f"{name} has strides {tensor.stride()}: adjacent channels have to be adjacent in memory")
    if tensor.dtype != weight.dtype or tensor.device != weight.device:
        raise ValueError(
            f"{name} is {tensor.dtype} on {tensor.device}, but the weight {weight.dtype} on {weight.device}"
        )


@lru_cache(maxsize=1)
def _kernels() -> ModuleType:
    """The kernels; ImportError without Triton."""
    from sparserefine_ros.sparse.backends import triton_kernels

    return triton_kernels


@lru_cache
def _processors(device: torch.device) -> int:
    """Multiprocessors; 1 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@lru_cache
def _self_test(device: torch.device) -> str | None:
    """Maps and convolutions of a small frame: what Triton misses on this machine shows here, not at the first frame."""
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(1, 24, 24, generator=generator) < 0.5).to(device)
    weight = torch.randn(TAPS, 32, 32, generator=generator).to(device) / 17
    backend, expected = TritonBackend(tune=False), Pyramid.build(mask, 2)
    try:
        pyramid = backend.pyramid(mask, 2, "dilate")
        for mine, right in (
            (pyramid.submanifold[0], expected.submanifold[0]),
            (pyramid.strided[0], expected.strided[0]),
            (pyramid.strided[0].transposed, expected.strided[0].transposed),
        ):
            if not torch.equal(mine.out_to_in, right.out_to_in):
                return "Triton builds wrong maps there"
            x = torch.randn(mine.n_in, 32, generator=generator).to(device)
            reference = torch.empty(mine.n_out, 32, device=device, dtype=torch.float64)
            Backend().conv(x.double(), (weight.double(), None), right, [Output(reference)])
            for dtype, tolerance in ((torch.float32, 1e-4), (torch.float16, 1e-2)):
                out = torch.empty(mine.n_out, 32, device=device, dtype=dtype)
                backend.conv(x.to(dtype), backend.pack(weight.to(dtype)), mine, [Output(out)])
                if not torch.allclose(out.double(), reference, rtol=tolerance, atol=tolerance):
                    return f"Triton computes wrong values there in {str(dtype).removeprefix('torch.')}"
    except Exception as error:  # the compiler, the launcher's compiler, the driver: each has errors of its own
        return f"Triton fails there: {(str(error).strip() or type(error).__name__).splitlines()[-1]}"
    return None
