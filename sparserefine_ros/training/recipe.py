"""A training recipe: everything a run needs to be repeated, read from one YAML file (``config/train/*.yaml``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sparserefine_ros.errors import TrainingError
from sparserefine_ros.untrusted import load_yaml


@dataclass(frozen=True)
class StageRecipe:
    """How one network of the bundle is trained."""

    network: str  # a name of networks.registry
    args: dict[str, Any] = field(default_factory=dict)  # its keyword arguments
    epochs: int = 100
    batch: int = 8
    crop: tuple[int, int] = (180, 240)  # height, width of a training crop: network input (dense), native (refiner)
    scale: tuple[float, float] = (0.5, 1.0)  # the image is resized by a factor from this range (log-uniform) first
    lr: float = 1e-3  # peak of the cosine schedule
    weight_decay: float = 1e-2
    warmup: float = 0.03  # share of the steps in which the learning rate rises
    schedule: str = "cosine"  # how it falls: cosine, or poly = (1 - share of the steps) ** 0.9
    encoder_lr: float = 1.0  # factor on it for parameters under "encoder."
    ema: float = 0.998  # decay of the averaged weights, which are the ones that ship
    class_weight_power: float = 0.5  # 0: plain cross-entropy, 1: median-frequency weights
    hardest: float = 1.0  # share of the pixels, those of highest loss, that count in a dense stage
    validate_every: int = 10  # epochs

    def __post_init__(self) -> None:
        if self.schedule not in ("cosine", "poly"):
            raise TrainingError(f"schedule {self.schedule!r} is unknown; choose cosine or poly")
        for name in ("epochs", "batch", "validate_every"):
            _check(self, name, "a whole number from 1 on", lambda v: _whole(v) and v >= 1)
        _check(self, "crop", "[height, width] in pixels", lambda v: _pair(v) and all(_whole(n) and n >= 1 for n in v))
        _check(self, "scale", "[smallest, largest], both above 0", lambda v: _pair(v) and 0 < v[0] <= v[1])
        _check(self, "hardest", "a share above 0 and at most 1", lambda v: _number(v) and 0 < v <= 1)
        _check(self, "lr", "a number above 0, as in 0.001 (1e-3 is a word to YAML)", lambda v: _number(v) and v > 0)
        for name in ("weight_decay", "encoder_lr", "class_weight_power"):
            _check(self, name, "a number from 0 on", lambda v: _number(v) and v >= 0)
        _check(self, "warmup", "a share from 0 to 1", lambda v: _number(v) and 0 <= v <= 1)
        _check(self, "ema", "a number from 0 to below 1", lambda v: _number(v) and 0 <= v < 1)
        _check(self, "args", "a mapping", lambda v: isinstance(v, Mapping))


STAGES = ("dense", "low", "native", "refiner", "ensembler")
"""The sections of a recipe that are trained, in their order."""


@dataclass(frozen=True)
class Recipe:
    """One bundle: its data, its dense segmenter and, where it has one, its refiner.

    The dense segmenter is trained (``dense``, and on with ``low`` and ``native``) or taken from another bundle.
    """

    name: str
    dataset: dict[str, Any]  # kind: camvid | street | folder, and that reader's arguments
    scale: float  # low resolution over native resolution
    dense: StageRecipe | None = None
    encoder: str | None = None  # what its encoder starts from: a bundle, or a file of timm's weights for that of timm
    bundle: str | None = None  # a bundle whose dense segmenter, threshold and HR baseline this one has
    refiner: StageRecipe | None = None
    ensembler: StageRecipe | None = None  # the refiner's ensembler, trained anew on the finished sparse branch
    low: StageRecipe | None = None  # the dense network tuned further at low resolution
    native: StageRecipe | None = None  # the dense network tuned further at native resolution: the HR baseline
    recall: float = 0.8  # the share of wrong pixels that the entropy threshold is calibrated for (appendix A1)
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.dense is None) == (self.bundle is None):
            raise TrainingError("recipe has no section 'dense' and no 'bundle', or both; give one, see config/train")
        if self.bundle and (self.encoder or self.low or self.native or not self.refiner):
            raise TrainingError(
                f"recipe takes bundle {self.bundle!r} as it is; give a refiner, no encoder, no low, no native"
            )
        if self.ensembler:
            gated = self.refiner is not None and self.refiner.args.get("ensembler", "gated") == "gated"
            if self.ensembler.network != "gated" or not gated:
                raise TrainingError(
                    f"section 'ensembler' trains {self.ensembler.network!r}; only gated has something to learn: give "
                    "network: gated, and a refiner with that ensembler"
                )
        _check(self, "name", "a name for its folders", lambda v: isinstance(v, str) and Path(v).name == v)
        _check(self, "dataset", "a mapping, see config/train", lambda v: isinstance(v, Mapping))
        for name in ("scale", "recall"):
            _check(self, name, "a number above 0 and at most 1", lambda v: _number(v) and 0 < v <= 1)
        _check(self, "seed", "a whole number from 0 on", lambda v: _whole(v) and v >= 0)
        for name in ("low", "native"):
            stage = getattr(self, name)
            if stage and self.dense and (stage.network, stage.args) != (self.dense.network, self.dense.args):
                raise TrainingError(f"section {name!r} has other network or args than 'dense', which it goes on from")

    @staticmethod
    def load(path: str | Path) -> Recipe:
        """Raises TrainingError for a missing file, an unknown key or a missing one."""
        try:
            data = load_yaml(Path(path))
        except (OSError, ValueError) as error:
            raise TrainingError(f"cannot read recipe {path}: {error}") from error
        if not isinstance(data, dict):
            raise TrainingError(f"recipe {path} holds {type(data).__name__}; expected a mapping, see config/train")
        stages = {key: _stage(path, key, data[key]) for key in STAGES if key in data}
        return _fill(Recipe, path, {**data, **stages})


def _stage(path: str | Path, key: str, data: Any) -> StageRecipe:
    if not isinstance(data, dict):
        raise TrainingError(f"recipe {path} has no section {key!r}; see config/train for an example")
    for pair in ("crop", "scale"):
        if isinstance(data.get(pair), list):
            data[pair] = tuple(data[pair])
    return _fill(StageRecipe, f"{path}: {key}", data)


def _check(recipe: Any, name: str, right: str, valid: Callable[[Any], bool]) -> None:
    value = getattr(recipe, name)
    if not valid(value):
        raise TrainingError(f"{name} {value!r} is out of range; give {right}")


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(_number, value))


def _fill(cls: Any, where: object, data: dict[str, Any]) -> Any:
    known = [f.name for f in fields(cls)]
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise TrainingError(f"recipe {where} has unknown key {unknown[0]!r}; known are {', '.join(known)}")
    try:
        return cls(**data)
    except (TypeError, TrainingError) as error:
        raise TrainingError(f"recipe {where}: {error}") from error
