"""Results, written wherever people want them: what cannot be written is said before the work."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from sparserefine_ros.errors import ResultError
from sparserefine_ros.whole_files import write_whole


def check(file: Path) -> None:
    """Makes the folder of ``file``; ResultError where the file could not be written later.

    A replay takes as long as its bag: what is wrong with a name must be said before.
    """
    if file.is_dir():
        raise ResultError(f"cannot write {file}: it is a folder; give a file")
    if not file.exists():
        check_folder(file.parent)
    elif not os.access(file, os.W_OK):  # its folder need not be writable: /dev/stdout
        raise ResultError(f"cannot write {file}: it is write-protected; give a file you may write to")


def check_folder(folder: Path) -> None:
    """Makes ``folder``; ResultError where it cannot be made or nothing be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResultError(f"cannot make the folder {folder}: {error.strerror}; give another") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ResultError(f"cannot write into the folder {folder}; give one you may write to")


def write(file: Path, content: bytes) -> None:
    """Whole or not at all; folders are made. ResultError where it cannot be written, as on a full disk."""
    check(file)
    try:
        write_whole(file, content)
    except OSError as error:
        raise ResultError(f"cannot write {file}: {error.strerror}; make room for it, or give another") from error


def write_text(file: Path, text: str) -> None:
    """UTF-8; names of files that are no UTF-8 (surrogates to Python) are shown as \\udcff."""
    write(file, text.encode("utf-8", "backslashreplace"))


def write_figure(file: Path, figure: Any) -> None:
    """A matplotlib figure, in the format that the ending names."""
    content = io.BytesIO()
    figure.savefig(content, dpi=110, format=file.suffix[1:] or "png")
    write(file, content.getvalue())
