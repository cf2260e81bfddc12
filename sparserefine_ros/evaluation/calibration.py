"""The density-recall curve of the entropy selector, and the threshold for a target recall (SparseRefine, Fig. 3b, A1).

One pass over the frames fills two histograms of entropy, of all pixels and of the misclassified ones; every threshold's
density, recall and precision follow from them.

Shape shorthand: T thresholds, K classes, H, W native size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.progress import track

from sparserefine_ros.datasets.base import UNLABELLED, Sample
from sparserefine_ros.evaluation import files
from sparserefine_ros.evaluation.reliability import fit_temperature, reliability, sample_logits
from sparserefine_ros.segmenter.bundle import Bundle
from sparserefine_ros.segmenter.segmenter import Segmenter

BINS = 2000  # of equal width; the first hundred are divided further: a confident network's errors may all lie there
FINE_BINS, FINEST = 1500, 1e-6  # nats


@dataclass(frozen=True)
class DensityRecall:
    """Per threshold: selected over all pixels, found over all misclassified ones, misclassified over selected ones."""

    thresholds: np.ndarray  # [T] nats, ascending
    density: np.ndarray  # [T]
    recall: np.ndarray  # [T]
    precision: np.ndarray  # [T]

    def at(self, threshold: float) -> dict[str, float]:
        """Density, recall and precision at the curve's nearest threshold."""
        i = int(np.abs(self.thresholds - threshold).argmin())
        return {name: float(getattr(self, name)[i]) for name in ("density", "recall", "precision")}

    def threshold_for(self, recall: float) -> float:
        """The highest threshold, hence the lowest density, whose recall is at least ``recall``; 0 where none is."""
        enough = np.nonzero(self.recall >= recall)[0]
        return float(self.thresholds[enough[-1]]) if enough.size else 0.0


def density_recall(segmenter: Segmenter, samples: Iterable[Sample]) -> DensityRecall:
    """Measures the initial prediction of ``segmenter`` on labelled samples.

    Density counts every pixel, labelled or not, since all of them cost time; recall and precision count labelled ones.
    Raises ValueError when no sample has a label.
    """
    equal = np.linspace(0.0, math.log(len(segmenter.classes)) * (1 + 1e-6), BINS + 1)[1:]
    edges = np.unique(np.concatenate([[0.0], np.geomspace(FINEST, equal[99], FINE_BINS, endpoint=False), equal]))
    beyond = np.nextafter(edges, np.inf)  # what is selected lies above a threshold, not at it
    everything, labelled, wrong = (np.zeros(len(edges) - 1, np.int64) for _ in range(3))
    pixels_in_all, missed_in_all, labels = 0, 0, 0
    for sample in samples:
        if sample.label is None:
            continue
        initial = segmenter.segment([sample.image], refine=False)[0]
        known = sample.label != UNLABELLED
        missed = known & (initial.mask != sample.label)
        pixels_in_all += initial.entropy.size
        missed_in_all += int(missed.sum())
        labels += int(known.sum())
        for counts, pixels in ((everything, ...), (labelled, known), (wrong, missed)):
            counts += np.histogram(initial.entropy[pixels], beyond)[0]
    if not labels:
        raise ValueError("no labelled pixel to calibrate on; give frames with labels")

    def above(counts: np.ndarray) -> np.ndarray:  # pixels in bin i and higher: those above threshold edges[i]
        return counts[::-1].cumsum()[::-1].astype(np.float64)

    return DensityRecall(
        thresholds=edges[:-1],
        density=above(everything) / pixels_in_all,
        recall=above(wrong) / max(missed_in_all, 1),
        precision=above(wrong) / np.maximum(above(labelled), 1),
    )


def four_digits(threshold: float) -> float:
    """As it is written into a bundle; of a small one four decimals would leave nothing."""
    return float(f"{threshold:.4g}")


def draw(curve: DensityRecall, threshold: float, title: str, file: Path) -> None:
    """Saves the density-recall curve with the chosen threshold marked."""
    from matplotlib.figure import Figure  # imported late: slow, and only drawing needs it

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    here = curve.at(threshold)
    left.plot(100 * curve.density, 100 * curve.recall, color="#1f77b4")
    left.plot([0, 100], [0, 100], ":", color="grey", label="random selection")
    left.plot(
        100 * here["density"], 100 * here["recall"], "o", color="#d62728", label=f"threshold {threshold:.3g} nats"
    )
    left.set(xlabel="density, % of pixels", ylabel="recall, % of misclassified pixels", xlim=(0, 60), ylim=(0, 101))
    left.legend(loc="lower right")
    for name, colour in (("density", "#2ca02c"), ("recall", "#1f77b4"), ("precision", "#9467bd")):
        right.plot(curve.thresholds, 100 * getattr(curve, name), color=colour, label=name)
    right.axvline(threshold, color="#d62728", linestyle="--")
    right.set(xlabel="entropy threshold, nats", ylabel="%", ylim=(0, 101), xlim=(0, curve.thresholds[-1]))
    right.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    files.write_figure(file, figure)


def calibrate_bundle(bundle: Bundle, samples: Sequence[Sample], recall: float, device: str = "auto") -> Bundle:
    """Writes the temperature, the threshold for ``recall`` and their figures into ``bundle``, and draws the curve.

    A bundle with a refiner keeps its temperature, since the refiner learnt behind it.
    """
    plain = Segmenter(replace(bundle, temperature=1.0), device, refine=False)
    logits, labels = sample_logits(plain, track(samples, description="fitting the temperature"))
    temperature = bundle.temperature if bundle.refiner else round(fit_temperature(logits, labels), 4)
    after = reliability(logits / temperature, labels)
    before = {f"{name}_at_temperature_1": value for name, value in reliability(logits, labels).items()}
    bundle = replace(bundle, temperature=temperature)
    segmenter = Segmenter(bundle, device, refine=False)
    curve = density_recall(segmenter, track(samples, description="measuring density and recall"))
    threshold = four_digits(curve.threshold_for(recall))
    figures = {name: round(value, 4) for name, value in curve.at(threshold).items()}
    calibrated = replace(
        bundle,
        entropy_threshold=threshold,
        calibration={
            "target_recall": recall, "threshold": threshold, **figures,
            "temperature": temperature, **after, **before,
        },
    )  # fmt: skip
    calibrated.save()
    draw(curve, threshold, f"{bundle.name}: entropy selector", bundle.path / "density_recall.png")
    return calibrated
