"""A refiner without labels: the same model at full resolution teaches it (Hinton et al., 2015, with hard targets).

The dense segmenter at scale 1 (HR) is the teacher. The student is the dense segmenter at low resolution (LR), frozen,
with a refiner on its uncertain pixels: a new sparse network; or a copy of the dense segmenter, where that is of a kind
that can be repeated at single sites, which learns from the teacher as it goes (`training.repetition`). The teacher's
masks are computed once and kept as class ids: a byte a pixel, where soft targets take K floats.

How much of the way from LR to HR the student went is measured by agreement, the share of pixels whose class is HR's.
HR agrees with itself everywhere, hence

    share of the gap closed = (agreement of the student - agreement of LR) / (1 - agreement of LR)

which can at best reach the recall of the selector: disagreeing pixels that are not selected stay as they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import nn

from sparserefine_ros.datasets.base import Sample, digest
from sparserefine_ros.errors import TrainingError
from sparserefine_ros.evaluation.calibration import DensityRecall, density_recall, draw, four_digits
from sparserefine_ros.evaluation.compare import HR, LR
from sparserefine_ros.evaluation.compare import frames as in_words
from sparserefine_ros.networks.registry import DENSE, REFINERS, build
from sparserefine_ros.segmenter.bundle import Bundle, save_network
from sparserefine_ros.segmenter.bundle_files import read_model_yaml
from sparserefine_ros.segmenter.dense import load_registered
from sparserefine_ros.segmenter.fitting import why_not_repeatable
from sparserefine_ros.segmenter.segmenter import Segmenter
from sparserefine_ros.training.bundle import copy_dense, stage_summary, weights_digest
from sparserefine_ros.training.card import write_distilled_card
from sparserefine_ros.training.curves import draw_curves
from sparserefine_ros.training.ensembler import EnsemblerTask
from sparserefine_ros.training.frames import split_blocks
from sparserefine_ros.training.loop import train
from sparserefine_ros.training.recipe import StageRecipe
from sparserefine_ros.training.refiner import RefinerTask
from sparserefine_ros.training.repetition import RepetitionTask
from sparserefine_ros.untrusted import read_text
from sparserefine_ros.whole_files import write_whole

MIN_FRAMES = 5  # one held out, four to train on
CALIBRATION_FRAMES = 100
VALIDATION_FRAMES = 50  # of the held-out ones, while training

# Wide views at about the scale of use; every pixel counts alike, as in the agreement that is wanted. The branch sees
# colours alone: shown the initial prediction it repeats that, and two predictions that agree correct nothing.
RECIPE = StageRecipe(
    "sparserefine",
    {"channels": [16, 32, 64], "stride": "floor"},
    epochs=24, batch=4, crop=(512, 1024), scale=(0.85, 1.2), lr=2e-3, ema=0.99, class_weight_power=0.0,
    validate_every=4,
)  # fmt: skip
REPEAT = StageRecipe(
    "repeat", epochs=3, batch=1, crop=(512, 1024), scale=(0.85, 1.2), lr=2e-5, ema=0.99, class_weight_power=0.0,
    validate_every=1,
)  # fmt: skip
"""The student is its teacher already: small steps, and few."""
ENSEMBLER = replace(RECIPE, network="gated", args={}, epochs=2, batch=2, lr=3e-3, validate_every=1)
"""The gate, anew on the finished branch: see `training.ensembler`."""


class Agreement(RefinerTask):
    """A task whose labels are the teacher's masks, and its figure of merit how often it gives them."""

    @torch.inference_mode()
    def validate(self, module: nn.Module) -> dict[str, float]:
        """Agreement with the teacher before refinement and after, and the mean density."""
        matrices, density = self.measure(module)
        return {
            "agreement_lr": matrices["miou_lr"].accuracy(), "agreement": matrices["miou"].accuracy(),
            "density": density,
        }  # fmt: skip


class GateAgreement(Agreement, EnsemblerTask):
    """The same of the ensembler alone."""


class RepetitionAgreement(Agreement, RepetitionTask):
    """The same of a network that is repeated; the masks serve for the figure of merit alone."""


