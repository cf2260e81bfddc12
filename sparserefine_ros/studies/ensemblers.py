"""Table 5e: how the initial and the refined prediction become one, over the sparse branch that the bundle ships.

Shape shorthand: K classes, H, W native size, N selected pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from rich.progress import track
from torch import nn

from sparserefine_ros.evaluation.metrics import ConfusionMatrix
from sparserefine_ros.networks.ensemblers import build_ensembler
from sparserefine_ros.studies.opened import Opened
from sparserefine_ros.studies.report import Report, Setting, bar_gains, percent

PLAIN = {
    "direct: refined in place of initial": "direct",
    "entropy: the one of lower entropy": "entropy",
    "residual: sum, same class as the mean": "residual",
}
ORACLE = "oracle: the right one, if any"


def study(setting: Setting) -> Report:
    opened = Opened(setting.bundle, setting.device)
    assert setting.bundle.refiner is not None
    own = f"{setting.bundle.refiner.args.get('ensembler', 'gated')}: the bundle's, trained"
    classes = len(setting.bundle.classes)
    ensemblers: dict[str, nn.Module] = {label: build_ensembler(name, classes) for label, name in PLAIN.items()}
    ensemblers |= {own: opened.refiner.ensembler, ORACLE: build_ensembler("oracle", classes)}
    low = ConfusionMatrix(setting.bundle.classes)
    matrices = {label: ConfusionMatrix(setting.bundle.classes) for label in ensemblers}
    pixels = selected = 0
    for sample in track(setting.val, description=f"ensemblers on {len(setting.val)} frames"):
        assert sample.label is not None
        prediction = opened.look(sample)
        uncertain = opened.uncertain(prediction)
        initial = opened.initial_mask(prediction)  # [1, H, W]
        low.update(sample.label, initial[0].cpu().numpy())
        flat, y1, y2 = opened.predictions(sample, prediction, uncertain)
        pixels, selected = pixels + initial.numel(), selected + len(flat)
        labels = torch.from_numpy(sample.label).to(flat.device).view(-1)[flat]
        for label, ensembler in ensemblers.items():
            mask = initial.clone()
            with torch.inference_mode():
                mask.view(-1)[flat] = ensembler(y1, y2, labels).argmax(1).to(torch.uint8)
            matrices[label].update(sample.label, mask[0].cpu().numpy())
    miou_lr = low.miou()
    rows: list[dict[str, Any]] = [
        {"ensembler": label, "miou": matrix.miou(), "gain": matrix.miou() - miou_lr}
        for label, matrix in matrices.items()
    ]
    cells = [("none: LR dense", percent(miou_lr, 2), "–")]
    cells += [(row["ensembler"], percent(row["miou"], 2), f"{100 * row['gain']:+.2f}") for row in rows]
    note = (
        "One sparse branch for all, the bundle's; the other ensemblers have nothing to train. "
        f"{percent(selected / pixels)} % of the pixels are selected. The oracle takes whichever prediction is right: "
        "the bound for choosing between the two."
    )
    return Report(
        "ensemblers", "Ensembler (Table 5e)", ("ensembler", "mIoU", "gain"), cells, note,
        {"miou_lr": miou_lr, "density": selected / pixels, "rows": rows},
        lambda figure: bar_gains(figure.subplots(), {row["ensembler"]: row["gain"] for row in rows}, miou_lr),
    )  # fmt: skip
