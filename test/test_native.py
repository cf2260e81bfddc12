"""C kernels are compiled once, say what is missing, and run in parallel without a trace of it."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pwd
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from compiler import needs_compiler

from sparserefine_ros import native
from sparserefine_ros.native import NativeError, load, parallel
from sparserefine_ros.networks.refiner import SparseRefiner
from sparserefine_ros.segmenter import head
from sparserefine_ros.segmenter.head import KERNEL, NativeHead, build_head
from sparserefine_ros.sparse.backends import cpu, pick_backend
from sparserefine_ros.sparse.backends.cpu import CONV, MAPS

pytestmark = needs_compiler
CPU = torch.device("cpu")
PACKAGE = Path(native.__file__).parents[1]
COUNT = """#include <stdint.h>
struct job { int64_t n; int64_t *seen; };
void mark(struct job *job, int64_t first, int64_t last) { for (int64_t i = first; i < last; i++) job->seen[i] += i; }
"""


class Job(ctypes.Structure):
    _fields_ = [("n", ctypes.c_int64), ("seen", ctypes.c_void_p)]


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, and nothing loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load.cache_clear()
    native._version.cache_clear()
    yield tmp_path / "cache" / "sparserefine_ros"
    load.cache_clear()
    native._version.cache_clear()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "mark.c").write_text(COUNT)
    return tmp_path / "mark.c"


def mark(library: ctypes.CDLL, n: int, chunk: int) -> torch.Tensor:
    seen = torch.zeros(max(n, 1), dtype=torch.int64)
    parallel(library, "mark", Job(n, seen.data_ptr()), n, chunk)
    return seen[:n]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("n", "chunk"), [(0, 4), (1, 4), (4, 4), (1001, 7), (100_000, 1000)])
@pytest.mark.parametrize("openmp", [True, False], ids=["openmp", "alone"])
def test_every_index_is_visited_once(
    source: Path, threads: int, n: int, chunk: int, openmp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not openmp:
        monkeypatch.setattr(native, "_team", lambda process: None)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        library = load(source)
        for _ in range(20):
            assert torch.equal(mark(library, n, chunk), torch.arange(n))
    finally:
        torch.set_num_threads(before)


def test_callers_at_the_same_time_do_not_mix(source: Path) -> None:
    library, results = load(source), []

    def call() -> None:
        results.extend(torch.equal(mark(library, 5000, 64), torch.arange(5000)) for _ in range(50))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 200


@pytest.mark.parametrize("changed", ["kernel", "header"])
def test_what_was_compiled_of_an_older_text_is_not_taken(
    changed: str, own_cache: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an upgrade: the cache outlives the package that filled it."""
    header = tmp_path / "vectors.h"
    header.write_text("#define START 0\n")
    source.write_text('#include "vectors.h"\n' + COUNT.replace("+= i;", "+= START + i;"))
    monkeypatch.setattr(native, "VECTORS", header)
    assert torch.equal(mark(load(source), 5, 2), torch.arange(5))
    edited, old, new = (source, "START + i", "7 + i") if changed == "kernel" else (header, "START 0", "START 7")
    edited.write_text(edited.read_text().replace(old, new))
    load.cache_clear()
    assert torch.equal(mark(load(source), 5, 2), torch.arange(7, 12))


WHO = """#define _GNU_SOURCE
#include <stdint.h>
#include <unistd.h>
struct job { int64_t n; int64_t *seen; };
void mark(struct job *job, int64_t first, int64_t last) {
    usleep(1000);
    for (int64_t i = first; i < last; i++) job->seen[i] = gettid();
}
"""


def test_the_threads_are_those_of_torch(source: Path) -> None:
    """None is started for it once torch has its own, and a torch with OpenMP shares them."""
    source.write_text(WHO)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        torch.ones(1 << 20).exp()
        there = {int(thread.name) for thread in Path("/proc/self/task").iterdir()}
        who = set(mark(load(source), 60, 1).tolist())
    finally:
        torch.set_num_threads(before)
    assert who <= there and threading.get_native_id() in who
    assert len(who) == (3 if torch.backends.openmp.is_available() else 1)


def _in_child(source: Path, queue: multiprocessing.Queue) -> None:
    queue.put(torch.equal(mark(load(source), 5000, 64), torch.arange(5000)))


@pytest.mark.skipif(sys.platform == "win32", reason="fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_waits_for_no_threads_of_its_parent(source: Path) -> None:
    mark(load(source), 5000, 64)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(source, queue))
    child.start()
    assert queue.get(timeout=20)
    child.join(20)
    assert child.exitcode == 0


def test_a_library_is_compiled_once_for_its_source(own_cache: Path, source: Path) -> None:
    load(source)
    (first,) = own_cache.iterdir()
    load.cache_clear()
    load(source)
    assert list(own_cache.iterdir()) == [first]
    source.write_text(COUNT + "int more;\n")
    load.cache_clear()
    load(source)
    assert len(list(own_cache.iterdir())) == 2


