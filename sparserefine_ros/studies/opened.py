"""A bundle's pipeline opened between selector and refiner, so that other selections can be put in.

Shape shorthand: K classes, C feature channels, H, W native size, h, w low resolution, N selected pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparserefine_ros.datasets.base import Sample
from sparserefine_ros.errors import BundleError
from sparserefine_ros.networks.refiner import SparseRefiner
from sparserefine_ros.networks.selectors import EntropySelector, Prediction, upsample_nearest
from sparserefine_ros.segmenter.bundle import Bundle
from sparserefine_ros.segmenter.head import gather_initial
from sparserefine_ros.segmenter.preprocess import normalise, resize
from sparserefine_ros.segmenter.refiner_input import refiner_input
from sparserefine_ros.segmenter.segmenter import Segmenter
from sparserefine_ros.sparse import SiteSet
from sparserefine_ros.studies.features import FeatureTap


class Opened:
    """The dense prediction of a frame, and what the refiner makes of any selection on it.

    Raises BundleError for a bundle without a trained refiner.
    """

    def __init__(self, bundle: Bundle, device: torch.device) -> None:
        self.segmenter = Segmenter(bundle, str(device), refine=True)
        if not isinstance(self.segmenter.refiner, SparseRefiner):
            raise BundleError(f"the refiner of bundle {bundle.name!r} is not a sparse U-Net; choose camvid or street")
        self.refiner: SparseRefiner = self.segmenter.refiner
        self.tap = FeatureTap(self.segmenter.dense)

    @torch.inference_mode()
    def look(self, sample: Sample) -> Prediction:
        """The initial prediction of ``sample`` with all that a selector may look at; batch of one."""
        size = (sample.image.shape[0], sample.image.shape[1])
        device = self.segmenter.device
        low = torch.from_numpy(resize(sample.image, self.segmenter.low_size(size)))[None].to(device)
        logits = self.segmenter.dense(normalise(low)).float()  # [1, K, h, w]
        native = normalise(torch.from_numpy(sample.image)[None].to(device))  # [1, 3, H, W]
        labels = None if sample.label is None else torch.from_numpy(sample.label)[None].to(device)
        return Prediction(logits, size, native, self.tap.latest, labels)

    def uncertain(self, prediction: Prediction) -> Tensor:
        """What the bundle itself selects, bool [1, H, W]."""
        return EntropySelector(self.segmenter.entropy_threshold)(prediction)

    def initial_mask(self, prediction: Prediction) -> Tensor:
        """Class ids without refinement, uint8 [1, H, W]."""
        return upsample_nearest(prediction.logits.argmax(1).to(torch.uint8), prediction.size)

    @torch.inference_mode()
    def predictions(self, sample: Sample, prediction: Prediction, selected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the pixels of ``selected``, bool [1, H, W]: flat positions [N], initial and refined logits [N, K]."""
        sites, features = self._features(sample, prediction, selected)
        return sites.flat, gather_initial(prediction.logits, sites), self.refiner.classifier(features)

    @torch.inference_mode()
    def refine(self, sample: Sample, prediction: Prediction, selected: Tensor) -> np.ndarray:
        """Class ids [H, W] uint8 with the pixels of ``selected``, bool [1, H, W], refined as the bundle does."""
        mask = self.initial_mask(prediction)
        if bool(selected.any()):
            sites, features = self._features(sample, prediction, selected)
            self.segmenter.head.merge(features, prediction.logits, sites, mask, torch.empty_like(mask))
        result: np.ndarray = mask[0].cpu().numpy()
        return result

    def _features(self, sample: Sample, prediction: Prediction, selected: Tensor) -> tuple[SiteSet, Tensor]:
        """The selected sites and what the refiner's classifier reads there, [N, C]."""
        native = torch.from_numpy(sample.image)[None].to(selected.device)
        context = (prediction.logits.softmax(1),) if self.refiner.context else ()
        pyramid = self.refiner.pyramid(selected)
        sites = pyramid.levels[0]
        return sites, self.refiner.features(refiner_input(sites, native, *context), pyramid)
