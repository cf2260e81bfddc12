"""The other end of a node under test: a ROS node in a context of its own, spun by whoever holds it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TypeVar

import rclpy
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions

Self = TypeVar("Self", bound="Peer")


class Peer:
    """Single-threaded: nothing is received but in `spin_until`. Leaving its `with` block takes it off the graph.

    ``environment`` must be set before the first participant of the process exists: it names the transport profile.
    """

    def __init__(self, name: str, domain_id: int, environment: Mapping[str, str]) -> None:
        os.environ.update(environment)
        self.context = Context()
        # no handler of ours: Ctrl-C stays Python's KeyboardInterrupt
        rclpy.init(context=self.context, domain_id=domain_id, signal_handler_options=SignalHandlerOptions.NO)
        self.node = Node(name, context=self.context, enable_rosout=False)
        self._executor = SingleThreadedExecutor(context=self.context)
        self._executor.add_node(self.node)

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executor.shutdown()
        self.node.destroy_node()
        self.context.try_shutdown()

    def spin_until(self, deadline: float, done: Callable[[], bool] = lambda: False) -> None:
        """Serves callbacks until ``done``, at the latest until ``deadline`` of `time.monotonic`."""
        while not done() and (remaining := deadline - time.monotonic()) > 0:
            self._executor.spin_once(timeout_sec=remaining)
