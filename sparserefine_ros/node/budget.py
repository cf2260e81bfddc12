"""The latency budget as the node's parameters ask for it, and what the node says of it. Imports no ROS."""

from __future__ import annotations

import math
from collections.abc import Mapping

from sparserefine_ros.errors import ParameterError
from sparserefine_ros.node.model import number_or_none
from sparserefine_ros.node.parameters import Value
from sparserefine_ros.segmenter.latency_budget import LatencyBudget

BUDGET_PARAMETERS = ("latency_budget_ms", "budget_threshold_min", "budget_threshold_max")


def make_budget(values: Mapping[str, Value], threshold: float, classes: int) -> LatencyBudget | None:
    """The controller for these BUDGET_PARAMETERS, or None where there is no budget.

    threshold: the entropy threshold in force, nats, which is the lowest by default. The highest is by default halfway
    from the lowest to log(classes): above, hardly a pixel is left. Raises ParameterError for bounds that make no sense.
    """
    budget_ms = float(values["latency_budget_ms"])
    if budget_ms == 0:
        return None
    limit = math.log(classes)
    low, high = (number_or_none(values[name]) for name in BUDGET_PARAMETERS[1:])
    lowest = threshold if low is None else low
    highest = (lowest + limit) / 2 if high is None else high
    if highest > limit:
        raise ParameterError(
            f"budget_threshold_max is {highest:g}; with {classes} classes it must be at most {limit:.3f} nats, or auto"
        )
    return LatencyBudget(budget_ms, lowest, highest)


def budget_values(budget: LatencyBudget | None, refines: bool) -> dict[str, object]:
    """For the diagnostics; thresholds only of a model that ``refines``."""
    if budget is None:
        return {"latency_budget_ms": "off"}
    result: dict[str, object] = {"latency_budget_ms": f"{budget.budget_ms:g}"}
    if not refines:
        return result
    return result | {
        "budget_threshold": f"{budget.threshold:.6g}",
        "budget_threshold_min": f"{budget.lowest:.6g}",
        "budget_threshold_max": f"{budget.highest:.6g}",
    }


def unhelped(budget: LatencyBudget, age_ms: float) -> str:
    """Why a frame that was ``age_ms`` old in the end is late, where nothing is refined; empty where it is not."""
    if age_ms <= budget.budget_ms:
        return ""
    return (
        f"latency budget of {budget.budget_ms:g} ms: frames are {age_ms:.0f} ms old when they are segmented, and the "
        "model refines nothing that could be left out; raise latency_budget_ms, lower scale or choose a faster model"
    )


def unaffordable(budget: LatencyBudget, spent_ms: float) -> str:
    """Why a frame was left dense that was ``spent_ms`` old when refining could have begun."""
    if spent_ms >= budget.budget_ms:
        return (
            f"latency budget of {budget.budget_ms:g} ms: frames are {spent_ms:.0f} ms old before refinement begins, so "
            "they stay dense; the camera, the transport or the dense stage is too slow, or the budget too small"
        )
    return (
        f"latency budget of {budget.budget_ms:g} ms: even with entropy threshold {budget.highest:.3g} refining takes "
        f"longer than the {budget.budget_ms - spent_ms:.0f} ms that are left, so frames stay dense; raise "
        "latency_budget_ms or budget_threshold_max"
    )
