"""From a recipe to a bundle: dense segmenter, entropy threshold, HR baseline, refiner."""

from __future__ import annotations

import copy
import hashlib
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparserefine_ros import __version__
from sparserefine_ros.datasets.base import Sample, digest
from sparserefine_ros.datasets.classes import ClassList
from sparserefine_ros.datasets.splits import load_split
from sparserefine_ros.errors import TrainingError
from sparserefine_ros.evaluation.calibration import calibrate_bundle
from sparserefine_ros.networks.registry import DENSE, REFINERS, build
from sparserefine_ros.segmenter.bundle import Bundle, NetworkSpec, save_network
from sparserefine_ros.segmenter.segmenter import Segmenter
from sparserefine_ros.training.card import write_trained_card
from sparserefine_ros.training.curves import draw_curves
from sparserefine_ros.training.dense import DenseTask
from sparserefine_ros.training.ensembler import EnsemblerTask
from sparserefine_ros.training.loop import train
from sparserefine_ros.training.pointrend import PointRendTask
from sparserefine_ros.training.pretrained import start_encoder
from sparserefine_ros.training.recipe import STAGES, Recipe, StageRecipe
from sparserefine_ros.training.refiner import RefinerTask
from sparserefine_ros.whole_files import whole

TASKS: dict[str, type[RefinerTask]] = {"sparserefine": RefinerTask, "pointrend": PointRendTask}
"""How each refiner that has something to learn is trained."""


def train_bundle(recipe: Recipe, data: Path | None, runs: Path, folder: Path, device: torch.device) -> Bundle:
    """Trains what ``recipe`` describes and writes the bundle into ``folder``, with a card where there is none.

    ``runs`` keeps checkpoints, logs and curves; a second call goes on from there. As in the paper the dense segmenter
    is trained first and stays frozen; its density-recall curve gives the threshold that the refiner is trained at.
    """
    if recipe.refiner and recipe.refiner.network not in TASKS:
        raise TrainingError(
            f"recipe {recipe.name!r}: there is no training for refiner {recipe.refiner.network!r}; "
            f"choose one of {', '.join(TASKS)}"
        )
    classes, val_frames = load_split(recipe.dataset, "val", data)
    if recipe.dataset.get("kind") == "folder":  # anybody's: what ids mean is kept, to be compared later
        recipe = replace(recipe, dataset={**recipe.dataset, "classes": list(classes.names)})
    if recipe.refiner:
        _build(REFINERS, recipe, recipe.refiner, len(classes))  # fails now, not after the dense stages
    if recipe.bundle:
        bundle = _take(recipe, classes, folder)
    else:
        bundle = _train_dense(recipe, data, val_frames, runs, folder, device)
    if recipe.refiner:
        _, refiner_frames = load_split(recipe.dataset, "refiner", data)
        refiner = _build(REFINERS, recipe, recipe.refiner, len(classes))
        dense = Segmenter(bundle, str(device)).dense
        setting = (recipe.scale, bundle.entropy_threshold, device)
        task = TASKS[recipe.refiner.network](
            refiner, dense, classes, refiner_frames, val_frames, recipe.refiner, *setting
        )
        origin = {**_origin(recipe, refiner_frames), "recall": recipe.recall, "dense": bundle.dense.sha256}
        refiner = train(task, recipe.refiner, runs, "refiner", recipe.seed, device, origin)
        provenance = {**bundle.provenance, "refiner": stage_summary(recipe.refiner)}
        if recipe.ensembler:
            origin["refiner"] = weights_digest(refiner)
            torch.manual_seed(recipe.seed)
            task = EnsemblerTask(refiner, dense, classes, refiner_frames, val_frames, recipe.ensembler, *setting)
            refiner.ensembler = train(task, recipe.ensembler, runs, "ensembler", recipe.seed, device, origin)
            provenance["ensembler"] = stage_summary(recipe.ensembler)
        spec = _save(folder, refiner, recipe.refiner, "refiner.safetensors")
        bundle = replace(bundle, refiner=spec, provenance=provenance)
        bundle.save()
    for name in (name for name in STAGES if name != "ensembler" and getattr(recipe, name)):  # its epochs are too few
        draw_curves(runs / f"{name}.jsonl", folder / f"{name}_training.png")
    write_trained_card(bundle, recipe.name)
    return bundle


def copy_dense(bundle: Bundle, folder: Path) -> Bundle:
    """``bundle`` without its refiner in ``folder``, with copies of its dense weights; ``model.yaml`` is not written."""
    folder.mkdir(parents=True, exist_ok=True)
    for spec in (bundle.dense, bundle.native):
        if spec:
            with whole(folder / spec.weights) as partial:
                shutil.copyfile(bundle.path / spec.weights, partial)
    kept = {key: value for key, value in bundle.provenance.items() if key not in ("refiner", "ensembler")}
    return replace(bundle, path=folder, name=folder.name, refiner=None, provenance=kept)


