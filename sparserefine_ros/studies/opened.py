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
from sparserefine_ros.networks.selectors import Prediction, upsample_nearest
from sparserefine_ros.segmenter.bundle import Bundle
from sparserefine_ros.segmenter.preprocess import normalise, resize
from sparserefine_ros.segmenter.segmenter import Segmenter, refiner_input
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

    @torch.inference_mode()
    def refine(self, sample: Sample, prediction: Prediction, selected: Tensor) -> np.ndarray:
        """Class ids [H, W] uint8 with the pixels of ``selected``, bool [1, H, W], refined."""
        mask = upsample_nearest(prediction.logits.argmax(1).to(torch.uint8), prediction.size)  # [1, H, W]
        if bool(selected.any()):
            native = torch.from_numpy(sample.image)[None].to(selected.device)
            context = (prediction.logits.softmax(1),) if self.refiner.context else ()
            pyramid = self.refiner.pyramid(selected)
            features = self.refiner.features(refiner_input(pyramid.levels[0], native, *context), pyramid)  # [N, C]
            self.segmenter.head.merge(features, prediction.logits, pyramid.levels[0], mask, torch.empty_like(mask))
        result: np.ndarray = mask[0].cpu().numpy()
        return result
