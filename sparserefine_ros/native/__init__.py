"""Small C kernels, compiled on first use with the machine's own compiler and called through ctypes.

No torch headers, no build step: a kernel is one C file beside the Python that calls it, compiled in a second or two for
this very CPU and kept in the user's cache. Where there is no compiler, callers fall back to torch.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from sparserefine_ros.errors import SparseRefineError
from sparserefine_ros.whole_files import whole

FLAGS = ("-O3", "-std=gnu11", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC")
NATIVE = {
    **dict.fromkeys(("x86_64", "AMD64", "i686"), ("-march=native",)),
    **dict.fromkeys(("aarch64", "arm64"), ("-mcpu=native",)),
}
"""By architecture: all that this very CPU can do. The kernels are plain C with vectors; elsewhere they do without."""
PARALLEL = Path(__file__).with_name("parallel.c")
VECTORS = Path(__file__).with_name("vectors.h")  # which kernels may include


class NativeError(SparseRefineError):
    """A kernel cannot be compiled or loaded here; the text says why and what would help."""


@cache
def load(source: Path) -> ctypes.CDLL:
    """The library of one C file. Raises NativeError where it cannot be had.

    Compiled once for each source, compiler and CPU, and anew where what was kept cannot be loaded; the user's cache is
    read also where it cannot be written. Processes that compile at the same time do not disturb each other.
    """
    compiler = _compiler()
    command = [*compiler, *FLAGS, *NATIVE.get(platform.machine(), ())]
    text = [source.read_text(), VECTORS.read_text()]
    key = hashlib.sha256("\0".join([*text, *command, _version(tuple(compiler)), _cpu()]).encode())
    name = f"{source.stem}-{key.hexdigest()[:16]}.so"
    with suppress(OSError):  # none there, or damaged: a power cut, a full disk
        return ctypes.CDLL(str(users_cache() / name))
    try:
        library = cache_folder() / name
    except OSError as error:  # not even a temporary one, as in a container that is read-only
        raise NativeError(f"no folder for kernels: {error}; set XDG_CACHE_HOME to one that can be written") from error
    try:
        _compile(command, source, library)
    except OSError as error:
        raise NativeError(f"cannot write {library}: {error}; free space there, or set XDG_CACHE_HOME") from error
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise NativeError(f"cannot load {library}: {error}; remove that file and try again") from error


@cache
def load_if_possible(source: Path) -> ctypes.CDLL | None:
    """`load`, and what `parallel` needs; None where one cannot be had: torch then does the work, more slowly."""
    try:
        load(PARALLEL)
        return load(source)
    except NativeError:
        return None


def parallel(library: ctypes.CDLL, function: str, argument: ctypes.Structure, n: int, chunk: int) -> None:
    """Runs ``void function(argument *, int64_t first, int64_t last)`` over 0..n, on as many threads as torch uses."""
    load(PARALLEL).sr_parallel(
        _team(os.getpid()), ctypes.cast(getattr(library, function), ctypes.c_void_p), ctypes.byref(argument),
        ctypes.c_int64(n), ctypes.c_int64(chunk), ctypes.c_int64(torch.get_num_threads()),
    )  # fmt: skip


_IMPORTED_BY = os.getpid()


@cache
def _team(process: int) -> ctypes.c_void_p | None:
    """GOMP_parallel of the OpenMP that torch runs on; LLVM's and Intel's have it too.

    None where torch runs on something else, and in a child of fork: OpenMP would wait for its parent's threads there.
    """
    if process != _IMPORTED_BY:
        return None
    try:
        return ctypes.cast(ctypes.CDLL(torch._C.__file__).GOMP_parallel, ctypes.c_void_p)
    except (AttributeError, OSError):
        return None


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's data starts, or NULL."""
    return None if tensor is None else tensor.data_ptr()


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/sparserefine_ros, by default under ~/.cache; where that cannot be written, a temporary folder.

    The latter goes with the process. Raises OSError where not even that can be had.
    """
    try:
        folder = users_cache()
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return _temporary_folder()
    return folder if os.access(folder, os.W_OK) else _temporary_folder()


def users_cache() -> Path:
    """It may not be there, or be read-only. OSError for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "sparserefine_ros"
    except RuntimeError as error:
        raise FileNotFoundError(str(error)) from error


@cache
def _temporary_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="sparserefine_ros-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _compiler() -> list[str]:
    wanted = os.environ.get("CC", "").split()
    for candidate in [wanted] if wanted else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(candidate[0]):
            return candidate
    name = " ".join(wanted) or "cc, gcc or clang"
    raise NativeError(f"no C compiler: {name} not found; install gcc or clang (Debian: apt install gcc libc6-dev)")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Its output with what is not in our encoding replaced: a compiler speaks the language of its own locale."""
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:  # of another architecture, say
        raise NativeError(f"{command[0]} cannot be run: {error}; install gcc and libc6-dev, or set CC") from error


@cache
def _version(compiler: tuple[str, ...]) -> str:
    return _run([*compiler, "--version"]).stdout


@cache
def _cpu() -> str:
    """What -march=native depends on."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    kept = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in text.splitlines() if line.startswith(kept)}))


def _compile(command: list[str], source: Path, library: Path) -> None:
    with whole(library) as partial:
        done = _run([*command, "-o", str(partial), str(source), "-lm"])
        if done.returncode:
            said = done.stderr.splitlines()
            lines = [line for line in said if "error" in line or "No space left" in line] or said[-1:]
            reason = lines[0] if lines else f"exit status {done.returncode}"
            raise NativeError(f"{command[0]} cannot compile {source.name}: {reason}; install gcc and libc6-dev")
