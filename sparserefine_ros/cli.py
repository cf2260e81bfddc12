"""The `sparserefine` command: one sub-command a module of ``sparserefine_ros.commands``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from sparserefine_ros import __version__
from sparserefine_ros.errors import SparseRefineError

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
    """Runs one sub-command; a SparseRefineError or OSError becomes one line on standard error and exit status 2."""
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
    try:
        return int(args.run(args))
    except SparseRefineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left: `sparserefine ... | head`
        return 0
    except OSError as error:  # a full disk, a folder that may not be written to; it names the file
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
