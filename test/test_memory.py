"""Large buffers stay with the process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from sparserefine_ros.memory import huge_pages_env

PROGRAM = """
import resource, sys
import numpy as np
from sparserefine_ros import memory
how, size = sys.argv[1], int(sys.argv[2]) << 20
if how != "given back":
    getattr(memory, how)()
def frames(count):
    for _ in range(count):
        held = [np.ones(size, np.uint8) for _ in range(3)]
        del held
frames(3)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
frames(10)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str, megabytes: int) -> int:
    command = [sys.executable, "-c", PROGRAM, how, str(megabytes)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_buffers_used_again_cost_no_page_faults() -> None:
    """Those of a camera, and maps of a whole network, of which the node gives back what a command keeps."""
    assert page_faults("keep_large_buffers", 6) < 100 < 1000 < page_faults("given back", 6)
    assert page_faults("keep_every_buffer", 100) < 100 < 1000 < page_faults("keep_large_buffers", 100)


def test_huge_pages_are_asked_for_unless_the_user_has_decided() -> None:
    assert huge_pages_env({}) == {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    assert huge_pages_env({"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}) == {
        "GLIBC_TUNABLES": "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"
    }
    assert huge_pages_env({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}) == {}


def test_malloc_takes_the_tunable() -> None:
    """Huge pages for who asks, as the kernel is set here, and none for who does not."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    version = tuple(map(int, platform.libc_ver()[1].split("."))) if platform.libc_ver()[0] == "glibc" else (0, 0)
    if version < (2, 35) or not setting.exists() or "[madvise]" not in setting.read_text():
        pytest.skip("needs glibc 2.35 and a kernel that gives huge pages to those who ask")
    program = (
        "held = bytearray(b'x') * (64 << 20)\n"
        "rollup = open('/proc/self/smaps_rollup').read()\n"
        "print(next(line.split()[1] for line in rollup.splitlines() if line.startswith('AnonHugePages')))"
    )
    huge = []
    for tunable in ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=1"):
        environment = {**os.environ, "GLIBC_TUNABLES": tunable}
        run = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        huge.append(int(run.stdout))
    assert huge[0] == 0 < huge[1], huge
