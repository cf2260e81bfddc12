"""Refiners trained at one small, equal budget over a bundle's frozen dense segmenter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from sparserefine_ros.errors import BundleError
from sparserefine_ros.networks.macs import counting_refiner_macs
from sparserefine_ros.segmenter.bundle import Bundle
from sparserefine_ros.segmenter.segmenter import Segmenter
from sparserefine_ros.studies.features import FeatureTap
from sparserefine_ros.studies.report import Report, Setting, bar_gains, percent
from sparserefine_ros.studies.variants import FeatureGateTask, FeatureTask, Variant, build_variant
from sparserefine_ros.training.bundle import weights_digest
from sparserefine_ros.training.ensembler import EnsemblerTask
from sparserefine_ros.training.loop import train
from sparserefine_ros.training.recipe import StageRecipe
from sparserefine_ros.training.refiner import RefinerTask

SIDE = 2 / 3  # of the recipe's crops: less than half of their pixels
EMA = 0.98  # few steps: averaged weights must forget the random ones they began with
SEED = 0
COUNTED = 3  # validation frames on which multiply-adds are counted


def recipe_of(bundle: Bundle, epochs: int) -> StageRecipe:
    """The recipe that the bundle's own refiner was trained by, cut down; BundleError where it has none."""
    stage = bundle.provenance.get("refiner")
    if not stage or bundle.refiner is None or bundle.refiner.network != "sparserefine":
        raise BundleError(f"bundle {bundle.name!r} has no refiner of `sparserefine train`; choose camvid or street")
    crop = tuple(round(side * SIDE) for side in stage["crop"])
    return StageRecipe(
        **{**stage, "crop": crop, "scale": tuple(stage["scale"]), "epochs": epochs, "ema": EMA,
           "validate_every": epochs}
    )  # fmt: skip


def gate_recipe_of(bundle: Bundle) -> StageRecipe | None:
    """How the gate of the bundle's refiner was trained anew; None where it was trained along with the branch."""
    stage = bundle.provenance.get("ensembler")
    return StageRecipe(**{**stage, "crop": tuple(stage["crop"]), "scale": tuple(stage["scale"])}) if stage else None


def base_args(bundle: Bundle) -> dict[str, Any]:
    """Arguments of the paper's refiner at the bundle's size: colours alone, gated ensembler."""
    assert bundle.refiner is not None
    return {**bundle.refiner.args, "context": False, "ensembler": "gated"}


def trained_report(name: str, title: str, variants: Sequence[Variant], setting: Setting, note: str) -> Report:
    """Trains ``variants``, or goes on where ``setting.runs`` has a part of them, and lays them side by side."""
    recipe, gate = recipe_of(setting.bundle, setting.epochs), gate_recipe_of(setting.bundle)
    rows = [train_variant(variant, recipe, gate, setting) for variant in variants]
    low = rows[0]["miou_lr"]
    cells = [("none: LR dense", percent(low, 2), "–", "–", "–", "–")]
    cells += [
        (
            row["label"], percent(row["miou"], 2), f"{100 * (row['miou'] - low):+.2f}",
            percent(row["miou_refined"], 2), f"{row['params_m']:.3f}", f"{row['gmac']:.2f}",
        )
        for row in rows
    ]  # fmt: skip
    whole = setting.bundle.provenance["refiner"]
    budget = {
        "epochs": recipe.epochs, "batch": recipe.batch, "crop": list(recipe.crop), "ema": recipe.ema,
        "steps": rows[0]["steps"], "train_frames": len(setting.train),
    }  # fmt: skip
    budget_note = (
        f"Each was trained from scratch on the frozen dense segmenter at the same small budget: {recipe.epochs} epochs "
        f"of {len(setting.train)} frames, {rows[0]['steps']} steps of {recipe.batch} crops of "
        f"{recipe.crop[1]}x{recipe.crop[0]}, one seed"
        + (f", and its gate anew for {gate.epochs} epochs" if gate else "")
        + f"; the bundle's own refiner had {whole['epochs']} epochs "
        f"with crops of {whole['crop'][1]}x{whole['crop'][0]}. Sparse branch: mIoU where it replaces the initial "
        f"prediction of the selected pixels. Refined are {percent(rows[0]['density'])} % of the pixels; parameters and "
        "multiply-adds, a frame, are the refiner's. Where the hardware gains by it, training and its validation "
        "compute in bfloat16."
    )
    return Report(
        name, title, ("", "mIoU", "gain", "sparse branch", "M parameters", "GMAC"), cells, f"{note} {budget_note}",
        {"budget": budget, "rows": rows},
        lambda figure: bar_gains(figure.subplots(), {row["label"]: row["miou"] - low for row in rows}, low),
    )  # fmt: skip


