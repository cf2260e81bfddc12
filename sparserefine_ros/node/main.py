"""Entry point of the executable `segment`.

Exit codes: 0 after SIGINT or SIGTERM, 2 when start-up fails, with one line that says why. With the parameter autostart
false, a model that cannot be loaded is no failed start-up: the node waits to be configured again.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence

from sparserefine_ros.errors import SparseRefineError
from sparserefine_ros.memory import keep_large_buffers

QUIET_S = 5.0  # between two lines about the same failure
GRACE_S = 3.0
"""How long a model that is being loaded may hold up the end."""


LAST_RESORT_S = 8.0
"""How long anything at all may: a frame that takes minutes, a driver that hangs. 10 s after the first signal `ros2
launch` and `docker stop` send SIGKILL."""


ANSWER_S = 0.5
"""How long rclpy may take to answer a signal; it does not where the signal came before its handlers."""


HOPELESS_S = 30.0
"""How long callbacks may fail without one that does not; the diagnostics alone are one a second. rclpy's own raise for
some of what others send: a parameter of an unknown type, a /clock before 1970."""


class _Stop:
    """Notes SIGINT and SIGTERM instead of raising KeyboardInterrupt in the middle of something.

    rclpy calls this handler after its own, which ends `spin`. A terminal and `ros2 launch` both send SIGINT on
    Ctrl-C; the second must not break a clean exit under way.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self._told = threading.Event()
        threading.Thread(target=self._insist, name="stop", daemon=True).start()
        for number in self.SIGNALS:
            signal.signal(number, self._note)

    def _note(self, *_: object) -> None:
        if not self.requested:  # a second signal may come while the event's lock is held here
            self.requested = True
            self._told.set()

    def _insist(self) -> None:
        self._told.wait()
        time.sleep(LAST_RESORT_S)
        os.write(2, b"not ended %.0f s after the signal; ends now\n" % LAST_RESORT_S)
        os._exit(0)

    def final(self) -> None:
        """From here on no signal counts: an ending interpreter takes Python's handlers away."""
        for number in self.SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def _let_rclpy_answer(ok: Callable[[], bool]) -> None:
    """A thread of rclpy answers signals: it shuts contexts down and wakes executors, by a list that their end frees."""
    deadline = time.monotonic() + ANSWER_S
    while ok() and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.02)


def main(args: Sequence[str] | None = None) -> int:
    """Runs the node until it is told to stop. Takes the usual --ros-args."""
    stop = _Stop()
    try:
        import rclpy
        from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
    except ImportError as error:
        print(
            f"error: {error}; source a ROS 2 environment, or install the wheels: pip install 'sparserefine_ros[ros]'",
            file=sys.stderr,
        )
        return 2

    executor = node = None
    started = False
    try:
        keep_large_buffers()
        if stop.requested:  # before rclpy had its handlers: nothing would be shut down
            raise ExternalShutdownException
        rclpy.init(args=None if args is None else list(args))
        from sparserefine_ros.node.logs import Throttle
        from sparserefine_ros.node.segment_node import SegmentNode

        node = SegmentNode()
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        # The worker waits this long for the GIL where the executor's thread is busy, by default 5 ms.
        sys.setswitchinterval(0.0005)
        serve, logger, due, good = executor.spin_once, node.get_logger(), Throttle(QUIET_S), time.monotonic()

        def spin_once(timeout_sec: float | None = None) -> None:
            nonlocal good
            if stop.requested or not rclpy.ok():
                raise ExternalShutdownException
            try:
                serve(timeout_sec)
                good = time.monotonic()
            except ExternalShutdownException:
                raise
            except Exception as error:
                if time.monotonic() - good > HOPELESS_S or stop.requested or not rclpy.ok():
                    raise
                what = f"{type(error).__name__}: {error}"
                if due(what):
                    logger.error(f"a callback failed, the node goes on: {what}\n{traceback.format_exc()}")

        spin_once(0.0)
        if node.autostart:
            node.start(spin_once)
        started = True
        while True:
            spin_once()
    except ExternalShutdownException:
        pass
    except Exception as error:
        if stop.requested:  # rclpy fails in many ways where it is shut down during start-up
            return 0
        # A RuntimeError then is rclpy's, which cannot read its arguments or parameter file, or torch's, without memory.
        if isinstance(error, SparseRefineError) or (not started and isinstance(error, RuntimeError)):
            print(f"error: {error}", file=sys.stderr)
            return 2
        raise
    finally:
        if node is not None:
            node.priority.give_back()
        if stop.requested:
            _let_rclpy_answer(rclpy.ok)
        if executor is not None:
            executor.shutdown()
        if node is not None:
            node.destroy_node()
        rclpy.try_shutdown()
        stop.final()
        loader = node.loader if node is not None else None
        if loader is not None:
            loader.join(GRACE_S)
        if loader is not None and loader.is_alive():
            # Building an engine takes minutes and cannot be interrupted, and an interpreter that ends under such a
            # thread crashes. Files are written under other names until they are complete.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
