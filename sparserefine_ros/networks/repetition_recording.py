"""The pass at low resolution of sparse repetition: what every operation of a network gives is kept, in order.

A network's ``forward`` is called with an object in the place of a tensor, which torch hands every operation to
(``__torch_function__``). `Map` is what such objects have in common; the pass at native resolution, in `repetition`, has
its own. The batch normalisation of a convolution counts as a part of it, as one of the two networks may have it folded.

Shape shorthand: B images, C channels, h, w the size of a map.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparserefine_ros.networks.repetition_axes import MAP, as_map, reshaped
from sparserefine_ros.networks.repetition_tables import Size


class NotRepeatableError(ValueError):
    """A network does something that is not known at single sites; the text names it."""


class Map:
    """What a network may ask of a map beside torch's functions.

    axes, heads: the order of its axes, as `repetition_axes` writes it, and into how many heads channels are split.
    size: height and width, in whatever order the axes are.
    """

    tensor: Tensor
    size: Size
    axes = MAP
    heads = 1
    convolved = 0  # where a convolution gave it: how many operations there were then

    def __add__(self, other: Any) -> Any:
        return torch.add(self, other)  # type: ignore[call-overload]

    __radd__ = __add__

    def __mul__(self, other: Any) -> Any:
        return torch.mul(self, other)  # type: ignore[arg-type]

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return torch.div(self, other)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"'{name}' of a map is not known at single sites")

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    def dim(self) -> int:
        return len(self.axes)

    def contiguous(self) -> Any:
        return self._rearranged(self.axes, self.heads, lambda x: x.contiguous())

    def transpose(self, first: int, second: int) -> Any:
        order = list(range(self.dim()))
        order[first], order[second] = order[second], order[first]
        return self.permute(order)

    def movedim(self, source: int, destination: int) -> Any:
        order = [axis for axis in range(self.dim()) if axis != source % self.dim()]
        order.insert(destination % self.dim(), source % self.dim())
        return self.permute(order)

    def permute(self, *order: Any) -> Any:
        places = _numbers(order)
        return self._rearranged("".join(self.axes[axis] for axis in places), self.heads, lambda x: x.permute(places))

    def flatten(self, start: int = 0, end: int = -1) -> Any:
        shape, end = list(self.shape), end % self.dim()
        return self.reshape(*shape[:start], -1, *shape[end + 1 :])

    def reshape(self, *shape: Any) -> Any:
        sides, lengths = _numbers(shape), dict(zip(self.axes, self.shape, strict=True))
        channels = lengths["c"] if "c" in lengths else lengths["g"] * lengths["d"]
        found = reshaped(self.axes, sides, lengths["b"], channels, self.size)
        if found is None:
            raise NotRepeatableError(f"a map of {tuple(self.shape)} as one of {tuple(sides)}")
        return self._rearranged(*found, lambda x: x.reshape(sides))

    view = reshape

    def _rearranged(self, axes: str, heads: int, how: Callable[[Tensor], Tensor]) -> Any:
        result = copy.copy(self)
        result.axes, result.heads, result.tensor, result.convolved = axes, heads, how(self.tensor), 0
        return result


class Kept(NamedTuple):
    """What an operation gave at low resolution. axes, heads, size: as of `Map`."""

    axes: str
    heads: int
    size: Size
    tensor: Tensor | None  # None where nobody reads it

    def map(self) -> Tensor:
        """[B, C, h, w]"""
        assert self.tensor is not None
        return as_map(self.tensor, self.axes, self.size)


class Recorded(Map):
    """A map of the pass at low resolution; the result of every operation on it is kept in ``kept``.

    wanted: by their numbers, the operations whose results are read; None for all.
    """

    def __init__(
        self, tensor: Tensor, kept: list[Kept], wanted: Set[int] | None = None, like: Map | None = None
    ) -> None:
        self.tensor, self.kept, self.wanted = tensor, kept, wanted
        if like is not None:
            self.axes, self.heads = like.axes, like.heads
        self.size = (tensor.shape[2], tensor.shape[3]) if like is None or like.axes == MAP else like.size

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Recorded:
        first = next(x for x in operands(args) if isinstance(x, Recorded))
        result = func(*bare(args), **(kwargs or {}))
        if not isinstance(result, Tensor):
            raise NotRepeatableError(f"{name_of(func)} gives no single map")
        kept, wanted = first.kept, first.wanted
        if is_part(func, first, len(kept)):
            kept.pop()
        answer = Recorded(result, kept, wanted, first)
        is_read = wanted is None or len(kept) in wanted
        kept.append(Kept(answer.axes, answer.heads, answer.size, result if is_read else None))
        answer.convolved = len(kept) * (name_of(func) == "conv2d")
        return answer


def record(network: Callable[[Any], Any], images: Tensor, wanted: Set[int] | None = None) -> tuple[Tensor, list[Kept]]:
    """``network(images)``, and what every operation on the way gave, in order.

    wanted: what `Repetition.read` says after a pass of the same networks, on whatever images; of the others, results
        need not be remembered. They are most of the memory.
    """
    kept: list[Kept] = []
    result = network(Recorded(images, kept, wanted))
    return result.tensor, kept


def operands(args: Any) -> Iterator[Any]:
    """Arguments, and the items of lists among them."""
    for x in args:
        yield from x if isinstance(x, list | tuple) else (x,)


def bare(args: Any) -> list[Any]:
    return [[_tensor(y) for y in x] if isinstance(x, list | tuple) else _tensor(x) for x in args]


def _tensor(x: Any) -> Any:
    return x.tensor if isinstance(x, Map) else x


def is_part(func: Any, x: Map, operations: int) -> bool:
    """Whether ``func`` normalises what a convolution, the last operation, gave."""
    return name_of(func) == "batch_norm" and 0 < x.convolved == operations


def name_of(func: Any) -> str:
    return getattr(func, "__name__", type(func).__name__)


def _numbers(given: Any) -> list[int]:
    """What came one by one or as one sequence."""
    return list(given[0] if len(given) == 1 and isinstance(given[0], list | tuple) else given)
