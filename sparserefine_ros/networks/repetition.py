"""Sparse repetition: the dense segmenter's own layers once more, at native resolution, at the selected sites alone.

SparseRefine trains a second network for the pixels that low resolution leaves uncertain. A convolutional segmenter can
be that network itself. It runs at low resolution first, and what its layers gave is kept. Then the same layers run at
native resolution, each at those sites of its grid under which a selected pixel lies; where a kernel reaches beyond
them, it reads what the same layer gave at low resolution, enlarged. With all pixels selected that is the segmenter at
native resolution, exactly; with few, it costs their share of it. Ours; its relatives skip blocks (Ren et al., 2018,
"SBNet") or what has not changed since the last frame (Parger et al., 2022, "DeltaCNN").

Nothing of a network is written anew for it. Its ``forward`` is called with objects in the place of tensors, which
torch hands every operation to (``__torch_function__``): `Recorded` computes it and keeps the result, `Repeated`
computes it at its sites. Both see the same operations in the same order; the batch normalisation of a convolution
counts as a part of it, as one of the two networks may have it folded.

Shape shorthand: B images, C channels, h, w the native size of a grid, N its active sites, M sites beyond them that
some kernel reaches, n outputs of an operation, T inputs that each of them reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sparserefine_ros.sparse import KernelMap, TapGroup
from sparserefine_ros.sparse.backends.base import Backend, Output
from sparserefine_ros.sparse.conv import sparse_conv
from sparserefine_ros.sparse.maps import TAPS

Size = tuple[int, int]


class NotRepeatableError(ValueError):
    """A network does something that is not known at single sites; the text names it."""


class _Map:
    """What a network may ask of a map beside torch's functions."""

    tensor: Tensor
    convolved = 0  # where a convolution gave it: how many operations there were then

    def __add__(self, other: Any) -> Any:
        return torch.add(self, other)  # type: ignore[call-overload]

    def __truediv__(self, other: Any) -> Any:
        return torch.div(self, other)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"'{name}' of a map is not known at single sites")

    def dim(self) -> int:
        return 4

    @property
    def device(self) -> torch.device:
        return self.tensor.device


class Recorded(_Map):
    """A map [B, C, h, w] of the pass at low resolution; the result of every operation on it is kept in ``kept``."""

    def __init__(self, tensor: Tensor, kept: list[Tensor]) -> None:
        self.tensor, self.kept = tensor, kept

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Recorded:
        first = next(x for x in _operands(args) if isinstance(x, Recorded))
        result = func(*_bare(args), **(kwargs or {}))
        if not isinstance(result, Tensor):
            raise NotRepeatableError(f"{_name(func)} gives no single map")
        kept = first.kept
        if _is_part(func, first, len(kept)):
            kept.pop()
        kept.append(result)
        answer = Recorded(result, kept)
        answer.convolved = len(kept) * (_name(func) == "conv2d")
        return answer

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape


def record(network: Callable[[Any], Any], images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """``network(images)``, and what every operation on the way gave, in order."""
    kept: list[Tensor] = []
    result = network(Recorded(images, kept))
    return result.tensor, kept


class Sites(NamedTuple):
    """Positions on a grid, in the order of memory; each [N] int64."""

    image: Tensor
    row: Tensor
    column: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> Sites:
        """The True ones of ``mask`` [B, h, w] bool."""
        return cls(*torch.nonzero(mask, as_tuple=True))

    @property
    def total(self) -> int:
        return len(self.row)

    def flat(self, height: int, width: int) -> Tensor:
        """[N]: positions in a flattened [B, height, width]."""
        return (self.image * height + self.row) * width + self.column


class Grid:
    """The active sites of all maps of one size. active: [B, h, w] bool."""

    def __init__(self, active: Tensor) -> None:
        self.active = active
        self.size: Size = (active.shape[1], active.shape[2])
        self.sites = Sites.of(active)
        self.flat = self.sites.flat(*self.size)


class Reach(NamedTuple):
    """What an operation reads of a map."""

    beyond: Sites  # M
    table: Tensor  # [n, T] int32: of the map's N rows, then M of sites beyond them; N + M where there is none


class Repetition:
    """One pass at native resolution: its grids, the tables of its operations, and what low resolution gave.

    selected: [B, H, W] bool; kept, engine: as `repeat` takes them.
    """

    def __init__(self, selected: Tensor, kept: Sequence[Tensor], engine: Engine | None = None) -> None:
        self.selected, self.kept, self.engine, self.operations = selected, kept, engine, 0
        self.known: dict[Any, Any] = {}

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """``make()``, kept under ``key`` for the operations that need it again."""
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]

    def grid(self, size: Size) -> Grid:
        """A site is active where a selected pixel lies under it."""

        def make() -> Grid:
            if size == tuple(self.selected.shape[1:]):
                return Grid(self.selected)
            return Grid(F.adaptive_max_pool2d(self.selected.float(), size) > 0)

        grid: Grid = self.once(size, make)
        return grid


