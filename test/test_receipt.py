"""Which stamps are believed, and what a frame's latency is."""

from __future__ import annotations

import pytest

from sparserefine_ros.node.receipt import received

NOW_NS = 1_700_000_000_000_000_000


@pytest.mark.parametrize(
    ("age_ms", "believed", "counted_ms"),
    [
        (12, True, 12),
        (4999, True, 4999),
        (0, True, 0),
        (-60, True, 0),  # a coarse /clock
        (-101, False, 0),  # the camera's clock is ahead
        (5001, False, 0),
        (3.2e11, False, 0),  # a bag of another year
    ],
)
def test_latency_counts_from_the_stamp_where_it_can(age_ms: float, believed: bool, counted_ms: float) -> None:
    receipt = received(b"frame", NOW_NS - round(age_ms * 1e6), NOW_NS, at=100.0)
    assert receipt.believed == believed and receipt.data == b"frame"
    assert receipt.latency_ms(100.030) == pytest.approx(counted_ms + 30, abs=1e-3)


@pytest.mark.parametrize("stamp", [None, 0])
def test_no_stamp_is_not_believed(stamp: int | None) -> None:
    receipt = received(b"", stamp, NOW_NS, at=1.0)
    assert not receipt.believed and receipt.latency_ms(1.5) == pytest.approx(500)
