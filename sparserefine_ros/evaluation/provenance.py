"""Which code ran."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]


def commit(package: Path = PACKAGE) -> dict[str, Any] | None:
    """``sha`` of the checkout that ``package`` lies in and whether it was ``changed`` since; None where it is none.

    A package that is installed into a folder of another repository is not of that repository: git must know its file.
    """
    if shutil.which("git") is None:
        return None
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    sha, status = _git(package, "rev-parse", "HEAD"), _git(package, "status", "--porcelain", "--", ".")
    return None if sha is None else {"sha": sha, "changed": bool(status)}


def _git(folder: Path, *words: str) -> str | None:
    """Its output, None where it fails: no repository, one that belongs to somebody else, one without a commit."""
    command = ["git", "-C", str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    return done.stdout.strip() if done.returncode == 0 else None
