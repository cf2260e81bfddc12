"""Table 5a: which pixels to refine, at the density that the entropy selector takes in each frame.

Shape shorthand: K classes, H, W native size, h, w low resolution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from sparserefine_ros.datasets.base import UNLABELLED
from sparserefine_ros.evaluation.metrics import ConfusionMatrix
from sparserefine_ros.networks.entropy import entropy
from sparserefine_ros.networks.selectors import OracleSelector, Prediction, upsample_nearest
from sparserefine_ros.studies.opened import Opened
from sparserefine_ros.studies.report import Report, Setting, bar_gains, percent

CURVE = np.linspace(0, 0.6, 31)  # densities at which the picture shows recall


def _random(prediction: Prediction, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(prediction.size, generator=generator).to(prediction.logits.device)


def _edges(prediction: Prediction, _seed: int) -> Tensor:
    """Squared gradient of the normalised image by Sobel's kernel, summed over the colours."""
    assert prediction.images is not None
    across = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=prediction.images.device)
    kernel = torch.stack([across, across.T])[:, None]  # [2, 1, 3, 3]
    colours = F.pad(prediction.images.transpose(0, 1), (1, 1, 1, 1), mode="replicate")  # [3, 1, H + 2, W + 2]
    return F.conv2d(colours, kernel).square().sum((0, 1))


def _magnitude(prediction: Prediction, _seed: int) -> Tensor:
    """L2 norm of the features before the classifier."""
    assert prediction.features is not None
    return upsample_nearest(prediction.features.float().norm(dim=1), prediction.size)[0]


def _confidence(prediction: Prediction, _seed: int) -> Tensor:
    """Largest probability, negated."""
    return upsample_nearest(-prediction.logits.softmax(1).amax(1), prediction.size)[0]


def _margin(prediction: Prediction, _seed: int) -> Tensor:
    """Distance of the two largest probabilities, negated."""
    first, second = prediction.logits.softmax(1).topk(2, dim=1).values.unbind(1)
    return upsample_nearest(second - first, prediction.size)[0]


def _entropy(prediction: Prediction, _seed: int) -> Tensor:
    return upsample_nearest(entropy(prediction.logits.softmax(1), 1), prediction.size)[0]


SCORES: dict[str, Callable[[Prediction, int], Tensor]] = {
    "random": _random,
    "image edges (Sobel)": _edges,
    "feature magnitude": _magnitude,
    "confidence": _confidence,
    "margin": _margin,
    "entropy": _entropy,
}
"""Of a batch of one and a seed, [H, W]: pixels of the highest score are refined first."""
ORACLE = "oracle: the wrong pixels"


def top(order: Tensor, count: int, size: tuple[int, int]) -> Tensor:
    """bool [1, H, W]: the first ``count`` of ``order`` [H W], flat positions."""
    selected = torch.zeros(size[0] * size[1], dtype=torch.bool, device=order.device)
    selected[order[:count]] = True
    return selected.view(1, *size)


class _Tally:
    """What one selector did over all frames."""

    def __init__(self, setting: Setting) -> None:
        self.matrix = ConfusionMatrix(setting.bundle.classes)
        self.pixels = self.selected = self.known = self.wrong = self.found = 0
        self.curve = np.zeros(len(CURVE))  # wrong pixels among the first CURVE of every frame

    def add(self, selected: Tensor, wrong: Tensor, known: Tensor) -> None:
        self.pixels += selected.numel()
        self.selected += int(selected.sum())
        self.known += int((selected & known).sum())
        self.wrong += int(wrong.sum())
        self.found += int((selected & wrong).sum())

    def row(self, name: str) -> dict[str, Any]:
        return {
            "selector": name, "density": self.selected / self.pixels, "recall": self.found / max(self.wrong, 1),
            "precision": self.found / max(self.known, 1), "miou": self.matrix.miou(),
            "curve": (self.curve / max(self.wrong, 1)).tolist(),
        }  # fmt: skip


def study(setting: Setting) -> Report:
    opened = Opened(setting.bundle, setting.device)
    plain = ConfusionMatrix(setting.bundle.classes)
    tallies: dict[str, _Tally] = {}
    for index, sample in enumerate(track(setting.val, description=f"selectors on {len(setting.val)} frames")):
        prediction = opened.look(sample)
        labels = prediction.labels
        assert labels is not None and sample.label is not None
        known, wrong = labels != UNLABELLED, OracleSelector()(prediction)  # bool [1, H, W]
        plain.update(sample.label, opened.initial_mask(prediction)[0].cpu().numpy())
        count = int(opened.uncertain(prediction).sum())
        places = (CURVE * wrong.numel()).astype(int)
        choices = {}
        for name, score in SCORES.items():
            if score is _magnitude and prediction.features is None:
                continue
            order = score(prediction, index).flatten().argsort(descending=True, stable=True)
            choices[name] = top(order, count, prediction.size)
            found = np.concatenate([[0], wrong.flatten()[order].cumsum(0).cpu().numpy()])
            tallies.setdefault(name, _Tally(setting)).curve += found[places]
        choices[ORACLE] = wrong
        for name, selected in choices.items():
            tally = tallies.setdefault(name, _Tally(setting))
            tally.add(selected, wrong, known)
            tally.matrix.update(sample.label, opened.refine(sample, prediction, selected))
    rows = [tally.row(name) for name, tally in tallies.items()]
    cells = [("none: LR dense", "0.0", "0.0", "–", percent(plain.miou(), 2))]
    cells += [
        (row["selector"], *(percent(row[key]) for key in ("density", "recall", "precision")), percent(row["miou"], 2))
        for row in rows
    ]
    note = (
        "Every criterion takes as many pixels of a frame as entropy above the threshold does; the oracle takes the "
        "wrong pixels and no others. One refiner for all, trained on pixels that entropy chose: what others choose, "
        "isolated random pixels above all, it has not met before. Recall: wrong pixels of LR dense that are selected, "
        "of all wrong ones. Precision: of all selected labelled ones. mIoU after refinement. In the picture every "
        "frame has the same density."
    )
    return Report(
        "selectors", "Pixel selectors at equal density (Table 5a)",
        ("selector", "density, %", "recall, %", "precision, %", "mIoU"), cells, note,
        {"miou_lr": plain.miou(), "rows": rows, "curve_density": CURVE.tolist()},
        lambda figure: _draw(figure, rows, plain.miou()),
    )  # fmt: skip


def _draw(figure: Any, rows: list[dict[str, Any]], miou_lr: float) -> None:
    left, right = figure.subplots(1, 2)
    for row in rows:
        if any(row["curve"]):
            left.plot(100 * CURVE, [100 * v for v in row["curve"]], label=row["selector"])
    left.set(xlabel="density, % of pixels", ylabel="recall, % of misclassified pixels", xlim=(0, 60), ylim=(0, 101))
    left.legend()
    left.grid(alpha=0.3)
    bar_gains(right, {row["selector"]: row["miou"] - miou_lr for row in rows}, miou_lr)
