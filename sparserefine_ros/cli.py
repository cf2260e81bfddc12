"""The `sparserefine` command: one sub-command a module of ``sparserefine_ros.commands``."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from sparserefine_ros import __version__
from sparserefine_ros.errors import SparseRefineError
from sparserefine_ros.memory import keep_every_buffer
from sparserefine_ros.untrusted import printable

COMMANDS = {
    "demo": "demo",
    "segment": "segment",
    "make-bag": "make_bag",
    "evaluate": "evaluate",
    "compare": "compare",
    "train": "train",
    "distill": "distill",
    "calibrate": "calibrate",
    "import": "import_",
    "rehash": "rehash",
    "export": "export",
    "bench": "bench",
    "study": "study",
}
"""Sub-command to module; a module holds HELP, add_arguments(parser) and run(args) -> exit status."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one sub-command; what ends it before its time becomes one line on standard error.

    Exit status 2 for a SparseRefineError or what the system says of a file, 130 for Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="sparserefine", description="Full-resolution semantic masks, sparsely refined."
    )
    parser.add_argument("--version", action="version", version=f"sparserefine {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module_name in COMMANDS.items():
        module = importlib.import_module(f"sparserefine_ros.commands.{module_name}")
        sub = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    keep_every_buffer()
    if isinstance(sys.stdout, io.TextIOWrapper):  # names and dashes that a terminal's encoding lacks end no command
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with unwinding():
            status = int(args.run(args))
        _flush()
        return status
    except SparseRefineError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"interrupted{f': {error}' if error.args else ''}", file=sys.stderr)
        return 130
    except OSError as error:  # a folder that cannot be written, a disk that is full
        with suppress(OSError):
            _flush()
        if isinstance(error, BrokenPipeError):  # the reader left: `sparserefine ... | head`
            return 0
        print(f"error: {error}", file=sys.stderr)
        return 2


def _flush() -> None:
    """OSError where standard output takes no more; what is left is dropped, lest an ending interpreter complain too."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(error.errno, error.strerror, "standard output") from error


@contextmanager
def unwinding() -> Iterator[None]:
    """SIGTERM ends the program as Ctrl-C does: child processes are ended, half a bag is removed, status 143."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