class Repeated(_Map):
    """A map at native resolution: its values at the active sites of a grid, ``tensor`` [N, C].

    low: [B, C, h', w'], the same map at low resolution, which stands in for the other sites.
    """

    def __init__(self, run: Repetition, size: Size, rows: Tensor, low: Tensor) -> None:
        self.run, self.size, self.tensor, self.low = run, size, rows, low

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = next(x for x in _operands(args) if isinstance(x, Repeated))
        operation, run = OPERATIONS.get(_name(func)), first.run
        if operation is None:
            raise NotRepeatableError(f"{_name(func)} is not known at single sites")
        run.operations += not _is_part(func, first, run.operations)
        if run.operations > len(run.kept):
            raise NotRepeatableError("it has more operations than the dense segmenter")
        answer = operation(func, first, run.kept[run.operations - 1], args, kwargs or {})
        answer.convolved = run.operations * (_name(func) == "conv2d")
        return answer

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.run.selected), self.tensor.shape[1], *self.size))

    @property
    def grid(self) -> Grid:
        return self.run.grid(self.size)

    def read(self, reach: Reach, key: Any) -> Tensor:
        """[N + M, C]: the rows that ``reach`` speaks of. key: of the operation that reads."""
        if reach.beyond.total == 0:
            return self.tensor
        size = (self.low.shape[2], self.low.shape[3])
        at, weights = self.run.once((key, size), lambda: _bilinear(reach.beyond, self.size, size, self.low.dtype))
        return torch.cat([self.tensor, _weighted(_as_rows(self.low), at, weights).to(self.tensor.dtype)])


class Pixels(Repeated):
    """The images, which are known everywhere: no site is active, and beyond lie the colours themselves.

    colours: normalised rows [M, 3] at flat positions [M] of [B, H, W].
    """

    def __init__(self, run: Repetition, colours: Callable[[Tensor], Tensor]) -> None:
        nothing = torch.empty(0, 3, device=run.selected.device)
        super().__init__(run, (run.selected.shape[1], run.selected.shape[2]), nothing, nothing)
        self.colours = colours

    @property
    def grid(self) -> Grid:
        return Grid(torch.zeros_like(self.run.selected))

    def read(self, reach: Reach, key: Any) -> Tensor:
        return self.colours(reach.beyond.flat(*self.size))


class Whole(Repeated):
    """A small map that is known everywhere, as after pooling: ``tensor`` [B, C, h, w]."""

    def __init__(self, run: Repetition, tensor: Tensor) -> None:
        super().__init__(run, (tensor.shape[2], tensor.shape[3]), tensor, tensor)


