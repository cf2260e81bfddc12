"""Checkpoints in the form of the Hugging Face hub: a folder with config.json and weights, in one file or several.

What to build is read from config.json, of which only the keys that shape a network are kept; the names of the weights
are those that the hub's files have, also where newer versions of transformers call their modules otherwise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sparserefine_ros.errors import BundleError
from sparserefine_ros.networks.hub_config import MASK2FORMER_KEYS, SEGFORMER_KEYS, SWIN_KEYS
from sparserefine_ros.segmenter.checkpoints import read_checkpoint
from sparserefine_ros.segmenter.mmseg_names import Architecture, Renames
from sparserefine_ros.segmenter.preprocess import MEAN, STD
from sparserefine_ros.untrusted import read_text

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""In the order of choice. Weights in several files have an index of that name and ``INDEX``."""
INDEX = ".index.json"
DEFAULT_CLASSES = 2
"""Of a configuration that names none: transformers leaves out what is its default."""

ATTENTION: Renames = (
    (r"\.attention\.self\.query\.", ".attention.q_proj."),
    (r"\.attention\.self\.key\.", ".attention.k_proj."),
    (r"\.attention\.self\.value\.", ".attention.v_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
)
SEGFORMER: Renames = (
    (r"^segformer\.encoder\.patch_embeddings\.(\d)\.", r"encoder.stages.\1.patch_embeddings."),
    (r"^segformer\.encoder\.block\.(\d)\.", r"encoder.stages.\1.blocks."),
    (r"^segformer\.encoder\.layer_norm\.(\d)\.", r"encoder.stages.\1.layer_norm."),
    *ATTENTION,
    (r"\.attention\.self\.sr\.", ".attention.sequence_reduction.sequence_reduction."),
    (r"\.attention\.self\.layer_norm\.", ".attention.sequence_reduction.layer_norm."),
    (r"\.layer_norm_1\.", ".layernorm_before."),
    (r"\.layer_norm_2\.", ".layernorm_after."),
    (r"\.mlp\.dense([12])\.", r".mlp.fc\1."),
    (r"^decode_head\.linear_c\.(\d)\.proj\.", r"levels.\1."),
    (r"^decode_head\.linear_fuse\.", "fusion.0."),
    (r"^decode_head\.batch_norm\.", "fusion.1."),
    (r"^decode_head\.classifier\.", "classifier."),
)
MASK2FORMER: Renames = (
    (r"^(model\.pixel_level_module\.encoder)\.(embeddings|encoder)\.", r"\1.swin.\2."),
    *ATTENTION,
    (r"\.attention\.self\.(relative_position_bias_table)$", r".attention.relative_position_bias.\1"),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)


@dataclass(frozen=True)
class Family:
    """A class of transformers, the network that it becomes, and what of its configuration shapes that."""

    network: str
    keys: tuple[str, ...]
    backbone_keys: tuple[str, ...]
    renames: Renames
    unneeded: tuple[tuple[str, str], ...] = ()


FAMILIES = {
    "SegformerForSemanticSegmentation": Family(
        "segformer-hub",
        SEGFORMER_KEYS,
        (),
        SEGFORMER,
    ),
    "Mask2FormerForUniversalSegmentation": Family(
        "mask2former",
        MASK2FORMER_KEYS,
        SWIN_KEYS,
        MASK2FORMER,
        (
            (r"^criterion\.", "used in training only"),
            (r"\.relative_position_index$", "an index table, computed here"),
            (r"^model\.pixel_level_module\.encoder\.swin\.layernorm\.", "of features that nothing reads"),
        ),
    ),
}  # fmt: skip
"""Classes that config.json may name."""


def read_architecture(folder: Path, num_classes: int) -> tuple[str, Architecture]:
    """The class that ``folder``'s config.json names and what to build for it.

    Raises:
        BundleError: an unreadable file, an unknown class or backbone, another number of classes, or a
            preprocessor_config.json that scales or normalises images otherwise than ours are.
    """
    try:
        return _read_architecture(folder, num_classes)
    except (TypeError, AttributeError) as error:
        raise BundleError(
            f"cannot use the settings in {folder}: {error}; give a folder as downloaded from the hub"
        ) from error


def _read_architecture(folder: Path, num_classes: int) -> tuple[str, Architecture]:
    """Raises TypeError or AttributeError for values that are no lists, no mappings or no numbers where some are due."""
    config = _read(folder / "config.json")
    name = str(next(iter(config.get("architectures") or ()), None))
    if name not in FAMILIES:
        raise BundleError(f"{folder / 'config.json'} is of class {name}; known are {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    found = len(config["id2label"]) if "id2label" in config else config.get("num_labels", DEFAULT_CLASSES)
    if found != num_classes:
        raise BundleError(f"{folder / 'config.json'} has {found} classes, --classes has {num_classes}")
    _check_statistics(folder / "preprocessor_config.json")
    kept = {key: config[key] for key in family.keys if key in config}
    if family.backbone_keys:
        backbone = config.get("backbone_config") or {}
        if backbone.get("model_type") != "swin":
            raise BundleError(f"{folder / 'config.json'} has backbone {backbone.get('model_type')!r}; known is 'swin'")
        kept["backbone_config"] = {key: backbone[key] for key in family.backbone_keys if key in backbone}
    return name, Architecture(family.network, lambda weights: {"config": kept}, family.renames, (), family.unneeded)


def class_names(folder: Path) -> tuple[str, ...]:
    """Of ``folder``'s config.json, which `read_architecture` takes, in the order of their ids."""
    names = _read(folder / "config.json").get("id2label")
    if not isinstance(names, dict):
        return ()
    try:
        return tuple(str(names[key]) for key in sorted(names, key=int))
    except ValueError:
        return ()


def read_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The file that says which weights there are, and these; BundleError where there are none or some are missing."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name, read_checkpoint(folder / name).weights
        index = folder / (name + INDEX)
        if index.is_file():
            parts = _read(index).get("weight_map")
            files = sorted(set(map(str, parts.values()))) if isinstance(parts, dict) else []
            if not files or any(Path(file).name != file or not (folder / file).is_file() for file in files):
                raise BundleError(f"{index} names files that are not in its folder: {', '.join(files)[:200]}")
            return index, {key: t for file in files for key, t in read_checkpoint(folder / file).weights.items()}
    raise BundleError(
        f"{folder} has no weights: none of {', '.join(WEIGHTS)}, whole or in several files with their {INDEX}; "
        "with transformers, save_pretrained(FOLDER) writes them"
    )


def _check_statistics(file: Path) -> None:
    """Networks of the hub that were trained on other means and deviations would see wrong colours."""
    if not file.exists():
        return
    settings = _read(file)
    for key in ("do_rescale", "do_normalize"):
        if settings.get(key) is False:
            raise BundleError(f"{file} has {key} false; images are scaled to 1 and normalised here")
    factor = settings.get("rescale_factor", 1 / 255)
    if not math.isclose(factor, 1 / 255, rel_tol=1e-3):
        raise BundleError(f"{file} has rescale_factor {factor}; images are scaled by 1/255 here")
    for key, ours in (("image_mean", MEAN), ("image_std", STD)):
        theirs = settings.get(key, ours)
        if len(theirs) != 3 or not all(math.isclose(a, b, abs_tol=1e-4) for a, b in zip(theirs, ours, strict=True)):
            raise BundleError(f"{file} has {key} {theirs}; images are normalised with {list(ours)} here")


def _read(file: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(read_text(file))
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"cannot read {file}: {error}; give a folder as downloaded from the hub") from error
    if not isinstance(data, dict):
        raise BundleError(f"{file} holds a {type(data).__name__}; give a folder as downloaded from the hub")
    return data
