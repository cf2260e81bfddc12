"""The latency budget on simulated frames, beside two controllers that are simpler.

A camera sends frames at a fixed rate, the newest waits in one slot, and a frame costs dense + a + b * density +
publish, each with noise. Clutter is the mean of the frame's entropies, which are exponential. `sparserefine bench
budget --simulate` prints the comparison; the tests hold the budget to its promises on the same plants.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from sparserefine_ros.segmenter.latency_budget import LatencyBudget

PIXELS = 1 << 21
SAMPLES = 2048


class Controller(Protocol):
    """What `LatencyBudget` offers."""

    threshold: float

    def choose(self, spent_ms: float, entropy: np.ndarray, pixels: int) -> float | None: ...

    def observe(self, total_ms: float) -> None: ...


@dataclass(frozen=True)
class Plant:
    """A camera and a machine; each function takes the frame's number. Times in ms."""

    clutter: Callable[[int], float] = lambda i: 0.3  # mean entropy, nats
    delay: Callable[[int], float] = lambda i: 3.0  # from stamp to arrival
    slope: Callable[[int], float] = lambda i: 60.0  # of refining every pixel
    intercept: float = 2.0
    dense: float = 8.0
    publish: float = 2.0
    noise: float = 0.08  # standard deviation of each cost, relative
    spike: float = 0.005  # probability that a frame is held up by 10 to 40 ms
    period: float = 33.3
    frames: int = 1200