class Engine:
    """3x3 convolutions on a backend, the weights of each packed once."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.packed: dict[int, tuple[Tensor, Any]] = {}

    def conv(self, x: Tensor, weight: Tensor, bias: Tensor | None, kernel_map: KernelMap) -> Tensor:
        """As `sparse_conv`, of a weight [Cout, Cin, 3, 3]."""
        kept = self.packed.get(id(weight))
        if kept is None:  # with the weight itself, so that its id stays its own
            kept = self.packed[id(weight)] = (weight, self.backend.pack(_by_tap(weight)))
        out = x.new_empty(kernel_map.n_out, weight.shape[0])
        self.backend.conv(x, kept[1], kernel_map, [Output(out, shift=bias)])
        return out


def repeat(
    network: Callable[[Any], Any],
    selected: Tensor,
    colours: Callable[[Tensor], Tensor],
    kept: Sequence[Tensor],
    engine: Engine | None = None,
) -> Tensor:
    """Logits [N, K] of ``network`` at the N pixels of ``selected`` [B, H, W] bool, in the order of memory.

    network: normalised images [B, 3, H, W] to logits [B, K, H, W]; batch normalisation in evaluation mode.
    colours: normalised rows [M, 3] of the images at flat positions [M] int64.
    kept: of `record` of the same network, or of one with the same operations, on the images at low resolution.
    engine: None for torch's convolutions, which are differentiable.
    Raises NotRepeatableError for an operation that is none of OPERATIONS, or not in the form that is known.
    """
    result = network(Pixels(Repetition(selected, kept, engine), colours))
    if not isinstance(result, Repeated) or result.size != tuple(selected.shape[1:]):
        raise NotRepeatableError("logits of another size than the images")
    return result.tensor


def _convolution(func: Any, x: Repeated, low: Tensor, args: Any, kwargs: Any) -> Repeated:
    if isinstance(x, Whole):
        return Whole(x.run, func(*_bare(args), **kwargs))
    known = {"weight": None, "bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    weight, bias, stride, padding, dilation, groups = _arguments(args, kwargs, known)
    kernel = (weight.shape[2], weight.shape[3])
    if groups != 1 or kernel not in ((1, 1), (3, 3)):
        form = f"{kernel[0]}x{kernel[1]} in {groups} group{'s' * (groups > 1)}"
        raise NotRepeatableError(f"a convolution of {form} is not known at single sites")
    stride, padding, dilation = (_side(value) for value in (stride, padding, dilation))
    run, key = x.run, (type(x), x.size, kernel[0], stride, padding, dilation)
    if kernel == (1, 1) and stride == 1 and padding == 0 and not isinstance(x, Pixels):
        return Repeated(run, x.size, F.linear(x.tensor.to(weight.dtype), weight[:, :, 0, 0], bias), low)
    reach_of_kernel = dilation * (kernel[0] - 1)
    height, width = ((side + 2 * padding - reach_of_kernel - 1) // stride + 1 for side in x.size)
    grid = run.grid((height, width))
    reach: Reach = run.once(key, lambda: _under(x.grid, grid, kernel[0], stride, padding, dilation))
    rows = x.read(reach, key).to(weight.dtype)
    if kernel == (1, 1):
        picked = rows.index_select(0, reach.table[:, 0])  # a shortcut with a stride; none lies outside
        return Repeated(run, grid.size, F.linear(picked, weight[:, :, 0, 0], bias), low)
    if run.engine is not None:
        kernel_map = run.once((*key, "map"), lambda: _inference_map(reach, len(rows)))
        return Repeated(run, grid.size, run.engine.conv(rows, weight, bias, kernel_map), low)
    kernel_map = run.once((*key, "map"), lambda: _training_map(reach, len(rows)))
    return Repeated(run, grid.size, sparse_conv(rows, _by_tap(weight), kernel_map, bias), low)


def _interpolation(func: Any, x: Repeated, low: Tensor, args: Any, kwargs: Any) -> Repeated:
    known = {"size": None, "scale_factor": None, "mode": "nearest", "align_corners": None}
    size, factor, mode, corners = _arguments(args, kwargs, known)
    if mode != "bilinear" or corners or size is None or factor is not None:
        raise NotRepeatableError(f"interpolate with mode {mode!r}, align_corners {corners} and scale_factor {factor}")
    run, size = x.run, (int(size[0]), int(size[1]))
    grid, key = run.grid(size), (type(x), x.size, "to", size)
    at, weights = run.once((*key, "corners"), lambda: _bilinear(grid.sites, size, x.size, x.tensor.dtype))
    if isinstance(x, Whole):
        return Repeated(run, size, _weighted(_as_rows(x.tensor), at, weights), low)
    reach: Reach = run.once(key, lambda: _at(x.grid, at))
    return Repeated(run, size, _weighted(x.read(reach, key), reach.table, weights), low)


def _pooling(func: Any, x: Repeated, low: Tensor, args: Any, kwargs: Any) -> Repeated:
    if isinstance(x, Whole):
        return Whole(x.run, func(*_bare(args), **kwargs))
    (batch, channels), grid = x.shape[:2], x.grid
    enlarged = _as_rows(F.interpolate(x.low.to(x.tensor.dtype), x.size, mode="bilinear", align_corners=False))
    whole = enlarged.index_copy(0, grid.flat, x.tensor).view(batch, *x.size, channels).permute(0, 3, 1, 2)
    return Whole(x.run, func(whole, *args[1:], **kwargs))


def _elementwise(func: Any, x: Repeated, low: Tensor, args: Any, kwargs: Any) -> Repeated:
    """Of one map, or several of one grid; channels are axis 1 of rows as well."""
    maps = [y for y in _operands(args) if isinstance(y, Repeated)]
    if any(type(y) is not type(x) or y.size != x.size or isinstance(y, Pixels) for y in maps):
        raise NotRepeatableError(f"{_name(func)} of maps of different kinds")
    result = func(*_bare(args), **kwargs)
    return Whole(x.run, result) if isinstance(x, Whole) else Repeated(x.run, x.size, result, low)


OPERATIONS: Mapping[str, Callable[[Any, Any, Tensor, Any, Any], Repeated]] = {
    "conv2d": _convolution,
    "interpolate": _interpolation,
    "adaptive_avg_pool2d": _pooling,
    **dict.fromkeys(("add", "div", "cat", "relu", "relu_", "sigmoid", "silu", "gelu", "batch_norm"), _elementwise),
}
"""By the names of torch's functions."""


