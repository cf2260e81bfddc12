"""The segment node as a process of its own: started, watched, stopped as a user would with Ctrl-C. Imports no rclpy."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import sparserefine_ros
from sparserefine_ros.errors import SparseRefineError
from sparserefine_ros.memory import huge_pages_env
from sparserefine_ros.node.parameters import Value

STOP_TIMEOUT_S = 15.0
PARTICIPANTS = 32  # of a domain that are looked for; the first may have ended before the others


class NodeError(SparseRefineError):
    """The node's process ended, or did not, when it should not have, or should."""


class NodeProcess:
    """``python -m sparserefine_ros.node.main`` with parameters and remappings; stops with SIGINT when left.

    ``with NodeProcess({"decoder": "dense"}, {"image": "/camera/image_raw"}, env, log) as node:``. Its output goes to
    ``log``. Raises NodeError, with the last lines of its output, where it ends early or with another status than 0.
    """

    def __init__(
        self,
        parameters: Mapping[str, Value],
        remappings: Mapping[str, str],
        environment: Mapping[str, str],
        log: Path | None = None,
    ) -> None:
        self.command = [sys.executable, "-m", "sparserefine_ros.node.main", "--ros-args"]
        for name, value in parameters.items():
            self.command += ["-p", f"{name}:={_yaml(value)}"]
        for name, target in remappings.items():
            self.command += ["-r", f"{name}:={target}"]
        self._environment = dict(environment)
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self.exit_code: int | None = None

    def __enter__(self) -> NodeProcess:
        self._scratch = tempfile.TemporaryDirectory(prefix="sparserefine_node_")
        self.log = self._log or Path(self._scratch.name) / "node.log"
        environment = {**os.environ, **self._environment}
        environment |= huge_pages_env(environment)
        environment.setdefault("ROS_LOG_DIR", self._scratch.name)
        # the very package that runs here, installed or not
        package_root = str(Path(sparserefine_ros.__file__).resolve().parents[1])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package_root, environment.get("PYTHONPATH"))))
        with self.log.open("wb") as output, _interruptible():
            self._process = subprocess.Popen(
                self.command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal is ours; the node gets it from stop()
            )
        return self

    @property
    def pid(self) -> int:
        """Process id; only between start and stop."""
        assert self._process is not None
        return self._process.pid

    def check(self) -> None:
        """Raises NodeError if the node has ended by itself."""
        assert self._process is not None
        code = self._process.poll()
        if code is not None:
            self.exit_code = code
            raise NodeError(f"the node ended by itself with status {code}; it said:\n{self.tail()}")

    def tail(self, lines: int = 12) -> str:
        """The last lines of its output."""
        text = self.log.read_text(errors="replace").strip().splitlines()
        return "\n".join(text[-lines:]) or "(nothing)"

    def stop(self) -> int:
        """SIGINT, and its exit status; killed, with NodeError, where it has not ended after 15 s."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            self.exit_code = self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self.exit_code = self._process.wait()
            raise NodeError(
                f"the node did not end within {STOP_TIMEOUT_S:.0f} s of SIGINT and was killed; it said:\n{self.tail()}"
            ) from None
        return self.exit_code

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            code = self.stop()
            if code != 0 and kind is None:
                raise NodeError(f"the node ended with status {code} after SIGINT, not 0; it said:\n{self.tail()}")
        except NodeError:
            if kind is None:  # the first error says more
                raise
        finally:
            self._scratch.cleanup()


def _yaml(value: Value) -> str:
    """``value`` as ROS reads it on the command line; quoted, so that a model called "1" or "a: b" stays text."""
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return str(value).lower()


@contextmanager
def _interruptible() -> Iterator[None]:
    """A shell makes its background jobs ignore SIGINT, and children inherit that: the node must not."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def free_domain_id(first: int | None = None) -> int:
    """A ROS domain (1-101) that nobody on this machine uses, so that a replay meets no other node.

    The search begins at ``first``, by default at one derived from the process id. A domain is in use when the port of
    one of its participants is taken: 7400 + 250 * domain + 10 + 2 * participant (DDSI-RTPS 2.2, 9.6.1.1).
    """
    begin = first if first is not None else 1 + os.getpid() % 101
    for step in range(101):
        domain = 1 + (begin - 1 + step) % 101
        if all(_is_free(7410 + 250 * domain + 2 * participant) for participant in range(PARTICIPANTS)):
            return domain
    raise NodeError("all 101 ROS domains are in use on this machine; stop some nodes or give --domain-id")


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