def _take(recipe: Recipe, classes: ClassList, folder: Path) -> Bundle:
    """The dense networks and the threshold of the bundle that ``recipe`` names, as a bundle in ``folder``."""
    assert recipe.bundle
    source = Bundle.load(recipe.bundle)
    if source.scale != recipe.scale:
        raise TrainingError(
            f"recipe {recipe.name!r} has scale {recipe.scale:g}, but bundle {recipe.bundle!r}, whose threshold it "
            f"takes, has {source.scale:g}; write that"
        )
    if source.path.resolve() == folder.resolve():
        raise TrainingError(f"the new bundle would replace the one it comes from, {folder}; give another name")
    if source.classes.names != classes.names:
        raise TrainingError(
            f"recipe {recipe.name!r}: the frames have the classes of {classes.name}, bundle {recipe.bundle!r} those of "
            f"{source.classes.name}; ids must mean the same"
        )
    bundle = copy_dense(source, folder)
    return replace(bundle, provenance={**bundle.provenance, "bundle": recipe.bundle})


def _train_dense(
    recipe: Recipe, data: Path | None, val_frames: Sequence[Sample], runs: Path, folder: Path, device: torch.device
) -> Bundle:
    """A bundle in ``folder``: dense segmenter, threshold and, where the recipe has one, the HR baseline."""
    assert recipe.dense
    classes, train_frames = load_split(recipe.dataset, "train", data)
    height, width = train_frames[0].image.shape[:2]

    dense = _build(DENSE, recipe, recipe.dense, len(classes))
    if recipe.encoder:
        start_encoder(dense, recipe.encoder)
    dense_task = DenseTask(dense, classes, train_frames, val_frames, recipe.dense, recipe.scale, device)
    origin = _origin(recipe, train_frames)
    dense = train(dense_task, recipe.dense, runs, "dense", recipe.seed, device, {**origin, "encoder": recipe.encoder})
    if recipe.low:
        started = {**origin, "start": weights_digest(dense)}
        dense_task = DenseTask(dense, classes, train_frames, val_frames, recipe.low, recipe.scale, device)
        dense = train(dense_task, recipe.low, runs, "low", recipe.seed, device, started)
    bundle = Bundle(
        path=folder, name=recipe.name, classes=classes, scale=recipe.scale, native_size=(height, width),
        dense=_save(folder, dense, recipe.dense, "dense.safetensors"),
        provenance={
            "version": __version__, "torch": str(torch.__version__), "device": _device_name(device),
            "seed": recipe.seed, "dataset": recipe.dataset,
            "frames": {"train": len(train_frames), "val": len(val_frames)},
            **({"encoder": recipe.encoder} if recipe.encoder else {}),
            "dense": stage_summary(recipe.dense), **({"low": stage_summary(recipe.low)} if recipe.low else {}),
        },
    )  # fmt: skip
    bundle.save()
    bundle = calibrate_bundle(bundle, val_frames, recipe.recall, str(device))
    if recipe.native:
        native, started = copy.deepcopy(dense), {**origin, "start": weights_digest(dense)}
        native_task = DenseTask(native, classes, train_frames, val_frames, recipe.native, 1.0, device)
        native = train(native_task, recipe.native, runs, "native", recipe.seed, device, started)
        spec = _save(folder, native, recipe.native, "native.safetensors")
        bundle = replace(bundle, native=spec, provenance={**bundle.provenance, "native": stage_summary(recipe.native)})
        bundle.save()
    return bundle


def _origin(recipe: Recipe, frames: Sequence[Sample]) -> dict[str, Any]:
    """What a training on ``frames`` depends on. Labels that were read may have been corrected since; those that are
    rendered come from the data set's description, and may differ by a pixel from machine to machine."""
    read = recipe.dataset.get("kind") in ("camvid", "folder")
    return {"dataset": recipe.dataset, **({"labels": digest(frame.label for frame in frames)} if read else {})}


def stage_summary(stage: StageRecipe) -> dict[str, object]:
    """``stage`` as plain data, for a bundle's provenance."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(stage).items()}


def _build(table: Mapping[str, Callable[..., Any]], recipe: Recipe, stage: StageRecipe, num_classes: int) -> Any:
    """The network of ``stage``, its weights random by the recipe's seed; TrainingError where it cannot be built."""
    torch.manual_seed(recipe.seed)
    try:
        return build(table, stage.network, num_classes, stage.args)
    except ValueError as error:
        raise TrainingError(f"recipe {recipe.name!r}: {error}") from error


def _save(folder: Path, module: nn.Module, stage: StageRecipe, file: str) -> NetworkSpec:
    """As ``save_network``; TrainingError where the file cannot be written, as on a full disk."""
    try:
        return save_network(folder, module, stage.network, stage.args, file)
    except OSError as error:
        raise TrainingError(
            f"cannot write {folder / file}: {error.strerror}; make room for it and give the same command again: its "
            "training is done"
        ) from error


def weights_digest(module: nn.Module) -> str:
    """SHA-256 of the weights of ``module``."""
    digest = hashlib.sha256()
    for tensor in module.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