def run_folder(setting: Setting) -> Path:
    """Where trainings are kept: a folder for all that their figures depend on beside the recipe and the variant."""
    bundle = setting.bundle
    parts = (bundle.name, bundle.dense.sha256[:8], f"{bundle.entropy_threshold:g}", f"{len(setting.val)}frames")
    return setting.runs / "studies" / "-".join(parts)


def run_name(variant: Variant) -> str:
    """The same for variants that train the same, in whichever study they appear."""
    args = variant.args
    parts = ["pointnet" if variant.pointnet else "unet" + "-".join(map(str, args["channels"]))]
    parts += [part for part, used in (("logits", args["context"]), ("features", variant.features)) if used]
    return "-".join([*parts, args["ensembler"]])


def train_variant(variant: Variant, recipe: StageRecipe, gate: StageRecipe | None, setting: Setting) -> dict[str, Any]:
    """Trains the refiner and, where there is a recipe for it, its ``gate`` anew. Its row: label, miou of the last
    validation, miou_refined of the sparse branch alone, miou_lr, density, steps, millions of parameters, refiner GMAC
    a frame.
    """
    bundle, device = setting.bundle, setting.device
    dense = Segmenter(bundle, str(device), refine=False).dense
    torch.manual_seed(SEED)
    refiner = build_variant(variant, len(bundle.classes), FeatureTap(dense).channels)
    recipe = replace(recipe, args={k: v for k, v in asdict(variant).items() if k != "label"})  # what a resume checks
    kind = FeatureTask if variant.features else RefinerTask
    frames = (bundle.classes, setting.train, setting.val)
    task = kind(refiner, dense, *frames, recipe, bundle.scale, bundle.entropy_threshold, device)
    folder, name = run_folder(setting), run_name(variant)
    trained = train(task, recipe, folder, name, SEED, device)
    assert isinstance(trained, type(refiner))
    last = _last(folder / f"{name}.jsonl")
    steps = last["step"]
    if gate:
        torch.manual_seed(SEED)
        gate_kind = FeatureGateTask if variant.features else EnsemblerTask
        gate_task = gate_kind(trained, dense, *frames, gate, bundle.scale, bundle.entropy_threshold, device)
        branch = {"refiner": weights_digest(trained)}
        trained.ensembler = train(gate_task, gate, folder, f"{name}-gate", SEED, device, branch)
        last = _last(folder / f"{name}-gate.jsonl")
    figures = {key: last[key] for key in ("miou", "miou_refined", "miou_lr", "density")} | {"steps": steps}
    task.val = setting.val[:COUNTED]
    with counting_refiner_macs(trained) as counts, torch.inference_mode():
        density = task.measure(trained)[1]
    gmac = sum(counts) / len(task.val) / 1e9 * figures["density"] / max(density, 1e-9)
    parameters = sum(p.numel() for p in trained.parameters()) / 1e6
    return {"label": variant.label, **figures, "params_m": parameters, "gmac": gmac}


def _last(log: Path) -> dict[str, Any]:
    """The last line of a training's log: that of its last validation."""
    line: dict[str, Any] = json.loads(log.read_text().splitlines()[-1])
    return line
