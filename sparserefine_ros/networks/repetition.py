"""Sparse repetition: the dense segmenter's own layers once more, at native resolution, at the selected sites alone.

SparseRefine trains a second network for the pixels that low resolution leaves uncertain. The segmenter can be that
network itself. It runs at low resolution first, and what its layers gave is kept. Then the same layers run at native
resolution, each at those sites of its grid under which a selected pixel lies; where a kernel reaches beyond them, or a
site attends to all places, it reads what the same layer gave at low resolution, enlarged. With all pixels selected that
is the segmenter at native resolution, exactly; with few, it costs their share of it. Ours; its relatives skip blocks
(Ren et al., 2018, "SBNet") or what has not changed since the last frame (Parger et al., 2022, "DeltaCNN").

Nothing of a network is written anew for it. Its ``forward`` is called with objects in the place of tensors, which
torch hands every operation to (``__torch_function__``): `Recorded` computes it and keeps the result
(`repetition_recording`), `Repeated` computes it at its sites. Both see the same operations in the same order.

Shape shorthand: B images, C channels, h, w the native size of a grid, N its active sites, M sites beyond them that an
operation reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparserefine_ros.networks.repetition_axes import HEADS, MAP, sizes
from sparserefine_ros.networks.repetition_recording import (
    Kept,
    Map,
    NotRepeatableError,
    bare,
    is_part,
    name_of,
    operands,
)
from sparserefine_ros.networks.repetition_tables import Corners, Engine, Form, Grid, Rows, Size, lies_under

POINTWISE = Form((1, 1), 1, (0, 0), 1)


class Repetition:
    """One pass at native resolution: its grids, the tables of its operations, and what low resolution gave.

    selected, kept, engine: as `repeat` takes them.
    """

    def __init__(self, selected: Grid, kept: Sequence[Kept], engine: Engine) -> None:
        self.selected, self.kept, self.engine, self.operations = selected, kept, engine, 0
        self.known: dict[Any, Any] = {}
        self.read: set[int] = set()  # numbers of the operations whose results at low resolution stood in

    def of(self, network: Callable[[Any], Any], colours: Callable[[Tensor], Tensor]) -> Tensor:
        """As `repeat`."""
        result = network(Pixels(self, colours))
        if not isinstance(result, Repeated) or result.size != self.selected.size:
            raise NotRepeatableError("logits of another size than the images")
        return result.tensor

    def low(self, number: int) -> Tensor:
        """[B, C, h, w]: what the operation of that number gave at low resolution."""
        self.read.add(number)
        return self.kept[number].map()

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """``make()``, kept under ``key`` for the operations that need it again."""
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]

    def grid(self, size: Size) -> Grid:
        """A site is active where a selected pixel lies under it."""

        def make() -> Grid:
            return Grid(lies_under(self.selected.active, size))

        grid: Grid = self.selected if size == self.selected.size else self.once(size, make)
        return grid


class Repeated(Map):
    """A map at native resolution: its values at the active sites of a grid, ``tensor`` [N, C] whatever its axes.

    number: of the operation that gave it; what the same gave at low resolution stands in for the other sites.
    """

    number: int

    def __init__(self, run: Repetition, size: Size, rows: Tensor, number: int | None = None) -> None:
        self.run, self.size, self.tensor = run, size, rows
        if number is not None:
            self.number, self.axes, self.heads = number, run.kept[number].axes, run.kept[number].heads

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first, *others = (x for x in operands(args) if isinstance(x, Repeated))
        operation, run = OPERATIONS.get(name_of(func)), first.run
        if operation is None:
            raise NotRepeatableError(f"{name_of(func)} is not known at single sites")
        if any(type(other) is not type(first) for other in others):
            raise NotRepeatableError(f"{name_of(func)} of maps of different kinds")
        run.operations += not is_part(func, first, run.operations)
        if run.operations > len(run.kept):
            raise NotRepeatableError("it has more operations than the dense segmenter")
        if isinstance(first, Whole) and operation is not _interpolation:
            answer: Repeated = Whole(run, func(*bare(args), **(kwargs or {})))
        else:
            answer = operation(func, first, run.operations - 1, args, kwargs or {})
        answer.convolved = run.operations * (name_of(func) == "conv2d")
        return answer

    @property
    def shape(self) -> torch.Size:
        images, channels = len(self.run.selected.active), self.tensor.shape[1]
        return torch.Size(sizes(self.axes, images, channels, self.size, self.heads))

    @property
    def grid(self) -> Grid:
        return self.run.grid(self.size)

    def read(self, found: Rows, key: Any) -> Tensor:
        """[N + M, C]: the rows that are ``found`` by the operation of ``key``."""
        low = self.run.low(self.number)
        if len(found.beyond) == 0:
            return self.tensor
        size = (low.shape[2], low.shape[3])
        corners = self.run.once((key, size), lambda: self.run.engine.corners(found.beyond, self.size, size, low.dtype))
        return torch.cat([self.tensor, corners.blend(_as_rows(low)).to(self.tensor.dtype)])

    def whole(self) -> Tensor:
        """[B, C, h, w], channels last in memory: everywhere, its sites among what low resolution gave."""
        low = self.run.low(self.number).to(self.tensor.dtype)
        rows = _as_rows(F.interpolate(low, self.size, mode="bilinear", align_corners=False))
        rows = rows.index_copy(0, self.grid.sites.flat, self.tensor)
        return rows.view(len(low), *self.size, -1).permute(0, 3, 1, 2)

    def _rearranged(self, axes: str, heads: int, how: Callable[[Tensor], Tensor]) -> Any:
        return super()._rearranged(axes, heads, lambda rows: rows)


class Pixels(Repeated):
    """The images, which are known everywhere: no site is active, and beyond lie the colours themselves.

    colours: normalised rows [M, 3] at flat positions [M] of [B, H, W].
    """

    def __init__(self, run: Repetition, colours: Callable[[Tensor], Tensor]) -> None:
        active = run.selected.active
        nothing = torch.empty(0, 3, device=active.device)
        super().__init__(run, run.selected.size, nothing)
        self.colours, self.empty = colours, Grid(torch.zeros_like(active))

    @property
    def grid(self) -> Grid:
        return self.empty

    def read(self, found: Rows, key: Any) -> Tensor:
        return self.colours(found.beyond.flat)


class Whole(Repeated):
    """A small map that is known everywhere, as after pooling: ``tensor`` [B, C, h, w]."""

    def __init__(self, run: Repetition, tensor: Tensor) -> None:
        super().__init__(run, (tensor.shape[2], tensor.shape[3]), tensor)

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    def _rearranged(self, axes: str, heads: int, how: Callable[[Tensor], Tensor]) -> Any:
        raise NotRepeatableError(f"a pooled map, its axes {axes}")


def repeat(
    network: Callable[[Any], Any],
    selected: Grid,
    colours: Callable[[Tensor], Tensor],
    kept: Sequence[Kept],
    engine: Engine | None = None,
) -> Tensor:
    """Logits [N, K] of ``network`` at the N active pixels of ``selected``, in the order of memory.

    network: normalised images [B, 3, H, W] to logits [B, K, H, W]; batch normalisation in evaluation mode.
    colours: normalised rows [M, 3] of the images at flat positions [M] int64.
    kept: of `record` of the same network, or of one with the same operations, on the images at low resolution.
    engine: None for torch's convolutions, which are differentiable.
    Raises NotRepeatableError for an operation that is none of OPERATIONS, or not in the form that is known.
    """
    return Repetition(selected, kept, engine or Engine()).of(network, colours)


def _convolution(func: Any, x: Repeated, number: int, args: Any, kwargs: Any) -> Repeated:
    known = {"weight": None, "bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    weight, bias, stride, padding, dilation, groups = _arguments(args, kwargs, known)
    by_channel = groups == len(weight) == x.shape[1]
    if groups != 1 and not by_channel:
        what = f"{weight.shape[2]}x{weight.shape[3]} in {groups} groups"
        raise NotRepeatableError(f"a convolution of {what} is not known at single sites")
    run = x.run
    form = Form((weight.shape[2], weight.shape[3]), _side(stride), _pair(padding), _side(dilation))
    if form == POINTWISE and not isinstance(x, Pixels) and not by_channel:
        return Repeated(run, x.size, F.linear(x.tensor.to(weight.dtype), weight[:, :, 0, 0], bias), number)
    grid, key = run.grid(form.output(x.size)), (type(x), x.size, form)
    found, table = run.once(key, lambda: run.engine.under(x.grid, grid, form))
    rows = x.read(found, key).to(weight.dtype)
    if by_channel:
        return Repeated(run, grid.size, run.engine.conv_by_channel(rows, weight, bias, table), number)
    if form.kernel != (3, 3):
        return Repeated(run, grid.size, run.engine.conv_any(rows, weight, bias, table), number)
    kernel_map = run.once((*key, "map"), lambda: run.engine.kernel_map(x.grid, found, table, form))
    return Repeated(run, grid.size, run.engine.conv(rows, weight, bias, kernel_map), number)


def _interpolation(func: Any, x: Repeated, number: int, args: Any, kwargs: Any) -> Repeated:
    known = {"size": None, "scale_factor": None, "mode": "nearest", "align_corners": None}
    size, factor, mode, corners = _arguments(args, kwargs, known)
    if mode != "bilinear" or corners or size is None or factor is not None:
        raise NotRepeatableError(f"interpolate with mode {mode!r}, align_corners {corners} and scale_factor {factor}")
    run, size = x.run, (int(size[0]), int(size[1]))
    grid, key = run.grid(size), (type(x), x.size, "to", size)
    corners = run.once((*key, "corners"), lambda: run.engine.corners(grid.sites, size, x.size, x.tensor.dtype))
    if isinstance(x, Whole):
        return Repeated(run, size, corners.blend(_as_rows(x.tensor)), number)

    def make() -> tuple[Rows, Corners]:
        read = torch.zeros_like(x.grid.active)
        corners.mark(read.view(-1))
        found = Rows.of(x.grid, read, 0)
        return found, corners.through(found.number)

    found, rows = run.once(key, make)
    return Repeated(run, size, rows.blend(x.read(found, key)), number)


def _pooling(func: Any, x: Repeated, number: int, args: Any, kwargs: Any) -> Repeated:
    return Whole(x.run, func(x.whole(), *args[1:], **kwargs))


def _over_all_places(func: Any, x: Repeated, number: int, args: Any, kwargs: Any) -> Repeated:
    """Of one map, whose values depend on all of it."""
    whole = func(x.whole(), *bare(args[1:]), **kwargs)
    return Repeated(x.run, x.size, x.grid.sites.gather(whole), number)


def _over_channels(func: Any, x: Repeated, number: int, args: Any, kwargs: Any) -> Repeated:
    """Of one map, place by place."""
    if x.axes[-1] != "c":
        raise NotRepeatableError(f"{name_of(func)} of a map, its axes {x.axes}")
    return Repeated(x.run, x.size, func(x.tensor, *args[1:], **kwargs), number)


def _elementwise(func: Any, x: Repeated, number: int, args: Any, kwargs: Any) -> Repeated:
    """Of one map, or several of one grid; channels are axis 1 of rows as well."""
    maps = [y for y in operands(args) if isinstance(y, Repeated)]
    if any(y.size != x.size or y.axes != x.axes or isinstance(y, Pixels) for y in maps):
        raise NotRepeatableError(f"{name_of(func)} of maps of different kinds")
    return Repeated(x.run, x.size, func(*bare(args), **kwargs), number)


def _by_axis_1(func: Any, x: Repeated, number: int, args: Any, kwargs: Any) -> Repeated:
    if x.axes != MAP or name_of(func) == "cat" and _arguments(args, kwargs, {"dim": 0}) != [1]:
        raise NotRepeatableError(f"{name_of(func)} of maps, their axes {x.axes}, but by channels")
    return _elementwise(func, x, number, args, kwargs)


def _arithmetic(func: Any, x: Repeated, number: int, args: Any, kwargs: Any) -> Repeated:
    """Of maps, numbers, and parameters that have a value a channel."""
    return _elementwise(func, x, number, [y if isinstance(y, Map) else _by_channel(y, x) for y in args], kwargs)


def _by_channel(value: Any, x: Repeated) -> Any:
    """What is computed with rows where ``value`` is computed with ``x``."""
    if not isinstance(value, Tensor) or value.numel() == 1:
        return value
    long = [axis for axis, side in zip(reversed(x.axes), reversed(value.shape), strict=False) if side != 1]
    if value.dim() > x.dim() or long != ["c"]:
        raise NotRepeatableError(f"{tuple(value.shape)} with a map, its axes {x.axes}")
    return value.reshape(-1)


def _attention(func: Any, x: Repeated, number: int, args: Any, kwargs: Any) -> Repeated:
    """Every site's query asks all places: keys and values are wanted everywhere, in maps that networks keep small."""
    known = {"key": None, "value": None, "attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None}
    key, value, mask, dropout, causal, scale = _arguments(args, kwargs, known)
    if mask is not None or causal or any(y.axes != HEADS for y in (x, key, value)):
        raise NotRepeatableError(f"attention with a mask or an order, or of maps whose axes are {x.axes}")
    run, heads = x.run, (x.heads, -1)
    keys, values = (y.whole().flatten(2).transpose(1, 2).unflatten(2, heads).transpose(1, 2) for y in (key, value))
    counts = run.once((x.size, "counts"), lambda: x.grid.sites.sites[:, 0].bincount(minlength=len(keys)).tolist())
    answers = []
    for image, rows in enumerate(x.tensor.split(counts)):
        queries = rows.unflatten(1, heads).transpose(0, 1)[None]  # [1, heads, n, d]
        one = slice(image, image + 1)
        answer = func(queries, keys[one], values[one], dropout_p=dropout, scale=scale)
        answers.append(answer[0].transpose(0, 1).flatten(1))
    return Repeated(run, x.size, torch.cat(answers), number)


OPERATIONS: Mapping[str, Callable[[Any, Any, int, Any, Any], Repeated]] = {
    "conv2d": _convolution,
    "interpolate": _interpolation,
    "adaptive_avg_pool2d": _pooling,
    **dict.fromkeys(("group_norm", "hamburger"), _over_all_places),
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("linear", "layer_norm"), _over_channels),
    **dict.fromkeys(("add", "div", "mul"), _arithmetic),
    **dict.fromkeys(("batch_norm", "cat"), _by_axis_1),
    **dict.fromkeys(("dropout", "gelu", "relu", "relu_", "sigmoid", "silu"), _elementwise),
}
"""By the names of torch's functions."""


def _as_rows(x: Tensor) -> Tensor:
    """[B, C, h, w] as [B h w, C]; no copy where channels come last in memory."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _arguments(args: Any, kwargs: Any, known: Mapping[str, Any]) -> list[Any]:
    """Values of the ``known`` parameters of a function of torch, which follow its first; there with their defaults."""
    return list({**known, **dict(zip(known, args[1:], strict=False)), **kwargs}.values())[: len(known)]


def _side(value: Any) -> int:
    """The number that ``value`` is for both axes."""
    first, second = _pair(value)
    if first != second:
        raise NotRepeatableError(f"a convolution of stride or dilation {value}")
    return first


def _pair(value: Any) -> Size:
    """For rows and columns."""
    first, second = value if isinstance(value, list | tuple) and len(value) == 2 else (value, value)
    if not isinstance(first, int) or not isinstance(second, int):
        raise NotRepeatableError(f"a convolution of padding {value!r}")
    return first, second
