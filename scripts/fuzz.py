#!/usr/bin/env python3
"""Hostile messages, bundles and bags for as long as asked: only the project's errors may come out, soon and in little
memory.

    .venv/bin/python scripts/fuzz.py                    # 120 s for each target
    .venv/bin/python scripts/fuzz.py --seconds 3600 bag --seed 1

Prints how many inputs were tried. Ends with status 1 and the smallest input that failed. An input that takes longer
than 10 s fails, as does one for which the process would need more than 8 GB of addresses beyond its start.
"""  # fmt: skip

from __future__ import annotations

import argparse
import resource
import signal
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "test")]

from fuzz_targets import TARGETS, Target  # noqa: E402
from hypothesis import HealthCheck, given, seed, settings  # noqa: E402

LONGEST_S = 10
MEMORY = 8 * 2**30
ROUND = 100  # inputs between two looks at the clock


def too_slow(*_: object) -> None:
    raise TimeoutError(f"took longer than {LONGEST_S} s")


def attack(target: Target, first_seed: int, seconds: float) -> tuple[int, float]:
    """Tries new inputs for ``seconds``: how many, and the longest time that one took."""
    tried, longest, number = 0, 0.0, first_seed
    end = time.monotonic() + seconds

    def once(drawn: object) -> None:
        nonlocal tried, longest
        start = time.monotonic()
        signal.alarm(LONGEST_S)
        try:
            target.run(drawn)
        finally:
            signal.alarm(0)
        tried += 1
        longest = max(longest, time.monotonic() - start)

    while time.monotonic() < end:
        checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
        options = settings(max_examples=ROUND, deadline=None, database=None, suppress_health_check=checks)
        seed(number)(options(given(target.inputs)(once)))()
        number += 1
    return tried, longest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)} (default: all)")
    parser.add_argument("--seconds", type=float, default=120.0, help="for each target (default: 120)")
    parser.add_argument("--seed", type=int, default=0, help="first seed; another one tries other inputs (default: 0)")
    args = parser.parse_args()
    if unknown := set(args.targets) - set(TARGETS):
        parser.error(f"unknown target {unknown.pop()!r}; choose from {', '.join(TARGETS)}")
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, too_slow)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    for name in args.targets or TARGETS:
        tried, longest = attack(TARGETS[name], args.seed, args.seconds)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000
        print(f"{name}: {tried} inputs, slowest {longest * 1e3:.0f} ms, peak memory so far {peak} MB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
