"""Serialized messages taken and published with one copy instead of two, where the middleware is Fast DDS.

rcl_take_serialized_message copies a message out of the middleware's history into a buffer of rmw_fastrtps's, and from
there into the caller's: 0.7 to 1.4 ms for each copy of 6 MB. rcl_take has the message's type read it in the history
itself. So the subscription gets a type of ours, the original in all but its deserializer, which copies the bytes
(single_copy.c). Likewise its serializer writes header and pixels into the history from where they lie. The C structs of
type supports begin alike from humble to kilted; where anything is not as expected, another middleware, other names, no
compiler, messages are copied twice.

rclpy itself must neither take nor publish a message of our types but in bytes: it takes nothing of a raw subscription
but bytes, and publishes no object but of the very class.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import byref, c_bool, c_char_p, c_int, c_size_t, c_void_p, py_object
from functools import cache
from pathlib import Path
from typing import Any

from rclpy.impl.implementation_singleton import rclpy_implementation

from sparserefine_ros.native import NativeError, load

MIDDLEWARE, TYPE_SUPPORT = "rmw_fastrtps_cpp", b"rosidl_typesupport_fastrtps_c"
STARTS = {  # by version of Fast CDR, its method that tells where a message starts; humble has 1
    "libfastcdr.so.2": "_ZN8eprosima7fastcdr3Cdr18get_buffer_pointerEv",
    "libfastcdr.so.1": "_ZN8eprosima7fastcdr3Cdr16getBufferPointerEv",
}
JUMP = "_ZN8eprosima7fastcdr3Cdr4jumpEm"


class _Message(ctypes.Structure):
    """struct message"""

    _fields_ = [("data", c_void_p), ("length", c_size_t), ("reallocate", c_void_p), ("state", c_void_p)]


class _Parts(ctypes.Structure):
    """struct parts"""

    _fields_ = [("head", c_char_p), ("body", c_void_p), ("head_length", c_size_t), ("body_length", c_size_t)]


class SingleCopy:
    """Message types of ours, and how their messages are taken and published.

    OSError, AttributeError or NativeError where something that is needed is not there.
    """

    def __init__(self) -> None:
        if (rmw := rclpy_implementation.rclpy_get_rmw_implementation_identifier()) != MIDDLEWARE:
            raise OSError(f"the middleware is {rmw}")
        version = next(filter(_is_loaded, STARTS), None)
        if version is None:
            raise OSError(f"none of {', '.join(STARTS)} is loaded")
        cdr, own = _loaded(version), load(Path(__file__).with_suffix(".c"))
        own.sr_use(ctypes.cast(cdr[STARTS[version]], c_void_p), ctypes.cast(cdr[JUMP], c_void_p))
        self._support = own.sr_single_copy
        self._support.argtypes, self._support.restype = [c_void_p, c_char_p, c_char_p, c_char_p, c_bool], c_void_p
        self._described = hasattr(_loaded("librosidl_runtime_c.so"), "rosidl_get_zero_initialized_type_hash")
        rcl = _loaded("librcl.so")
        self._take, self._publish = rcl.rcl_take, rcl.rcl_publish
        self._take.argtypes, self._publish.argtypes = [c_void_p] * 4, [c_void_p] * 3
        self._take.restype = self._publish.restype = c_int
        self._types: dict[type, type] = {}

    def message_type(self, kind: type) -> type:
        """``kind`` as `take` and `publish` need it; AttributeError where it is not as expected."""
        if kind not in self._types:
            self._types[kind] = self._with_ours(kind)
        return self._types[kind]

    def has(self, kind: type) -> bool:
        """Whether ``kind`` is one of ours."""
        return kind in self._types.values()

    def take(self, subscription: int, allocator: Any, info: Any) -> tuple[int, int | None, int]:
        """Takes a message of an rcl_subscription_t of our type: rcl's code, the message's address, its length in bytes.

        allocator: rcutils_allocator_t, which gives its memory. info: rmw_message_info_t, to be filled.
        """
        message = _Message(None, 0, allocator.reallocate, allocator.state)
        code = self._take(subscription, byref(message), info, None)
        return code, message.data, message.length

    def publish(self, publisher: int, head: bytes, body: int, body_length: int) -> int:
        """Publishes ``head``, without its encapsulation, and the bytes at address ``body`` from an rcl_publisher_t of
        our type; rcl's code."""
        parts = _Parts(head, body, len(head), body_length)
        code: int = self._publish(publisher, byref(parts), None)
        return code

    def _with_ours(self, kind: Any) -> type:
        if kind._TYPE_SUPPORT is None:  # not loaded yet
            type(kind).__import_type_support__()
        api = ctypes.PyDLL(None)
        name_of, pointer_of, new = api.PyCapsule_GetName, api.PyCapsule_GetPointer, api.PyCapsule_New
        name_of.argtypes, name_of.restype = [py_object], c_void_p
        pointer_of.argtypes, pointer_of.restype = [py_object, c_void_p], c_void_p
        new.argtypes, new.restype = [c_void_p, c_void_p, c_void_p], py_object
        name = name_of(kind._TYPE_SUPPORT)
        package = kind.__module__.split(".")[0]
        support = self._support(
            pointer_of(kind._TYPE_SUPPORT, name), TYPE_SUPPORT, f"{package}::msg".encode(), kind.__name__.encode(),
            self._described,
        )  # fmt: skip
        if not support:
            raise AttributeError(f"{kind.__name__} has no {TYPE_SUPPORT.decode()} as known here")
        meta = type(type(kind).__name__, (type(kind),), {"_TYPE_SUPPORT": new(support, name, None)})
        ours: type = meta(
            kind.__name__, (kind,), {"__slots__": (), "__module__": kind.__module__, "__init__": _no_object}
        )
        return ours


def _no_object(self: Any) -> None:
    raise TypeError("rclpy cannot publish such an object")


def _loaded(name: str) -> ctypes.CDLL:
    """A library of rclpy's; OSError where it has loaded none of that name."""
    return ctypes.CDLL(name, mode=os.RTLD_NOLOAD)


def _is_loaded(name: str) -> bool:
    try:
        _loaded(name)
    except OSError:
        return False
    return True


@cache
def single_copy() -> SingleCopy | None:
    """The one of this process; None where messages are copied twice."""
    try:
        return SingleCopy()
    except (OSError, AttributeError, NativeError):
        return None
