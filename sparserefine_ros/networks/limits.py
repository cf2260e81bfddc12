"""Networks are built from what a bundle's ``model.yaml`` says; here is what keeps that within its weights.

A width of a million would take all memory, a depth of a million all time, before anything could be compared with the
weights. Torch tells of each parameter as it is registered, which is before it is filled.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as hooks

SPARE_VALUES = 2**24
"""Values that a network may hold beyond its weights: index tables, parts that are built and put aside."""
SPARE_PARTS = 10_000
"""Modules, parameters and buffers that it may have beyond 20 a weight."""
MAX_NUMBER = 2**16
"""Largest number among the arguments of a network."""


def check_arguments(args: Mapping[str, Any]) -> None:
    """ValueError where ``args`` hold a number, or a list of a length, that no network here has a use for."""
    todo: list[Any] = [dict(args)]
    while todo:
        value = todo.pop()
        if isinstance(value, dict | list):
            if len(value) > 1000:
                raise ValueError(f"{len(value)} values in one list of arguments; expected at most 1000")
            todo += value.values() if isinstance(value, dict) else value
        elif isinstance(value, int | float) and not -MAX_NUMBER <= value <= MAX_NUMBER:  # NaN fails too
            raise ValueError(f"argument {value}; expected a number from {-MAX_NUMBER} to {MAX_NUMBER}")


def check_whole(first: int = 1, last: int = MAX_NUMBER, **numbers: Any) -> None:
    """ValueError where one of ``numbers`` is no whole number from ``first`` to ``last``."""
    for name, given in numbers.items():
        if type(given) is not int or not first <= given <= last:
            raise ValueError(f"{name} is {given!r:.80}; give a whole number from {first} to {last}")


def check_list(count: int, **lists: Any) -> None:
    """ValueError unless each of ``lists`` is a list of so many whole numbers from 1."""
    for name, given in lists.items():
        if not isinstance(given, list | tuple) or [type(n) is int and n >= 1 for n in given] != [True] * count:
            raise ValueError(f"{name} is {given!r:.80}; give a list of {count} whole numbers from 1")


def check_flags(**flags: Any) -> None:
    """ValueError where one of ``flags`` is neither true nor false."""
    for name, given in flags.items():
        if not isinstance(given, bool):
            raise ValueError(f"{name} is {given!r:.80}; give true or false")


@contextmanager
def at_most(values: int, tensors: int) -> Iterator[None]:
    """ValueError as soon as this thread registers far more than ``values`` numbers in ``tensors`` parameters.

    Parameters that a constructor registers twice, and buffers that are not saved, stay within the spare.
    """
    thread = threading.get_ident()
    left = {"values": 4 * values + SPARE_VALUES, "parts": 20 * tensors + SPARE_PARTS}

    def count(module: nn.Module, name: str, part: Any) -> None:
        if threading.get_ident() != thread:
            return
        left["values"] -= part.numel() if isinstance(part, Tensor) else 0
        left["parts"] -= 1
        if min(left.values()) < 0:
            raise ValueError(f"its arguments ask for far more than the {values} values of its weights")

    handles = [
        hooks.register_module_parameter_registration_hook(count),
        hooks.register_module_buffer_registration_hook(count),
        hooks.register_module_module_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
