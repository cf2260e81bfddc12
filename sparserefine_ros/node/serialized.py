"""Serialized messages taken and published without rclpy's copies, by librcl's own functions.

rclpy makes a `bytes` of every message taken and a string of every one published, a copy of the whole image each, and
holds the GIL while the middleware makes its own. Here a message stays in the memory that it is taken into, until
nobody holds it, and is published from where it lies, while Python goes on. What is called is C and the same from humble
to kilted (rcl/subscription.h, rcl/publisher.h, rcutils/types/uint8_array.h); where the libraries are not found, rclpy
does it.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.executors import Executor
from rclpy.impl.implementation_singleton import rclpy_implementation
from rclpy.node import Node
from rclpy.subscription import Subscription
from rclpy.waitable import NumberOfEntities, Waitable

from sparserefine_ros.node.single_copy import single_copy

INFO_BYTES = 256  # more than rmw_message_info_t has (rmw/types.h)
NUMBER_AT, PUBLISHER_AT, PUBLISHER_END = 16, 40, 56  # in it: the publisher's count of its messages, and its id
ENCAPSULATION = 4  # bytes that a serialized message begins with
UNNUMBERED = (0, (1 << 64) - 1)  # left alone, or RMW_MESSAGE_INFO_SEQUENCE_NUMBER_UNSUPPORTED
MAX_PUBLISHERS = 16  # of one topic that are remembered
NOTHING_TAKEN = 401  # RCL_RET_SUBSCRIPTION_TAKE_FAILED: another message of a burst was taken in its place
RCLError: type[Exception] = rclpy_implementation.RCLError
InvalidHandle: type[Exception] = rclpy_implementation.InvalidHandle

_Deallocate = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)


class _Allocator(ctypes.Structure):
    """rcutils_allocator_t"""

    _fields_ = [(name, ctypes.c_void_p) for name in ("allocate", "deallocate", "reallocate", "zero_allocate", "state")]


class _Array(ctypes.Structure):
    """rcutils_uint8_array_t, which is rcl_serialized_message_t"""

    _fields_ = [
        ("buffer", ctypes.c_void_p),
        ("length", ctypes.c_size_t),
        ("capacity", ctypes.c_size_t),
        ("allocator", _Allocator),
    ]


class _Rcl:
    """The functions; OSError or AttributeError where there are none."""

    def __init__(self) -> None:
        # Those that rclpy has loaded, or none: its handles mean nothing to another installation's.
        rcl, rcutils = (ctypes.CDLL(f"lib{name}.so", mode=os.RTLD_NOLOAD) for name in ("rcl", "rcutils"))
        array = ctypes.POINTER(_Array)
        self.take, self.publish = rcl.rcl_take_serialized_message, rcl.rcl_publish_serialized_message
        self.take.argtypes = [ctypes.c_void_p, array, ctypes.c_void_p, ctypes.c_void_p]
        self.publish.argtypes = [ctypes.c_void_p, array, ctypes.c_void_p]
        self.take.restype = self.publish.restype = ctypes.c_int
        self.forget_error = rcutils.rcutils_reset_error
        self.forget_error.restype = None
        self.has_error = rcutils.rcutils_error_is_set
        self.has_error.restype = ctypes.c_bool
        default = rcutils.rcutils_get_default_allocator
        default.restype = _Allocator
        self.allocator = default()
        self.free = _Deallocate(self.allocator.deallocate)

    def check(self, code: int, what: str, endpoint: Any) -> None:
        if code:
            self.forget_error()  # else the next failure complains that it overwrites this one
            raise RCLError(f"{what} {endpoint.topic_name}: rcl returns {code}")


def _library() -> _Rcl | None:
    try:
        return _Rcl()
    except (OSError, AttributeError):
        return None


RCL = _library()


def message_type(kind: type) -> type:
    """``kind`` for subscriptions of a `Feed` and for `publish_parts`: with a copy less, where that can be."""
    single = single_copy()
    if single is None:
        return kind
    try:
        return single.message_type(kind)
    except AttributeError:
        return kind


def for_executor(executor: Executor | None) -> _Rcl | None:
    """The functions, where that executor leaves taking to us. Kilted's EventsExecutor, which is no `Executor`, heeds no
    callback groups and fails at the second entity of one subscription."""
    return RCL if executor is None or isinstance(executor, Executor) else None


def publish_parts(publisher: Any, head: bytes, body: np.ndarray) -> None:
    """Publishes the serialized message that is ``head`` and then the bytes of ``body``, which is contiguous; RCLError
    where the middleware refuses it."""
    single = single_copy()
    if RCL is None or single is None or not single.has(publisher.msg_type):
        publish(publisher, b"".join((head, body.data)))
        return
    with publisher.handle:
        code = single.publish(publisher.handle.pointer, head[ENCAPSULATION:], body.ctypes.data, body.nbytes)
        RCL.check(code, "cannot publish on", publisher)


def publish(publisher: Any, message: bytes | bytearray) -> None:
    """Publishes a serialized message; RCLError where the middleware refuses it."""
    if RCL is None:
        publisher.publish(bytes(message))
        return
    data = np.frombuffer(message, np.uint8)
    array = _Array(data.ctypes.data, data.size, data.size, RCL.allocator)
    with publisher.handle:  # it is not destroyed meanwhile
        RCL.check(RCL.publish(publisher.handle.pointer, array, None), "cannot publish on", publisher)


class _Memory:
    """What was allocated for a message; freed with the last array that lies in it."""

    def __init__(self, address: int, length: int, free: Callable[[int, None], None]) -> None:
        self._address, self._free = address, free
        data = (address, True)  # read-only
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (length,), "data": data}

    def __del__(self) -> None:
        self._free(self._address, None)


class Missing:
    """How many messages are missing among those taken, by the numbers that their publishers give them.

    count: None where the middleware gives no numbers, or no message came yet.
    """

    def __init__(self) -> None:
        self.count: int | None = None
        self._last: dict[bytes, int] = {}  # by publisher; the one that was heard last stands last

    def taken(self, publisher: bytes, number: int) -> None:
        """Notes the next message."""
        if number in UNNUMBERED:
            return
        before = self._last.pop(publisher, number - 1)
        self._last[publisher] = number
        if len(self._last) > MAX_PUBLISHERS:
            del self._last[next(iter(self._last))]
        self.count = (self.count or 0) + max(0, number - before - 1)


def take(subscription: Any, rcl: _Rcl, missing: Missing) -> list[memoryview]:
    """The next message, read-only; none where there is none. RCLError where the middleware fails.

    Before it, or in its place, stands an empty one where the middleware has thrown away others that it could not read.
    The memory is rcl's, not numpy's: an allocator in Python may be interrupted by a signal's handler that raises, as
    Ctrl-C does, and C would then write to wherever its undefined result points.
    """
    info, unread = bytearray(INFO_BYTES), []
    into = (ctypes.c_char * INFO_BYTES).from_buffer(info)
    single = single_copy()
    with subscription.handle:
        if single and single.has(subscription.msg_type):
            rcl.forget_error()  # an earlier one
            code, address, length = single.take(subscription.handle.pointer, rcl.allocator, into)
            if rcl.has_error():
                unread = [memoryview(b"")]
                rcl.forget_error()
        else:
            array = _Array(None, 0, 0, rcl.allocator)
            code = rcl.take(subscription.handle.pointer, array, into, None)
            address, length = array.buffer, array.length
    memory = _Memory(address, length, rcl.free) if address else None
    if code == NOTHING_TAKEN:
        rcl.forget_error()
        return unread
    rcl.check(code, "cannot take a message from", subscription)
    number = int.from_bytes(info[NUMBER_AT : NUMBER_AT + 8], sys.byteorder)
    missing.taken(bytes(info[PUBLISHER_AT:PUBLISHER_END]), number)
    return [*unread, np.asarray(memory).data if memory is not None else memoryview(b"")]


class ByHand(ReentrantCallbackGroup):
    """Keeps executors from the subscription itself; its events they serve."""

    def can_execute(self, entity: Any) -> bool:
        return not isinstance(entity, Subscription)


class Feed(Waitable):  # type: ignore[type-arg]
    """Hands the messages of a subscription in group `ByHand` to ``callback``, from its node's executor."""

    def __init__(self, node: Node, subscription: Any, callback: Callable[[memoryview], None], rcl: _Rcl) -> None:
        super().__init__(node.default_callback_group)
        self.missing = Missing()
        self._node, self._subscription, self._callback, self._rcl = node, subscription, callback, rcl
        self._entered = False
        self._index: int | None = None
        node.add_waitable(self)

    def destroy(self) -> None:
        """Ends it; the subscription stays."""
        self._node.remove_waitable(self)

    def __enter__(self) -> None:
        self._entered = False
        self._subscription.handle.__enter__()  # InvalidHandle where it is destroyed
        self._entered = True

    def __exit__(self, *error: Any) -> None:
        self._subscription.handle.__exit__(*error)

    def get_num_entities(self) -> NumberOfEntities:
        return NumberOfEntities(1)

    def add_to_wait_set(self, wait_set: Any) -> None:
        # executors add even what they could not enter
        self._index = wait_set.add_subscription(self._subscription.handle) if self._entered else None

    def is_ready(self, wait_set: Any) -> bool:
        return self._index is not None and bool(wait_set.is_ready("subscription", self._index))

    def take_data(self) -> list[memoryview]:
        try:
            return take(self._subscription, self._rcl, self.missing)
        except InvalidHandle:  # destroyed since it was ready
            return []
        except RCLError as error:  # costs this message alone
            self._node.get_logger().warning(str(error), throttle_duration_sec=30.0)
            return []

    async def execute(self, messages: list[memoryview]) -> None:
        for message in messages:
            self._callback(message)
