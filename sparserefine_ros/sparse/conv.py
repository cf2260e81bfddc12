"""Sparse 3x3 convolution in plain torch: chunked gather-GEMM, CPU and CUDA, forward and backward.

Shape shorthand
    Ni, No     input and output sites
    Cin, Cout  channels
    T          taps of a group of output rows (9, or 4, 2, 1 by parity for a transposed convolution)
Every output row gathers its T input rows into one row of [T * Cin], and one matrix product with the weights
[T * Cin, Cout] gives the result.  Done in chunks of rows the gathered buffer stays in cache.  Nothing is ever
scattered with addition, in the backward pass neither, so results are deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparserefine_ros.sparse.maps import TAPS, KernelMap, TapGroup

# Elements of the gathered buffer.  On a CPU it is to stay in cache (4 MB in fp32), with rows enough for an efficient
# matrix product; over 16 to 512 channels that was as fast as the best fixed number of rows, within noise.  On a GPU
# launches cost more than cache misses, and the limit only bounds memory.
CPU_CHUNK_ELEMENTS = 1 << 20
GPU_CHUNK_ELEMENTS = 1 << 26
MIN_CHUNK_ROWS = 512


def sparse_conv(x: Tensor, weight: Tensor, kernel_map: KernelMap, bias: Tensor | None = None) -> Tensor:
    """out[o] = bias + sum over the map's pairs (i, o, k) of x[i] @ weight[k].

    x: [Ni, Cin] floating; weight: [9, Cin, Cout] of the same dtype, tap k = kh + 3 * kw; bias: [Cout] or None;
    returns [No, Cout].  Differentiable once in x, weight and bias.  Under torch.autocast all are cast to its dtype.
    Weight gradients are summed over chunks in at least fp32.
    Raises ValueError where shapes, dtypes or devices do not fit.
    """
    _check(x, weight, kernel_map, bias)
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    if x.dtype != weight.dtype:
        raise ValueError(f"features have dtype {x.dtype} and the weight {weight.dtype}: convert one of them")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        out: Tensor = _SparseConv.apply(x, weight, kernel_map)  # type: ignore[no-untyped-call]
        return out if bias is None else out + bias.to(out.dtype)
    return _gather_gemm(x, weight, kernel_map.forward, kernel_map.n_out, bias)


def sparse_conv_transposed(x: Tensor, weight: Tensor, kernel_map: KernelMap, bias: Tensor | None = None) -> Tensor:
    """Transposed convolution: out[i] = sum over the map's pairs (i, o, k) of x[o] @ weight[k].

    kernel_map: the *strided* map, from fine to coarse; no tap is flipped.
    x: [No, Cin], weight: [9, Cin, Cout]; returns [Ni, Cout].  Otherwise as `sparse_conv`.
    """
    return sparse_conv(x, weight, kernel_map.transposed, bias)


class _SparseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kernel_map: KernelMap) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.kernel_map = kernel_map
        return _gather_gemm(x, weight, kernel_map.forward, kernel_map.n_out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        kernel_map: KernelMap = ctx.kernel_map
        grad_x = grad_weight = None
        grad = grad.contiguous()
        if ctx.needs_input_grad[0]:
            grad_x = _gather_gemm(grad, weight.transpose(1, 2), kernel_map.backward, kernel_map.n_in)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(x, grad, kernel_map.forward)
        return grad_x, grad_weight, None


def _gather_gemm(
    x: Tensor, weight: Tensor, groups: tuple[TapGroup, ...], n_out: int, bias: Tensor | None = None
) -> Tensor:
    """Forward product of all groups, [n_out, Cout], plus the bias."""
    cout = weight.shape[2]
    bias = x.new_zeros(cout) if bias is None else bias.to(x.dtype)
    source = _with_zero_row(x)
    out = x.new_empty(n_out, cout)
    for group in groups:
        kernel = _taps(weight, group.taps)
        for start, stop, gathered in _chunks(source, group.table):
            if group.rows is None:
                torch.addmm(bias, gathered, kernel, out=out[start:stop])
            else:
                out.index_copy_(0, group.rows[start:stop], torch.addmm(bias, gathered, kernel))
    return out


def _weight_gradient(x: Tensor, grad: Tensor, groups: tuple[TapGroup, ...]) -> Tensor:
    """Gradient of the weights, [9, Cin, Cout]: gathered inputs, transposed, times output gradients."""
    cin, cout = x.shape[1], grad.shape[1]
    source = _with_zero_row(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    grad_weight = torch.zeros(TAPS, cin, cout, dtype=wide, device=x.device)
    for group in groups:
        total = torch.zeros(len(group.taps) * cin, cout, dtype=wide, device=x.device)
        for start, stop, gathered in _chunks(source, group.table):
            part = grad[start:stop] if group.rows is None else grad.index_select(0, group.rows[start:stop])
            if wide == x.dtype:
                total.addmm_(gathered.t(), part)
            else:
                total += torch.mm(gathered.t(), part)
        for tap, kernel in zip(group.taps, total.view(-1, cin, cout), strict=True):
            grad_weight[tap] = kernel  # every tap belongs to one group
    return grad_weight.to(x.dtype)


def _chunks(source: Tensor, table: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Yields (start, stop, gathered [stop - start, T * Cin]) over the table's rows, reusing one buffer."""
    rows, taps = table.shape
    cin = source.shape[1]
    elements = CPU_CHUNK_ELEMENTS if source.device.type == "cpu" else GPU_CHUNK_ELEMENTS
    step = max(MIN_CHUNK_ROWS, elements // max(1, taps * cin))
    buffer = source.new_empty(min(step, rows) * taps, cin)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        gathered = buffer[: (stop - start) * taps]
        torch.index_select(source, 0, table[start:stop].view(-1), out=gathered)
        yield start, stop, gathered.view(stop - start, taps * cin)


def _with_zero_row(x: Tensor) -> Tensor:
    """x with the row of zeros that stands for "no site"."""
    return torch.cat([x, x.new_zeros(1, x.shape[1])])


def _taps(weight: Tensor, taps: tuple[int, ...]) -> Tensor:
    """The weights of some taps as one matrix [T * Cin, Cout]."""
    if taps == tuple(range(TAPS)):
        return weight.reshape(-1, weight.shape[2])
    return torch.cat([weight[tap] for tap in taps])  # indexing with a list would make a GPU's host wait


def _check(x: Tensor, weight: Tensor, kernel_map: KernelMap, bias: Tensor | None) -> None:
    if weight.dim() != 3 or weight.shape[0] != TAPS:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: give [{TAPS}, Cin, Cout], tap k = kh + 3 * kw")
    if x.dim() != 2 or x.shape[0] != kernel_map.n_in:
        raise ValueError(
            f"features have shape {tuple(x.shape)}, but the kernel map has {kernel_map.n_in} input sites: "
            f"give [{kernel_map.n_in}, {weight.shape[1]}] and the map of this level"
        )
    if x.shape[1] != weight.shape[1]:
        raise ValueError(f"features have {x.shape[1]} channels, but the weight takes {weight.shape[1]}")
    if not x.dtype.is_floating_point:
        raise ValueError(f"features have dtype {x.dtype}: convert them to a floating dtype, as the weight's")
    if bias is not None and bias.shape != weight.shape[2:]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, but the weight gives {weight.shape[2]} channels")
    devices = (x.device, weight.device, kernel_map.forward[0].table.device)
    if len(set(devices)) != 1:
        raise ValueError(f"features, weight and kernel map are on {devices}: move them to one device")