def _under(source: Grid, target: Grid, kernel: int, stride: int, padding: int, dilation: int) -> Reach:
    """What the kernel's taps read of ``source`` at each site of ``target``: [N, kernel^2], rows fastest."""
    offsets = [tap * dilation for tap in range(kernel)]
    batch, height, width = source.active.shape
    out_height, out_width = target.size
    # A border all round saves every bounds check; no stride leaves a kernel further out than this.
    above = padding
    tall = max(height + above, (out_height - 1) * stride + offsets[-1] + 1)
    wide = max(width + above, (out_width - 1) * stride + offsets[-1] + 1)
    read = torch.zeros(batch, tall, wide, dtype=torch.bool, device=source.active.device)
    for y in offsets:
        for x in offsets:
            rows, columns = (slice(o, o + (n - 1) * stride + 1, stride) for o, n in ((y, out_height), (x, out_width)))
            read[:, rows, columns] |= target.active
    inner = (slice(None), slice(above, above + height), slice(above, above + width))
    beyond = Sites.of(read[inner] & ~source.active)
    row_of = _row_of(source, beyond, (batch, tall, wide), above)
    base = target.sites._replace(row=target.sites.row * stride, column=target.sites.column * stride).flat(tall, wide)
    shifts = torch.tensor([y * wide + x for x in offsets for y in offsets], device=base.device)
    return Reach(beyond, row_of[base[:, None] + shifts])


def _at(source: Grid, positions: Tensor) -> Reach:
    """What lies at flat ``positions`` [n, T] of ``source``."""
    read = torch.zeros(source.active.numel(), dtype=torch.bool, device=positions.device)
    read[positions.view(-1)] = True
    beyond = Sites.of(read.view_as(source.active) & ~source.active)
    return Reach(beyond, _row_of(source, beyond, source.active.shape, 0)[positions])


def _row_of(source: Grid, beyond: Sites, shape: Sequence[int], border: int) -> Tensor:
    """Flat [B, tall, wide] int32: the row at each pixel of a grid that begins ``border`` pixels in."""
    rows = source.sites.total
    count = rows + beyond.total
    row_of = torch.full(tuple(shape), count, dtype=torch.int32, device=source.active.device).view(-1)
    numbers = torch.arange(count, dtype=torch.int32, device=row_of.device)
    for sites, these in ((source.sites, numbers[:rows]), (beyond, numbers[rows:])):
        inside = sites._replace(row=sites.row + border, column=sites.column + border)
        row_of[inside.flat(shape[1], shape[2])] = these
    return row_of


