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

Shape shorthand: B images, C channels, h, w the native size of a grid, N its active sites, M sites beyond them that an
operation reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparserefine_ros.networks.repetition_tables import Corners, Engine, Form, Grid, Rows, Size

POINTWISE = Form(1, 1, 0, 1)


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


class Repetition:
    """One pass at native resolution: its grids, the tables of its operations, and what low resolution gave.

    selected, kept, engine: as `repeat` takes them.
    """

    def __init__(self, selected: Grid, kept: Sequence[Tensor], engine: Engine) -> None:
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
            return Grid(F.adaptive_max_pool2d(self.selected.active.float(), size) > 0)

        grid: Grid = self.selected if size == self.selected.size else self.once(size, make)
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
        return torch.Size((len(self.run.selected.active), self.tensor.shape[1], *self.size))

    @property
    def grid(self) -> Grid:
        return self.run.grid(self.size)

    def read(self, found: Rows, key: Any) -> Tensor:
        """[N + M, C]: the rows that are ``found`` by the operation of ``key``."""
        if len(found.beyond) == 0:
            return self.tensor
        size, low = (self.low.shape[2], self.low.shape[3]), self.low
        corners = self.run.once((key, size), lambda: self.run.engine.corners(found.beyond, self.size, size, low.dtype))
        return torch.cat([self.tensor, corners.blend(_as_rows(low)).to(self.tensor.dtype)])


class Pixels(Repeated):
    """The images, which are known everywhere: no site is active, and beyond lie the colours themselves.

    colours: normalised rows [M, 3] at flat positions [M] of [B, H, W].
    """

    def __init__(self, run: Repetition, colours: Callable[[Tensor], Tensor]) -> None:
        active = run.selected.active
        nothing = torch.empty(0, 3, device=active.device)
        super().__init__(run, run.selected.size, nothing, nothing)
        self.colours, self.empty = colours, Grid(torch.zeros_like(active))

    @property
    def grid(self) -> Grid:
        return self.empty

    def read(self, found: Rows, key: Any) -> Tensor:
        return self.colours(found.beyond.flat)


class Whole(Repeated):
    """A small map that is known everywhere, as after pooling: ``tensor`` [B, C, h, w]."""

    def __init__(self, run: Repetition, tensor: Tensor) -> None:
        super().__init__(run, (tensor.shape[2], tensor.shape[3]), tensor, tensor)


def repeat(
    network: Callable[[Any], Any],
    selected: Grid,
    colours: Callable[[Tensor], Tensor],
    kept: Sequence[Tensor],
    engine: Engine | None = None,
) -> Tensor:
    """Logits [N, K] of ``network`` at the N active pixels of ``selected``, in the order of memory.

    network: normalised images [B, 3, H, W] to logits [B, K, H, W]; batch normalisation in evaluation mode.
    colours: normalised rows [M, 3] of the images at flat positions [M] int64.
    kept: of `record` of the same network, or of one with the same operations, on the images at low resolution.
    engine: None for torch's convolutions, which are differentiable.
    Raises NotRepeatableError for an operation that is none of OPERATIONS, or not in the form that is known.
    """
    result = network(Pixels(Repetition(selected, kept, engine or Engine()), colours))
    if not isinstance(result, Repeated) or result.size != selected.size:
        raise NotRepeatableError("logits of another size than the images")
    return result.tensor


