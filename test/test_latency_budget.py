"""The latency budget against simulated cameras and machines: it holds, stays in bounds, settles, recovers."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparserefine_ros.benchmarks.budget_simulation import (
    BUDGET_MS,
    HIGHEST,
    LOWEST,
    SCENES,
    Feedback,
    Fixed,
    Plant,
    Run,
    simulate,
)
from sparserefine_ros.errors import ParameterError
from sparserefine_ros.segmenter.latency_budget import PROBE_EVERY, WINDOW, CostModel, LatencyBudget

PIXELS = 1000


def ours() -> LatencyBudget:
    return LatencyBudget(BUDGET_MS, LOWEST, HIGHEST)


@cache
def run_of(controller: type, scene: str) -> Run:
    made = Fixed(LOWEST) if controller is Fixed else controller(BUDGET_MS, LOWEST, HIGHEST)
    return simulate(made, SCENES[scene])


def p95(run: Run, start: int = 0, end: int = 10**9) -> float:
    return float(np.quantile([ms for i, ms in zip(run.frame, run.latency, strict=True) if start <= i < end], 0.95))


@pytest.mark.parametrize("scene", [name for name in SCENES if not name.startswith("late")])
def test_the_p95_holds(scene: str) -> None:
    run, fixed = run_of(LatencyBudget, scene), run_of(Fixed, scene)
    assert p95(run) <= BUDGET_MS < 2 * BUDGET_MS < p95(fixed)
    assert (
        len(run.frame) >= 0.98 * SCENES[scene].frames
    )  # nearly no frame waits so long that a newer one takes its place


@pytest.mark.parametrize("scene", ["steady", "clutter steps", "clutter of every frame", "drift", "throttled"])
def test_more_is_refined_than_by_feedback_within_the_same_budget(scene: str) -> None:
    assert np.mean(run_of(LatencyBudget, scene).density) > 1.2 * np.mean(run_of(Feedback, scene).density)


def test_a_step_of_clutter_is_met_in_its_first_frame() -> None:
    """The entropy map of the frame itself tells; latencies of the past do not."""
    step = replace(SCENES["clutter steps"], noise=0.02, spike=0.0)

    def first_ms(run: Run) -> list[float]:
        return [ms for i, ms in zip(run.frame, run.latency, strict=True) if i % 300 == 150]

    assert max(first_ms(simulate(ours(), step))) <= BUDGET_MS
    assert max(first_ms(simulate(Feedback(BUDGET_MS, LOWEST, HIGHEST), step))) > 1.3 * BUDGET_MS


def test_with_time_to_spare_the_threshold_is_the_lowest() -> None:
    run = simulate(LatencyBudget(200.0, LOWEST, HIGHEST), Plant())
    assert set(run.threshold) == {LOWEST}


def test_it_settles() -> None:
    """In an unchanging scene the threshold finds its place and stays, and few frames need one of their own."""
    assert run_of(LatencyBudget, "steady").moves() <= 8
    settled = simulate(ours(), replace(SCENES["steady"], noise=0.0, spike=0.0))
    assert settled.moves() <= 2 and len(set(settled.held[100:])) == 1
    # Where time is the limit it is used: what fits is between the edges of the dead band.
    fitting = (BUDGET_MS - 3 - 8 - 2 - 2) / 60
    assert 0.75 * fitting < np.mean(settled.density[100:]) <= fitting


def test_a_camera_too_late_for_any_threshold_gets_dense_masks_and_recovers() -> None:
    budget = ours()
    states: list[bool] = []

    def watched(i: int) -> float:
        states.append(budget.dense)
        return SCENES["late camera for a while"].delay(i)

    run = simulate(budget, replace(SCENES["late camera for a while"], delay=watched))
    by_frame = dict(zip(run.frame, run.threshold, strict=True))
    late = [by_frame[i] for i in range(400 + WINDOW, 800) if i in by_frame]
    assert set(late) == {None} and any(states)
    assert not budget.dense
    after = [by_frame[i] for i in range(800 + WINDOW, 1200) if i in by_frame]
    assert after.count(None) < 0.02 * len(after)
    assert p95(run, 0, 400) <= BUDGET_MS and p95(run, 800 + WINDOW) <= BUDGET_MS


def test_it_notices_that_refining_has_become_cheap_again() -> None:
    """While dense nothing is learnt about the cost of refining: a probe in PROBE_EVERY frames does."""
    expensive = Plant(slope=lambda i: 9000.0 if 200 <= i < 500 else 60.0, clutter=lambda i: 0.5, noise=0.02, spike=0.0)
    run = simulate(ours(), expensive)
    by_frame = dict(zip(run.frame, run.threshold, strict=True))
    dense = [by_frame[i] for i in range(200 + 2 * WINDOW, 500) if i in by_frame]
    probes = len(dense) - dense.count(None)
    assert 1 <= probes <= len(dense) / PROBE_EVERY + 1
    after = [by_frame[i] for i in range(500 + PROBE_EVERY + 2 * WINDOW, 1200) if i in by_frame]
    assert None not in after
    assert p95(run) <= BUDGET_MS


def test_one_late_frame_is_itself_only() -> None:
    held_up = Plant(delay=lambda i: 300.0 if i == 600 else 3.0, noise=0.0, spike=0.0)
    run = simulate(ours(), held_up)
    by_frame = dict(zip(run.frame, run.threshold, strict=True))
    assert by_frame[600] is None
    assert [i for i, t in by_frame.items() if t is None] == [600]
    assert len(set(run.held[100:])) == 1


frames = st.lists(
    st.tuples(
        st.floats(0, 500), st.floats(0, 500), st.lists(st.floats(0, 3, width=32), min_size=1, max_size=30)
    ),
    min_size=1,
    max_size=120,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(frames, st.floats(1, 200), st.floats(0, 2), st.floats(0, 2))
def test_bounds_hold_whatever_comes(steps, budget_ms, one, other):
    budget = LatencyBudget(budget_ms, min(one, other), max(one, other))
    for spent, rest, entropy in steps:
        chosen = budget.choose(spent, np.asarray(entropy, np.float32), PIXELS)
        assert chosen is None or budget.lowest <= chosen <= budget.highest
        assert budget.lowest <= budget.threshold <= budget.highest
        assert chosen is None or spent < budget_ms  # a frame that is late already is not refined
        budget.observe(spent + rest)
        assert budget.cost.a >= 0 and budget.cost.b >= 0


def test_the_chosen_threshold_leaves_the_pixels_that_fit() -> None:
    """With a known cost the lowest threshold whose density fits, by counting."""
    budget = LatencyBudget(50.0, 0.1, 2.0)
    for _ in range(ENOUGH_FRAMES):  # 0.05 ms a pixel, exactly
        budget.cost.learn(100, 5.0)
    entropy = np.linspace(0, 2, 1001)
    chosen = budget.choose(30.0, entropy, PIXELS)
    assert chosen is not None
    # 20 ms are left: 400 of 1000 pixels
    assert (entropy > chosen).sum() <= 0.4 * 1001 < (entropy > chosen - 0.002).sum() + 1


ENOUGH_FRAMES = 20


def test_cost_model_finds_the_line_and_keeps_its_errors_free() -> None:
    rng = np.random.default_rng(0)
    model = CostModel()
    for _ in range(100):
        pixels = rng.uniform(1e4, 5e5)
        model.learn(pixels, 4 + 2e-5 * pixels + rng.normal(0, 0.2))
    assert model.a == pytest.approx(4, abs=0.4) and model.b == pytest.approx(2e-5, rel=0.05)
    assert model.margin(100.0) == pytest.approx(1.88 * 0.2, rel=0.5)  # 97th percentile of the normal distribution
    assert CostModel().margin(100.0) == pytest.approx(10.0)


def test_one_outlier_moves_the_model_little_and_two_are_believed() -> None:
    model = CostModel()
    for _ in range(30):
        model.learn(1000, 10.0)
    model.learn(1000, 500.0)
    assert model.predict(1000) < 12
    model.learn(1000, 500.0)
    assert model.predict(1000) > 50


@pytest.mark.parametrize(
    ("values", "words"),
    [((0.0, 0.1, 1.0), "0.0 ms.*above 0"), ((20.0, 1.0, 0.5), "1 to 0.5 nats"), ((20.0, -1.0, 0.5), "-1 to 0.5")],
)
def test_budgets_that_mean_nothing_are_refused(values: tuple[float, float, float], words: str) -> None:
    with pytest.raises(ParameterError, match=words):
        LatencyBudget(*values)