def distill(
    bundle: Bundle,
    frames: Sequence[Sample],
    folder: Path,
    runs: Path,
    device: torch.device,
    recipe: StageRecipe | str = RECIPE,
    recall: float = 0.9,
    seed: int = 0,
) -> tuple[Bundle, list[Sample]]:
    """Trains a refiner for ``bundle`` on ``frames``, whose labels are ignored, and writes a new bundle into ``folder``.

    recipe: of network "repeat" or "sparserefine"; where its crop is larger than the frames, theirs is taken. A name
        trains nothing, and the frames serve for the threshold: "repeat", or "bilateral".
    recall: share of the pixels where LR and HR disagree that the entropy threshold is chosen for.

    Returns the new bundle and the held-out frames, as they came in. ``runs`` keeps what a second call goes on from.
    Raises TrainingError for too few frames, a bundle without a lower resolution, a run of something else in ``runs``.
    """
    if bundle.scale == 1:
        raise TrainingError(
            f"bundle {bundle.name!r} runs at scale 1, so that LR and HR are the same; give --scale, for example 0.5"
        )
    if len(frames) < MIN_FRAMES:
        raise TrainingError(f"{len(frames)} frames are too few to train on some and hold out others; give 50 or more")
    if folder.resolve() == bundle.path.resolve():
        raise TrainingError(f"the new bundle would replace the one it comes from, {folder}; give another --output")
    if (folder / "model.yaml").exists() and not _is_distilled(folder):
        raise TrainingError(f"{folder} holds a bundle that was not distilled; remove it or give another --output")
    train_at, held_at = split_blocks(len(frames))
    source, bundle = bundle, replace(bundle, refiner=None)
    if isinstance(recipe, StageRecipe):
        _claim(runs, bundle, frames, recall, seed)

    taught = teach(bundle, frames, device)
    train_frames, held_frames = [taught[i] for i in train_at], [taught[i] for i in held_at]
    bundle, curve = _calibrate(bundle, train_frames, recall, device)

    facts: dict[str, Any] = {
        "teacher": "native" if bundle.native else "dense", "frames": {"train": len(train_at), "held_out": len(held_at)},
        "torch": str(torch.__version__),
    }  # fmt: skip
    if isinstance(recipe, str):
        bundle = copy_dense(bundle, folder)
        spec = save_network(folder, build(REFINERS, recipe, len(bundle.classes), {}), recipe, {}, "refiner.safetensors")
    else:
        if recipe.network == "repeat":
            repeated = bundle.native or bundle.dense
            recipe = replace(recipe, args={"own": {"network": repeated.network, "args": repeated.args}})
        refiner = _train(bundle, train_frames, held_frames[:VALIDATION_FRAMES], recipe, runs, seed, device)
        bundle = copy_dense(bundle, folder)  # not before: what lies there stays whole while it trains
        facts |= {"seed": seed, "refiner": stage_summary(recipe)}
        if recipe.network != "repeat":
            facts["ensembler"] = stage_summary(ENSEMBLER)
        spec = save_network(folder, refiner, recipe.network, recipe.args, "refiner.safetensors")
        draw_curves(runs / "refiner.jsonl", folder / "refiner_training.png")
    bundle = replace(bundle, refiner=spec, provenance={**bundle.provenance, "distilled": facts})
    bundle.save()
    draw(curve, bundle.entropy_threshold, f"{bundle.name}: where LR and HR disagree", folder / "density_recall.png")
    write_distilled_card(bundle, source)
    return bundle, [frames[i] for i in held_at]


def why_not_repeat(bundle: Bundle, device: torch.device) -> str:
    """Why the dense segmenter of ``bundle`` cannot be its own refiner; empty where it can."""
    teacher, student = (Segmenter(bundle, str(device), refine=False, scale=scale).dense for scale in (1.0, None))
    return why_not_repeatable(teacher, student, device)


def _is_distilled(folder: Path) -> bool:
    return "distilled" in (read_model_yaml(folder / "model.yaml").get("provenance") or {})


def teach(bundle: Bundle, frames: Sequence[Sample], device: torch.device) -> list[Sample]:
    """``frames`` with the HR prediction of ``bundle`` in place of their labels."""
    teacher = Segmenter(bundle, str(device), refine=False, scale=1.0)
    return [
        frame._replace(label=teacher.segment([frame.image])[0].mask)
        for frame in track(frames, description="full-resolution predictions")
    ]


def gap_closed(agreement_lr: float, agreement: float) -> float:
    """Share of the LR-HR gap closed, as the module defines it; nan where there is none."""
    return (agreement - agreement_lr) / (1 - agreement_lr) if agreement_lr < 1 else float("nan")