def _convolution(func: Any, x: Repeated, low: Tensor, args: Any, kwargs: Any) -> Repeated:
    if isinstance(x, Whole):
        return Whole(x.run, func(*_bare(args), **kwargs))
    known = {"weight": None, "bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    weight, bias, *sides, groups = _arguments(args, kwargs, known)
    kernel = (weight.shape[2], weight.shape[3])
    if groups != 1 or kernel not in ((1, 1), (3, 3)):
        what = f"{kernel[0]}x{kernel[1]} in {groups} group{'s' * (groups > 1)}"
        raise NotRepeatableError(f"a convolution of {what} is not known at single sites")
    run, form = x.run, Form(kernel[0], *(_side(value) for value in sides))
    if form == POINTWISE and not isinstance(x, Pixels):
        return Repeated(run, x.size, F.linear(x.tensor.to(weight.dtype), weight[:, :, 0, 0], bias), low)
    height, width = (
        (side + 2 * form.padding - form.dilation * (form.kernel - 1) - 1) // form.stride + 1 for side in x.size
    )
    grid, key = run.grid((height, width)), (type(x), x.size, form)
    found, table = run.once(key, lambda: run.engine.under(x.grid, grid, form))
    rows = x.read(found, key).to(weight.dtype)
    if form.kernel == 1:
        picked = rows.index_select(0, table[:, 0])  # a shortcut with a stride; none lies outside
        return Repeated(run, grid.size, F.linear(picked, weight[:, :, 0, 0], bias), low)
    kernel_map = run.once((*key, "map"), lambda: run.engine.kernel_map(x.grid, found, table, form))
    return Repeated(run, grid.size, run.engine.conv(rows, weight, bias, kernel_map), low)


def _interpolation(func: Any, x: Repeated, low: Tensor, args: Any, kwargs: Any) -> Repeated:
    known = {"size": None, "scale_factor": None, "mode": "nearest", "align_corners": None}
    size, factor, mode, corners = _arguments(args, kwargs, known)
    if mode != "bilinear" or corners or size is None or factor is not None:
        raise NotRepeatableError(f"interpolate with mode {mode!r}, align_corners {corners} and scale_factor {factor}")
    run, size = x.run, (int(size[0]), int(size[1]))
    grid, key = run.grid(size), (type(x), x.size, "to", size)
    corners = run.once((*key, "corners"), lambda: run.engine.corners(grid.sites, size, x.size, x.tensor.dtype))
    if isinstance(x, Whole):
        return Repeated(run, size, corners.blend(_as_rows(x.tensor)), low)

    def make() -> tuple[Rows, Corners]:
        read = torch.zeros_like(x.grid.active)
        corners.mark(read.view(-1))
        found = Rows.of(x.grid, read, 0)
        return found, corners.through(found.number)

    found, rows = run.once(key, make)
    return Repeated(run, size, rows.blend(x.read(found, key)), low)


def _pooling(func: Any, x: Repeated, low: Tensor, args: Any, kwargs: Any) -> Repeated:
    if isinstance(x, Whole):
        return Whole(x.run, func(*_bare(args), **kwargs))
    (batch, channels), grid = x.shape[:2], x.grid
    enlarged = _as_rows(F.interpolate(x.low.to(x.tensor.dtype), x.size, mode="bilinear", align_corners=False))
    whole = enlarged.index_copy(0, grid.sites.flat, x.tensor).view(batch, *x.size, channels).permute(0, 3, 1, 2)
    return Whole(x.run, func(whole, *args[1:], **kwargs))


def _elementwise(func: Any, x: Repeated, low: Tensor, args: Any, kwargs: Any) -> Repeated:
    """Of one map, or several of one grid; channels are axis 1 of rows as well."""
    maps = [y for y in _operands(args) if isinstance(y, Repeated)]
    if any(type(y) is not type(x) or y.size != x.size or isinstance(y, Pixels) for y in maps):
        raise NotRepeatableError(f"{_name(func)} of maps of different kinds")
    result = func(*_bare(args), **kwargs)
    return Whole(x.run, result) if isinstance(x, Whole) else Repeated(x.run, x.size, result, low)


ELEMENTWISE = ("add", "batch_norm", "cat", "div", "dropout", "gelu", "relu", "relu_", "sigmoid", "silu")
OPERATIONS: Mapping[str, Callable[[Any, Any, Tensor, Any, Any], Repeated]] = {
    "conv2d": _convolution,
    "interpolate": _interpolation,
    "adaptive_avg_pool2d": _pooling,
    **dict.fromkeys(ELEMENTWISE, _elementwise),
}
"""By the names of torch's functions."""


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
