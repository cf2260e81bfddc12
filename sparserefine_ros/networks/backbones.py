"""Image encoders that give features at several strides, by name. Built from a configuration, nothing is downloaded.

`timm/MODEL` is timm's model of that name, where timm can be imported: its torchvision is not there for every machine.

Shape shorthand: B images, H, W input height and width, C channels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparserefine_ros.networks.compact import CompactEncoder


class Backbone(nn.Module):
    """Normalised images [B, 3, H, W] to one feature [B, C, H / stride, W / stride] for each of ``strides``.

    H and W divide by the largest stride.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]


class CompactBackbone(Backbone):
    """The package's own, for training from scratch: strides 2, 4, 8 and 16."""

    strides = (2, 4, 8, 16)

    def __init__(self) -> None:
        super().__init__()
        self.model = CompactEncoder()
        self.channels = tuple(self.model.widths)

    def forward(self, images: Tensor) -> Sequence[Tensor]:
        return self.model.encode(images)


class ResNet50(Backbone):
    """He et al., 2016, without its classifier: the stem before its pooling, and the stages of strides 8 and 32."""

    channels, strides = (64, 512, 2048), (2, 8, 32)

    def __init__(self) -> None:
        super().__init__()
        transformers = _transformers("resnet50")
        self.model = transformers.ResNetModel(transformers.ResNetConfig(depths=[3, 4, 6, 3]))

    def forward(self, images: Tensor) -> Sequence[Tensor]:
        stem = self.model.embedder.embedder(images)
        x, features = self.model.embedder.pooler(stem), [stem]
        for stage in self.model.encoder.stages:
            x = stage(x)
            features.append(x)
        return features[0], features[2], features[4]


class ConvNextLarge(Backbone):
    """Liu et al., 2022: it has no stride 2, so the stages of strides 4, 8 and 32, each behind a LayerNorm."""

    channels, strides = (192, 384, 1536), (4, 8, 32)

    def __init__(self) -> None:
        super().__init__()
        transformers = _transformers("convnext_large")
        config = transformers.ConvNextConfig(
            depths=[3, 3, 27, 3], hidden_sizes=[192, 384, 768, 1536], out_features=["stage1", "stage2", "stage4"]
        )
        self.model = transformers.ConvNextBackbone(config)

    def forward(self, images: Tensor) -> Sequence[Tensor]:
        features: Sequence[Tensor] = self.model(images).feature_maps
        return features


class TimmBackbone(Backbone):
    """timm's model ``name``, all its strides."""

    def __init__(self, name: str) -> None:
        super().__init__()
        timm = _timm(name)
        if not TIMM_NAME.fullmatch(name) or not timm.is_model(name):
            raise ValueError(f"timm {timm.__version__} has no model {name!r}; timm.list_models() tells what it has")
        self.name = name
        self.model: Any = timm.create_model(name, pretrained=False, features_only=True)
        self.channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"  # [B, h, w, C]
        self.channels = tuple(self.model.feature_info.channels())
        self.strides = tuple(self.model.feature_info.reduction())

    def forward(self, images: Tensor) -> Sequence[Tensor]:
        try:
            features: Sequence[Tensor] = self.model(images)
        except AssertionError as error:  # so say those that take images of one size, or of multiples of some other
            height, width = images.shape[2:]
            raise ValueError(f"timm's {self.name!r} does not take images of {height}x{width}: {error}") from error
        return [x.permute(0, 3, 1, 2) for x in features] if self.channels_last else features

    def start_from(self, file: Path) -> None:
        """Takes the weights of ``file``, safetensors as published with the model."""
        timm = _timm(self.name)
        timm.create_model(self.name, checkpoint_path=str(file))  # raises unless all weights are there, and no others
        there = timm.create_model(
            self.name, pretrained=True, features_only=True, pretrained_cfg_overlay={"file": str(file)}
        )
        self.model.load_state_dict(there.state_dict())


BACKBONES: dict[str, Callable[[], Backbone]] = {
    "compact": CompactBackbone, "resnet50": ResNet50, "convnext_large": ConvNextLarge,
}  # fmt: skip
TIMM = "timm/"
TIMM_NAME = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)?")
"""A model and, behind the dot, one of its published weights; not "hf-hub:OWNER/NAME", for which timm asks the hub."""


def build_backbone(name: str) -> Backbone:
    """The backbone called ``name``, or ``timm/MODEL``.

    Raises ValueError for another name, ImportError where its package is not installed.
    """
    if str(name).startswith(TIMM):
        return TimmBackbone(name.removeprefix(TIMM))
    if name not in list(BACKBONES):  # a list has no hash to be found by
        raise ValueError(f"unknown backbone {name!r}; known are {', '.join(BACKBONES)} and {TIMM}MODEL")
    return BACKBONES[name]()


def extend(images: Tensor, multiple: int) -> Tensor:
    """Images [B, 3, H, W] with their right and bottom edge repeated until H and W divide by ``multiple``."""
    bottom, right = (-size % multiple for size in images.shape[2:])
    return F.pad(images, (0, right, 0, bottom), mode="replicate") if bottom or right else images


def _transformers(name: str) -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"backbone {name!r} needs the package transformers: pip install transformers ({error})"
        ) from error
    module: ModuleType = transformers
    return module


def _timm(name: str) -> ModuleType:
    try:
        import timm
    except Exception as error:  # where torchvision does not fit torch it raises what it likes
        raise ImportError(
            f"backbone '{TIMM}{name}' needs timm, and a torchvision that fits torch {torch.__version__}: "
            f"pip install 'sparserefine_ros[timm]' ({error})"
        ) from error
    module: ModuleType = timm
    return module
