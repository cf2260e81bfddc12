"""Entry point of the executable `segment`.

Exit codes: 0 after SIGINT or SIGTERM, 2 when start-up fails, with one line that says why.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from sparserefine_ros.errors import SparseRefineError


class _Stop:
    """Notes SIGINT and SIGTERM instead of raising KeyboardInterrupt in the middle of something.

    rclpy calls this handler after its own, which ends `spin`. A terminal and `ros2 launch` both send SIGINT on
    Ctrl-C; the second must not break a clean exit under way.
    """

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, *_: object) -> None:
        self.requested = True


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
    try:
        rclpy.init(args=None if args is None else list(args))
        from sparserefine_ros.node.segment_node import SegmentNode

        node = SegmentNode()
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        while rclpy.ok() and not stop.requested:
            executor.spin_once()
    except ExternalShutdownException:
        pass
    except Exception as error:
        if stop.requested:  # rclpy fails in many ways where it is shut down during start-up
            return 0
        # A RuntimeError without a node is rclpy's: it cannot read its own arguments or the parameter file.
        if isinstance(error, SparseRefineError) or (node is None and isinstance(error, RuntimeError)):
            print(f"error: {error}", file=sys.stderr)
            return 2
        raise
    finally:
        if executor is not None:
            executor.shutdown()
        if node is not None:
            node.destroy_node()
        rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
