"""Holds the latency of frames below a budget by moving the entropy threshold.

The dense stage is done when the threshold is chosen, so the frame's own entropy map says how many pixels every
threshold would refine, and the clock says how much time is left. A cost model, learnt from the frames before (rest =
a + b * pixels), turns that time into pixels, and a quantile of the entropy turns pixels into a threshold: clutter is
met in the very frame that brings it. Feedback is one number: a high percentile of what the model has missed is kept
free, so the p95 holds whatever the noise. A controller that sees only past latencies is compared with this one by
`sparserefine bench budget --simulate`.

Pure logic: no ROS, no clock of its own. Times are milliseconds, thresholds nats.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from sparserefine_ros.errors import ParameterError

SLACK = 0.2  # dead band: the share of the fitting pixels that the threshold may leave unused before it is lowered
WINDOW = 21  # frames whose median moves the threshold; odd, so that the median is one of them
PROBE_EVERY = 60  # dense frames after which one is refined to learn whether that has become cheaper; below 5 %
MEMORY = 40  # refined frames that the cost model knows,
FORGET = 0.1  # each weighing this much less than the one after it
PERCENTILE = 0.97  # of the model's errors over these frames is kept free: some above 0.95, as costs drift
ENOUGH = 10  # frames that it must know; before,
FIRST_MARGIN = 0.1  # of the budget is kept free


class CostModel:
    """rest = a + b * pixels in ms, fitted to the latest frames, and how far it tends to be wrong.

    Weighted least squares; where all frames have about the same number of pixels, which leaves the slope open, it
    leans towards rest proportional to pixels.
    """

    LEAN = 0.01  # strength of that, in squares of the mean number of pixels

    def __init__(self) -> None:
        self._frames: deque[tuple[float, float, float]] = deque(maxlen=MEMORY)  # pixels, ms, ms without outliers
        self._surprised = False
        self.a = self.b = 0.0  # ms, ms per pixel; both at least 0

    def predict(self, pixels: float) -> float:
        """Expected ms of the rest of a frame that refines ``pixels``."""
        return self.a + self.b * pixels

    def margin(self, budget_ms: float) -> float:
        """ms to keep free: a high percentile of measured minus expected."""
        if len(self._frames) < ENOUGH:
            return FIRST_MARGIN * budget_ms
        pixels, rest, _ = np.asarray(self._frames).T
        return max(0.0, float(np.quantile(rest - self.predict(pixels), PERCENTILE)))

    def learn(self, pixels: float, rest_ms: float) -> None:
        """One refined frame. One that took more than twice as long as expected counts as twice, unless the one before
        did so too."""
        limit = 2 * self.predict(pixels) if len(self._frames) >= ENOUGH else rest_ms
        usual = rest_ms if self._surprised else min(rest_ms, limit)
        self._surprised = rest_ms > limit
        self._frames.append((pixels, rest_ms, usual))
        x, _, y = np.asarray(self._frames).T
        weights = (1 - FORGET) ** np.arange(len(x) - 1, -1, -1.0)
        mean_x, mean_y = (float(np.average(v, weights=weights)) for v in (x, y))
        lean = self.LEAN * mean_x * mean_x
        covariance = float(np.average((x - mean_x) * (y - mean_y), weights=weights))
        variance = float(np.average((x - mean_x) ** 2, weights=weights))
        self.b = max(0.0, (covariance + lean * mean_y / mean_x) / (variance + lean))
        self.a = mean_y - self.b * mean_x
        if self.a < 0:
            self.a, self.b = 0.0, mean_y / mean_x


class LatencyBudget:
    """Chooses the entropy threshold of every frame so that the p95 of latencies stays below ``budget_ms``.

    For each frame: ``choose`` after the dense stage, ``observe`` when the result is out.

    ``lowest`` and ``highest`` bound the threshold, in nats. ``threshold`` starts at the lowest and stays there while
    time permits. It moves when the median of the latest WINDOW frames leaves a dead band; between its moves, a single
    frame that needs a higher one gets it for itself. A frame that not even ``highest`` makes fit stays dense; where
    that is the median, all do (``dense`` is True), until the median fits again. Every PROBE_EVERY-th of them is
    refined all the same, to notice that refining has become cheaper.

    Raises ParameterError for a budget that is not positive or bounds in the wrong order.
    """

    def __init__(self, budget_ms: float, lowest: float, highest: float) -> None:
        if not budget_ms > 0:
            raise ParameterError(f"a latency budget of {budget_ms} ms cannot be held; give a number above 0")
        if not 0 <= lowest <= highest:
            raise ParameterError(
                f"latency budget: the threshold's bounds are {lowest:g} to {highest:g} nats; the lower one must be at "
                "least 0 and not above the upper one"
            )
        self.budget_ms, self.lowest, self.highest = budget_ms, lowest, highest
        self.threshold = lowest
        self.dense = False
        self.cost = CostModel()
        self._recent: deque[tuple[float, float, float]] = deque(maxlen=WINDOW)  # what `_move` takes the median of
        self._dense_frames = 0  # in a row
        self._pending: tuple[float, float] | None = None  # ms spent, pixels to refine

    def choose(self, spent_ms: float, entropy: np.ndarray, pixels: int) -> float | None:
        """The threshold for a frame, or None to leave it dense.

        spent_ms: its age now. entropy: a sample of its entropy map, any shape. pixels: of the whole frame, or batch.
        """
        values = np.sort(entropy, axis=None)
        fits = self._fitting_pixels(spent_ms) / pixels  # density that there is time for
        needed, middle, relaxed = (_threshold_for(values, fits * share) for share in (1, 1 - SLACK / 2, 1 - SLACK))
        self._recent.append((needed, middle, relaxed))
        self._move()
        chosen = None if self.dense or needed > self.highest else max(self.threshold, needed)
        self._dense_frames = self._dense_frames + 1 if chosen is None else 0
        if self._dense_frames >= PROBE_EVERY and spent_ms < self.budget_ms:
            self.cost = CostModel()  # what it knows is from before the dense frames
            self._dense_frames, chosen = 0, self.highest
        self._pending = None if chosen is None else (spent_ms, _density(values, chosen) * pixels)
        return chosen

    def _move(self) -> None:
        """Moves the threshold to the middle of the dead band where the latest frames have left it."""
        if len(self._recent) < WINDOW:
            return
        needed, middle, relaxed = np.median(self._recent, axis=0).tolist()
        if self.dense:
            self.dense = relaxed > self.highest
        elif needed > self.threshold or relaxed < self.threshold:
            self.threshold = min(max(middle, self.lowest), self.highest)
            self.dense = needed > self.highest

    def observe(self, total_ms: float) -> None:
        """The latency that the frame of the last ``choose`` came to."""
        if self._pending is not None and self._pending[1] > 0:
            spent_ms, refined = self._pending
            self.cost.learn(refined, total_ms - spent_ms)
        self._pending = None

    def _fitting_pixels(self, spent_ms: float) -> float:
        room = self.budget_ms - spent_ms - self.cost.margin(self.budget_ms) - self.cost.a
        if room <= 0:
            return 0.0
        return room / self.cost.b if self.cost.b > 0 else float("inf")


def _density(values: np.ndarray, threshold: float) -> float:
    """Share of the sorted ``values`` above ``threshold``."""
    return 1 - float(np.searchsorted(values, threshold, side="right")) / len(values)


def _threshold_for(values: np.ndarray, density: float) -> float:
    """The lowest threshold that at most ``density`` of the sorted ``values`` exceed; infinity for no density at all."""
    if density <= 0:
        return float("inf")
    above = int(min(density, 1.0) * len(values))
    return float(values[len(values) - 1 - above]) if above < len(values) else 0.0