@pytest.mark.parametrize(
    ("machine", "flag"), [("x86_64", "-march=native"), ("aarch64", "-mcpu=native"), ("riscv64", None)]
)
def test_flags_are_those_of_the_architecture(
    machine: str, flag: str | None, own_cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def compiled(command: list[str], source: Path, library: Path) -> None:
        commands.append(command)
        raise NativeError("not here")

    monkeypatch.setattr(native, "_compile", compiled)
    monkeypatch.setattr(native.platform, "machine", lambda: machine)
    with pytest.raises(NativeError, match="not here"):
        load(source)
    assert [word for word in commands[0] if word.startswith("-m")] == ([flag] if flag else [])


CROSS = shutil.which("aarch64-linux-gnu-gcc")


@pytest.mark.skipif(CROSS is None, reason="no compiler for aarch64 (Debian: gcc-aarch64-linux-gnu)")
@pytest.mark.parametrize("kernel", sorted(PACKAGE.rglob("*.c")), ids=lambda path: path.name)
def test_kernels_compile_for_aarch64(kernel: Path, tmp_path: Path) -> None:
    assert CROSS is not None
    native._compile([CROSS, *native.FLAGS, "-mcpu=cortex-a78ae", "-Werror"], kernel, tmp_path / "kernel.so")
    assert (tmp_path / "kernel.so").read_bytes()[18:20] == b"\xb7\x00"  # ELF's number of AArch64


def test_without_a_compiler_torch_takes_over(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(own_cache))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(NativeError, match="no C compiler: cc, gcc or clang not found; install"):
        load(native.PARALLEL)
    assert pick_backend("auto", CPU).name == "torch"
    assert not isinstance(build_head(SparseRefiner(3, (4,)), CPU), NativeHead)
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    with pytest.raises(NativeError, match="no-such-compiler -m64 not found"):
        load(native.PARALLEL)


@pytest.mark.parametrize("lost", [native.PARALLEL, KERNEL, CONV, MAPS], ids=lambda path: path.name)
def test_without_any_one_kernel_torch_takes_over(lost: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk may be full after some of them: that shows before the first frame, not at it."""

    def some(source: Path) -> ctypes.CDLL:
        if source == lost:
            raise NativeError("no space left")
        return load(source)

    for module in (cpu, head):
        monkeypatch.setattr(module, "load", some)
    assert pick_backend("auto", CPU).name == ("cpu" if lost == KERNEL else "torch")
    assert isinstance(build_head(SparseRefiner(3, (4,)), CPU), NativeHead) == (lost in (CONV, MAPS))


def test_a_compiler_may_speak_another_encoding(own_cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = own_cache.parents[1] / "cc"
    compiler.write_bytes(b"#!/bin/sh\necho 'libert\xe9'\necho 'error: impossible \xe0 \xe9crire' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(NativeError, match="cannot compile mark.c: error: impossible"):
        load(source)


def test_a_compiler_that_cannot_be_run_is_named(own_cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = own_cache.parents[1] / "cc"
    compiler.write_bytes(b"\x7fELF of another machine")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(NativeError, match=f"{compiler} cannot be run: .*Exec format error.*; install gcc"):
        load(source)
    assert pick_backend("auto", CPU).name == "torch"


def test_source_that_does_not_compile_is_reported_and_leaves_nothing(own_cache: Path, source: Path) -> None:
    source.write_text("int broken = ;\n")
    with pytest.raises(NativeError, match="cannot compile mark.c: .*error"):
        load(source)
    assert list(own_cache.iterdir()) == []


def test_a_library_that_a_power_cut_left_short_is_made_anew(
    own_cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as cut:
        cut.setattr(native, "_compile", lambda command, source, library: library.write_bytes(b""))
        with pytest.raises(NativeError, match="cannot load"):
            load(source)
    synced: list[int] = []
    monkeypatch.setattr(native.os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size))
    library = load(source)
    (file,) = own_cache.iterdir()
    assert synced == [file.stat().st_size]  # before it had its name
    assert torch.equal(mark(library, 100, 7), torch.arange(100))


def test_a_damaged_library_is_named(own_cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_compile", lambda command, source, library: library.write_bytes(b"no library"))
    with pytest.raises(NativeError, match=f"cannot load {own_cache}/mark-.*remove that file"):
        load(source)


@pytest.mark.parametrize("why", ["a file", "no home"])
def test_a_cache_that_cannot_be_written_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    if why == "a file":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    else:  # as for a number of a user that /etc/passwd does not know
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr(pwd, "getpwuid", lambda number: {}[number])
    folder = native.cache_folder()
    assert folder.is_dir() and stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_cache_that_cannot_be_written_is_read(own_cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the image of a container brings it."""
    load(source), load(native.PARALLEL)
    load.cache_clear()
    access = os.access
    monkeypatch.setattr(native.os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    monkeypatch.delattr(native, "_compile")
    assert torch.equal(mark(load(source), 100, 7), torch.arange(100))
    assert native.cache_folder() != own_cache


def test_a_temporary_folder_goes_with_its_process(tmp_path: Path) -> None:
    """A service without a home starts again and again."""
    (tmp_path / "file").write_text("")
    code = "from sparserefine_ros import native; native.load(native.PARALLEL); print(native.cache_folder())"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "file"), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).parent == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_a_folder_to_write_torch_takes_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(**arguments: str) -> str:
        raise FileNotFoundError("No usable temporary directory found")

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(native.tempfile, "mkdtemp", none)
    monkeypatch.setattr(native, "_temporary_folder", native._temporary_folder.__wrapped__)
    load.cache_clear()
    try:
        with pytest.raises(NativeError, match="no folder for kernels: No usable .*; set XDG_CACHE_HOME"):
            load(native.PARALLEL)
        assert pick_backend("auto", CPU).name == "torch"
        assert not isinstance(build_head(SparseRefiner(3, (4,)), CPU), NativeHead)
    finally:
        load.cache_clear()