def _bilinear(sites: Sites, here: Size, there: Size, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Flat positions [N, 4] in a map of size ``there`` and their weights, at ``sites`` of a grid of size ``here``.

    As F.interpolate without align_corners.
    """
    axes = []
    for place, size, other in zip((sites.row, sites.column), here, there, strict=True):
        centre = (torch.arange(size, device=place.device, dtype=torch.float64) + 0.5) * (other / size) - 0.5
        first = centre.clamp(min=0).floor()
        weight = (centre.clamp(min=0) - first).to(dtype)
        second = (first + 1).clamp(max=other - 1)
        pair = torch.stack([first, second], 1).long()  # [size, 2]
        axes.append((pair[place], torch.stack([1 - weight, weight], 1)[place]))  # [N, 2] each
    (rows, down), (columns, right) = axes
    base = (sites.image[:, None] * there[0] + rows) * there[1]
    at = (base[:, :, None] + columns[:, None]).flatten(1)
    return at, (down[:, :, None] * right[:, None]).flatten(1)


def _weighted(rows: Tensor, at: Tensor, weights: Tensor) -> Tensor:
    """[n, C]: sums of ``rows`` [R, C] at ``at`` [n, 4] by ``weights`` [n, 4]."""
    return F.embedding_bag(at, rows, mode="sum", per_sample_weights=weights.to(rows.dtype))


def _inference_map(reach: Reach, n_in: int) -> KernelMap:
    return KernelMap(n_in, len(reach.table), (TapGroup(None, tuple(range(TAPS)), reach.table),), ())


def _training_map(reach: Reach, n_in: int) -> KernelMap:
    """Under each tap an input row meets one output row at most, so that the table can be turned round."""
    taps, n_out = tuple(range(TAPS)), len(reach.table)
    back = torch.full((n_in + 1, TAPS), n_out, dtype=torch.int32, device=reach.table.device)
    outputs = torch.arange(n_out, dtype=torch.int32, device=reach.table.device)
    for tap in taps:
        back[reach.table[:, tap].long(), tap] = outputs
    return KernelMap(n_in, n_out, (TapGroup(None, taps, reach.table),), (TapGroup(None, taps, back[:-1]),))


def _by_tap(weight: Tensor) -> Tensor:
    """A convolution's [Cout, Cin, 3, 3] as the engine's [9, Cin, Cout]."""
    return weight.permute(3, 2, 1, 0).reshape(TAPS, weight.shape[1], weight.shape[0])


def _as_rows(x: Tensor) -> Tensor:
    """[B, C, h, w] as [B h w, C]; no copy where channels come last in memory."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _operands(args: Any) -> Iterator[Any]:
    """Arguments, and the items of lists among them."""
    for x in args:
        yield from x if isinstance(x, list | tuple) else (x,)


def _bare(args: Any) -> list[Any]:
    return [[_tensor(y) for y in x] if isinstance(x, list | tuple) else _tensor(x) for x in args]


def _tensor(x: Any) -> Any:
    return x.tensor if isinstance(x, _Map) else x


def _is_part(func: Any, x: _Map, operations: int) -> bool:
    """Whether ``func`` normalises what a convolution, the last operation, gave."""
    return _name(func) == "batch_norm" and 0 < x.convolved == operations


def _name(func: Any) -> str:
    return getattr(func, "__name__", type(func).__name__)


def _arguments(args: Any, kwargs: Any, known: Mapping[str, Any]) -> list[Any]:
    """Values of the ``known`` parameters of a function of torch, which follow its first; there with their defaults."""
    return list({**known, **dict(zip(known, args[1:], strict=False)), **kwargs}.values())[: len(known)]


def _side(value: Any) -> int:
    """The number that ``value`` is for both axes."""
    values = set(value) if isinstance(value, list | tuple) else {value}
    if len(values) != 1 or not all(isinstance(side, int) for side in values):
        raise NotRepeatableError(f"a convolution of stride, padding or dilation {value}")
    return int(values.pop())
