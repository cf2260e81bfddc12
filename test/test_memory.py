"""Large buffers stay with the process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from sparserefine_ros.node.memory import keep_large_buffers
if sys.argv[1] == "kept":
    keep_large_buffers()
def frames(count):
    for _ in range(count):
        held = [np.ones(6 << 20, np.uint8) for _ in range(3)]
        del held
frames(3)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
frames(10)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str) -> int:
    run = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_buffers_used_again_cost_no_page_faults() -> None:
    assert page_faults("kept") < 100 < 1000 < page_faults("given back")