def _train(
    bundle: Bundle,
    train_frames: Sequence[Sample],
    held_frames: Sequence[Sample],
    recipe: StageRecipe,
    runs: Path,
    seed: int,
    device: torch.device,
) -> nn.Module:
    """A copy of the teacher; or a new branch, then its gate."""
    torch.manual_seed(seed)
    refiner: Any = build(REFINERS, recipe.network, len(bundle.classes), recipe.args)
    height, width = train_frames[0].image.shape[:2]
    branch, gate = (
        replace(stage, crop=(min(height, stage.crop[0]), min(width, stage.crop[1]))) for stage in (recipe, ENSEMBLER)
    )
    frames = (Segmenter(bundle, str(device)).dense, bundle.classes, train_frames, held_frames)
    setting = (bundle.scale, bundle.entropy_threshold, device)
    if recipe.network == "repeat":
        refiner.own.load_state_dict(load_registered(bundle, bundle.native or bundle.dense, DENSE).state_dict())
        teacher = Segmenter(bundle, str(device), scale=1.0).dense
        repeating = RepetitionAgreement(refiner, teacher, *frames, branch, *setting)
        return train(repeating, branch, runs, "refiner", seed, device)
    with torch.no_grad():  # starts out saying nothing: an untrained student is LR
        refiner.classifier.weight.zero_()
        refiner.classifier.bias.zero_()
    refiner = train(Agreement(refiner, *frames, branch, *setting), branch, runs, "refiner", seed, device)
    torch.manual_seed(seed)  # the same gate where the branch was finished by an earlier call
    task = GateAgreement(refiner, *frames, gate, *setting)
    refiner.ensembler = train(task, gate, runs, "ensembler", seed, device, {"refiner": weights_digest(refiner)})
    return refiner


def summary(table: dict[str, Any]) -> str:
    """What a person wants to know of ``table``, `evaluation.compare.compare` on the held-out frames."""
    rows = table["rows"]
    refined = next(row for name, row in rows.items() if name not in (HR, LR))
    before, after = rows[LR]["agreement"], refined["agreement"]
    lines = [
        f"{in_words(table['frames'], 'held-out frame')}, {refined['density']:.1%} of the pixels refined",
        f"agreement with full resolution: {before:.2%} at low resolution, {after:.2%} refined; "
        + (f"{gap_closed(before, after):.0%} of the gap closed" if before < 1 else "there is no gap to close"),
    ]
    if not math.isnan(rows[HR]["miou"]):
        lines.append("mIoU: " + ", ".join(f"{name} {100 * row['miou']:.2f}" for name, row in rows.items()))
        if rows[HR]["miou"] < rows[LR]["miou"]:
            lines.append("full resolution is worse than low resolution on these frames: a teacher that nobody needs")
    return "\n".join(lines)


def _calibrate(
    bundle: Bundle, taught: Sequence[Sample], recall: float, device: torch.device
) -> tuple[Bundle, DensityRecall]:
    """``bundle`` with the threshold that selects ``recall`` of the pixels where LR and HR disagree; and the curve."""
    step = -(-len(taught) // CALIBRATION_FRAMES)
    measured = track(taught[::step], description="measuring density and recall")
    curve = density_recall(Segmenter(bundle, str(device), refine=False), measured)
    threshold = four_digits(curve.threshold_for(recall))
    figures = {name: round(value, 4) for name, value in curve.at(threshold).items()}
    calibration = {"target_recall": recall, "threshold": threshold, "labels": "full-resolution prediction", **figures}
    return replace(bundle, entropy_threshold=threshold, calibration=calibration), curve


def _claim(runs: Path, bundle: Bundle, frames: Sequence[Sample], recall: float, seed: int) -> None:
    """Remembers in ``runs`` what is trained on what; TrainingError where something else was."""
    teacher = bundle.native or bundle.dense
    here = {
        "dense": bundle.dense.sha256, "teacher": teacher.sha256, "scale": bundle.scale, "recall": recall,
        "seed": seed, "frames": len(frames), "first": frames[0].name, "last": frames[-1].name,
        "pixels": digest(frame.image for frame in frames),
    }  # fmt: skip
    file = runs / "distill.json"
    there = _claimed(file) if file.exists() else here
    if there != here:
        key = next(k for k in {**here, **there} if there.get(k) != here.get(k))
        raise TrainingError(
            f"{runs} holds a run with {key} {there.get(key)}, here it is {here.get(key)}; give another --output, "
            f"or remove {runs} to start anew"
        )
    runs.mkdir(parents=True, exist_ok=True)
    write_whole(file, (json.dumps(here) + "\n").encode())


def _claimed(file: Path) -> dict[str, Any]:
    """What `_claim` wrote; TrainingError where that cannot be told any more."""
    try:
        there = json.loads(read_text(file))
        if isinstance(there, dict):
            return there
        what = f"it holds a {type(there).__name__}"
    except (OSError, ValueError, RecursionError) as error:
        what = str(error)
    raise TrainingError(
        f"cannot read {file}, which says what was trained there: {what}; give another --output, or remove "
        f"{file.parent} to start anew"
    )
