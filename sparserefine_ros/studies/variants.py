"""Refiners that the ablations train beside the one that ships: other inputs, and no neighbours at all.

Shape shorthand: K classes, N selected pixels, C channels, F channels of the dense segmenter's features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparserefine_ros.errors import TrainingError
from sparserefine_ros.networks.refiner import SparseRefiner
from sparserefine_ros.networks.unet import SiteNorm, SparseUNet
from sparserefine_ros.segmenter.head import gather_initial
from sparserefine_ros.sparse import Pyramid, SiteSet
from sparserefine_ros.studies.features import FeatureTap
from sparserefine_ros.training.ensembler import EnsemblerTask
from sparserefine_ros.training.refiner import RefinerTask

PERCEPTRON = (64, 128, 256, 128)  # about as many multiply-adds a pixel as the camvid bundle's U-Net


@dataclass(frozen=True)
class Variant:
    """One refiner to train. Everything but ``label`` decides what comes out."""

    label: str  # its row in the table
    args: dict[str, Any] = field(default_factory=dict)  # of SparseRefiner
    features: bool = False  # it also reads the input of the dense segmenter's classifier
    pointnet: bool = False  # a perceptron in place of the U-Net


class PixelPerceptron(nn.Module):
    """The shared perceptron of PointNet (Qi et al., 2017): every pixel by itself."""

    def __init__(self, in_channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for cin, cout in zip((in_channels, *widths), widths, strict=False):
            layers += [nn.Linear(cin, cout, bias=False), SiteNorm(cout), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor, pyramid: Pyramid) -> Tensor:  # [N, in_channels] -> [N, C]
        features: Tensor = self.layers(x)
        return features


class FeatureTask(RefinerTask):
    """A refiner that reads the dense segmenter's features beside the colours, by nearest neighbour.

    Raises TrainingError for a dense segmenter whose features are not known.
    """

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.tap = FeatureTap(self.dense)
        if self.tap.channels == 0:
            raise TrainingError(f"{type(self.dense).__name__} has no 1x1 classifier to take features from")

    def inputs(self, images: Tensor, sites: SiteSet) -> Tensor:  # -> [N, 3 + F]
        assert self.tap.latest is not None
        return torch.cat([super().inputs(images, sites), gather_initial(self.tap.latest, sites)], 1)


class FeatureGateTask(FeatureTask, EnsemblerTask):
    """The gate of a refiner that reads features, trained anew."""


def build_variant(variant: Variant, num_classes: int, feature_channels: int) -> SparseRefiner:
    """The refiner of ``variant``. Where it reads features, they come in the columns after the colours."""
    refiner = SparseRefiner(num_classes, **variant.args)
    in_channels = 3 + feature_channels * variant.features + num_classes * refiner.context
    width = refiner.classifier.in_features
    if variant.pointnet:
        refiner.unet = PixelPerceptron(in_channels, (*PERCEPTRON, width))  # type: ignore[assignment]
        refiner.levels = 1
    elif variant.features:
        refiner.unet = SparseUNet(in_channels, variant.args["channels"], variant.args.get("blocks", 2))
    return refiner
