"""A file is there whole or not at all: a crash, a full disk or Ctrl-C leaves what was there before."""

from __future__ import annotations

import errno
import glob
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Gives a name beside ``file`` to write to; what is written there becomes ``file`` when the block ends well.

    Where ``file`` is a link, what it leads to is replaced. Devices, pipes, and files whose folder takes no others are
    written in place. An OSError names ``file``.
    """
    partial = _partial(file)
    try:
        if file.exists() and not os.access(file, os.W_OK):  # a rename would not ask
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        yield partial or file
        if partial:
            target = Path(os.path.realpath(file))
            if target.exists():
                partial.chmod(stat.S_IMODE(target.stat().st_mode))
            with partial.open("rb") as written:
                os.fsync(written.fileno())  # a name must not outlive a power cut that its content does not
            partial.replace(target)
    except OSError as error:
        if error.filename not in (None, str(partial)):  # of a file that was read
            raise
        raise OSError(error.errno, error.strerror or str(error), str(file)) from error
    finally:
        if partial:
            partial.unlink(missing_ok=True)


def write_whole(file: Path, content: bytes) -> None:
    """``content`` into ``file``, as `whole` does."""
    with whole(file) as partial:
        partial.write_bytes(content)


def sweep(file: Path, older_s: float = 3600.0) -> None:
    """Removes what processes that were killed while they wrote ``file`` have left beside it; of others nothing is so
    old."""
    for left in file.parent.glob(f".{glob.escape(file.stem[:100])}.????????.part{glob.escape(file.suffix)}"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > older_s:
                left.unlink()


def _partial(file: Path) -> Path | None:
    """A name in the folder of ``file`` that nobody else has, with its ending; None where it is written in place."""
    folder = os.path.realpath(file.parent)
    if folder == "/dev" or folder.startswith("/proc/"):  # /dev/stdout may lead to a file that somebody else has open
        return None
    target = Path(os.path.realpath(file))
    if target.exists() and not (target.is_file() and os.access(target.parent, os.W_OK | os.X_OK)):
        return None
    return target.with_name(f".{target.stem[:100]}.{os.urandom(4).hex()}.part{target.suffix}")
