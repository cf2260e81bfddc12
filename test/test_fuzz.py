"""A few hundred hostile inputs for everything that reads what others wrote; scripts/fuzz.py tries many more."""

from __future__ import annotations

import resource

import pytest
from fuzz_targets import TARGETS
from hypothesis import HealthCheck, given, settings

EXAMPLES = {"message": 300, "compressed": 300, "wire": 200, "bundle": 150, "bag": 150}
SLOWEST_MS = 5000
MEMORY_KB = 800_000  # twice a decoded frame of the largest size


@pytest.mark.parametrize("name", TARGETS)
def test_only_our_errors_come_out(name: str) -> None:
    target = TARGETS[name]

    @settings(
        max_examples=EXAMPLES[name], deadline=SLOWEST_MS, derandomize=True, database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )  # fmt: skip
    @given(target.inputs)
    def attack(drawn: object) -> None:
        target.run(drawn)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    attack()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY_KB
