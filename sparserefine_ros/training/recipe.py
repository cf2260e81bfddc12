"""A training recipe: everything a run needs to be repeated, read from one YAML file (``config/train/*.yaml``)."""

from __future__ import annotations

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
        if not 0 < self.hardest <= 1:
            raise TrainingError(f"hardest {self.hardest} is out of range; give a share above 0 and at most 1")


@dataclass(frozen=True)
class Recipe:
    """One bundle: its data, its dense segmenter and, where it has one, its refiner.

    The dense segmenter is trained (``dense``, and on with ``low`` and ``native``) or taken from another bundle.
    """

    name: str
    dataset: dict[str, Any]  # kind: camvid | street, and that reader's arguments
    scale: float  # low resolution over native resolution
    dense: StageRecipe | None = None
    encoder: str | None = None  # what its encoder starts from: a bundle, or a file of timm's weights for that of timm
    bundle: str | None = None  # a bundle whose dense segmenter, threshold and HR baseline this one has
    refiner: StageRecipe | None = None
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

    @staticmethod
    def load(path: str | Path) -> Recipe:
        """Raises TrainingError for a missing file, an unknown key or a missing one."""
        try:
            data = load_yaml(Path(path))
        except (OSError, ValueError) as error:
            raise TrainingError(f"cannot read recipe {path}: {error}") from error
        if not isinstance(data, dict):
            raise TrainingError(f"recipe {path} holds {type(data).__name__}; expected a mapping, see config/train")
        stages = {key: _stage(path, key, data[key]) for key in ("dense", "low", "native", "refiner") if key in data}
        return _fill(Recipe, path, {**data, **stages})


def _stage(path: str | Path, key: str, data: Any) -> StageRecipe:
    if not isinstance(data, dict):
        raise TrainingError(f"recipe {path} has no section {key!r}; see config/train for an example")
    for pair in ("crop", "scale"):
        if pair in data:
            data[pair] = tuple(data[pair])
    return _fill(StageRecipe, f"{path}: {key}", data)


def _fill(cls: Any, where: object, data: dict[str, Any]) -> Any:
    known = [f.name for f in fields(cls)]
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise TrainingError(f"recipe {where} has unknown key {unknown[0]!r}; known are {', '.join(known)}")
    try:
        return cls(**data)
    except (TypeError, TrainingError) as error:
        raise TrainingError(f"recipe {where}: {error}") from error