SCENES: dict[str, Plant] = {
    "steady": Plant(),
    "clutter steps": Plant(clutter=lambda i: (0.12, 0.6)[i // 150 % 2]),
    "clutter of every frame": Plant(clutter=lambda i: 0.15 + 0.5 * (i * 0.6180339887 % 1)),
    "drift": Plant(slope=lambda i: 40 + 80 * i / 1200),
    "throttled": Plant(slope=lambda i: 160.0 if 400 <= i < 800 else 60.0),
    "too slow for a while": Plant(slope=lambda i: 900.0 if 400 <= i < 800 else 60.0),
    "late camera for a while": Plant(delay=lambda i: 60.0 if 400 <= i < 800 else 3.0),
}
BUDGET_MS, LOWEST, HIGHEST = 33.0, 0.3, 1.5


@dataclass
class Run:
    """One controller on one plant, frame by frame; frames that a newer one replaced are left out."""

    frame: list[int] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)
    threshold: list[float | None] = field(default_factory=list)
    density: list[float] = field(default_factory=list)
    held: list[float] = field(default_factory=list)  # the controller's own threshold, between frames

    def moves(self) -> int:
        """How often the controller's threshold moved; a frame that got one for itself does not count."""
        return sum(a != b for a, b in zip(self.held, self.held[1:], strict=False))


def simulate(controller: Controller, plant: Plant, seed: int = 0) -> Run:
    """Runs the plant; the queue is the node's: one slot, the newest frame wins."""
    rng = np.random.default_rng(seed)
    run, free, i = Run(), 0.0, 0

    def noisy(ms: float) -> float:
        return ms * float(np.exp(rng.normal(0, plant.noise)))

    def arrival(i: int) -> float:
        return i * plant.period + plant.delay(i)

    while i < plant.frames:
        while i + 1 < plant.frames and arrival(i + 1) <= free:
            i += 1  # replaced in the slot
        stamp, now = i * plant.period, max(free, arrival(i)) + noisy(plant.dense)
        if rng.random() < plant.spike:
            now += rng.uniform(10, 40)
        entropy = rng.exponential(plant.clutter(i), SAMPLES)
        threshold = controller.choose(now - stamp, entropy, PIXELS)
        density = 0.0 if threshold is None else float((entropy > threshold).mean())
        free = now + noisy(plant.publish)
        if density > 0:
            free += noisy(plant.intercept + plant.slope(i) * density)
        controller.observe(free - stamp)
        run.frame.append(i)
        run.latency.append(free - stamp)
        run.threshold.append(threshold)
        run.density.append(density)
        run.held.append(controller.threshold)
        i += 1
    return run


class Fixed:
    """No budget: one threshold for all frames."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def choose(self, spent_ms: float, entropy: np.ndarray, pixels: int) -> float | None:
        return self.threshold

    def observe(self, total_ms: float) -> None:
        pass


class Feedback:
    """Sees latencies only: moves the threshold when the p95 of the latest frames leaves a band below the budget."""

    WINDOW, BAND, GAIN = 20, 0.8, 0.5

    def __init__(self, budget_ms: float, lowest: float, highest: float) -> None:
        self.budget_ms, self.lowest, self.highest = budget_ms, lowest, highest
        self.threshold = lowest
        self.dense = False
        self._latencies: deque[float] = deque(maxlen=self.WINDOW)

    def choose(self, spent_ms: float, entropy: np.ndarray, pixels: int) -> float | None:
        return None if self.dense else self.threshold

    def observe(self, total_ms: float) -> None:
        self._latencies.append(total_ms)
        late = sum(ms > self.budget_ms for ms in self._latencies)
        if len(self._latencies) < self.WINDOW and late < 2:
            return
        ratio = float(np.quantile(self._latencies, 0.95)) / self.budget_ms
        if self.BAND <= ratio <= 1:
            return
        if ratio > 1 and self.threshold == self.highest:
            self.dense = True
        elif ratio < self.BAND and self.dense:
            self.dense = False
        else:
            step = self.GAIN * (ratio - (1 + self.BAND) / 2) * (self.highest - self.lowest)
            self.threshold = min(max(self.threshold + step, self.lowest), self.highest)
        self._latencies.clear()  # the old ones say nothing about the new threshold


class Memoryless(LatencyBudget):
    """The budget's cost model without its dead band: each frame gets the lowest threshold that fits."""

    def choose(self, spent_ms: float, entropy: np.ndarray, pixels: int) -> float | None:
        self.threshold, self.dense = self.lowest, False
        self._recent.clear()  # no median, no move
        chosen = super().choose(spent_ms, entropy, pixels)
        self.threshold = self.lowest if chosen is None else chosen
        return chosen


CONTROLLERS: dict[str, Callable[[], Controller]] = {
    "fixed threshold": lambda: Fixed(LOWEST),
    "feedback alone": lambda: Feedback(BUDGET_MS, LOWEST, HIGHEST),
    "feed-forward, no dead band": lambda: Memoryless(BUDGET_MS, LOWEST, HIGHEST),
    "feed-forward (ours)": lambda: LatencyBudget(BUDGET_MS, LOWEST, HIGHEST),
}


def compare(seeds: int = 5) -> dict[str, Any]:
    """Means over ``seeds`` runs of every controller on every scene."""
    rows = []
    for scene, plant in SCENES.items():
        for name, make in CONTROLLERS.items():
            runs = [simulate(make(), plant, seed) for seed in range(seeds)]
            rows.append(
                {
                    "scene": scene,
                    "controller": name,
                    "p95_ms": float(np.mean([np.quantile(r.latency, 0.95) for r in runs])),
                    "late": float(np.mean([np.mean(np.asarray(r.latency) > BUDGET_MS) for r in runs])),
                    "density": float(np.mean([np.mean(r.density) for r in runs])),
                    "masks": float(np.mean([len(r.frame) / plant.frames for r in runs])),
                    "moves": float(np.mean([r.moves() for r in runs])),
                }
            )
    return {"budget_ms": BUDGET_MS, "lowest": LOWEST, "highest": HIGHEST, "seeds": seeds, "rows": rows}


def markdown(result: dict[str, Any]) -> str:
    """The comparison as a table."""
    lines = [
        "| scene | controller | p95 ms | late | density | masks / frames | moves |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in result["rows"]:
        lines.append(
            f"| {r['scene']} | {r['controller']} | {r['p95_ms']:.1f} | {100 * r['late']:.1f} % | "
            f"{100 * r['density']:.1f} % | {100 * r['masks']:.0f} % | {r['moves']:.0f} |"
        )
    return "\n".join(lines)
