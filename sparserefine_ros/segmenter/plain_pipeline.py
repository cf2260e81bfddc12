"""Camera pixels to mask in operators that every tensor library has: the segmenter and its refiner as one graph.

The same steps as `Segmenter`, on one image of any size. Where rounding decides (the resize at scales that are no
1 : 2, ties of the softmax), a value may fall the other way.

Shape shorthand: K classes, H, W native size, h, w low resolution, N selected pixels.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparserefine_ros.networks.entropy import entropy
from sparserefine_ros.networks.refiner import SparseRefiner
from sparserefine_ros.networks.selectors import nearest_index, upsample_nearest
from sparserefine_ros.segmenter.plain_refiner import PlainUNet, finest
from sparserefine_ros.segmenter.preprocess import MEAN, STD, averaged


class PipelineOutput(NamedTuple):
    """What the graph gives; the names are those of its outputs."""

    mask: Tensor  # [1, H, W] uint8 class ids
    confidence: Tensor  # [1, H, W] uint8, 255 times the largest softmax probability of the final prediction
    entropy: Tensor  # [1, h, w] float32, nats: of the initial prediction
    density: Tensor  # [] float32: refined pixels over all pixels


class PlainPipeline(nn.Module):
    """A dense segmenter and its refiner.

    Args:
        dense: normalised images [1, 3, h, w] to logits [1, K, h, w].
        refiner: its weights are used, its engine is not.
        scale: low resolution over native.
    """

    def __init__(self, dense: nn.Module, refiner: SparseRefiner, scale: float) -> None:
        super().__init__()
        self.dense, self.scale, self.context = dense, scale, refiner.context
        self.unet = PlainUNet(refiner.unet, refiner.stride)
        self.classifier, self.ensembler = refiner.classifier, refiner.ensembler
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(MEAN) * 255)
        self.register_buffer("std", torch.tensor(STD) * 255)

    def forward(self, image: Tensor, entropy_threshold: Tensor) -> PipelineOutput:
        """RGB image [1, H, W, 3] uint8 and a threshold [] float32, nats."""
        height, width = image.shape[1:3]
        low = image[0].float() if self.scale == 1 else shrink(image[0], self.scale)  # [h, w, 3]
        logits = self.dense(self._normalised(low).permute(2, 0, 1)[None]).float()  # [1, K, h, w]
        probabilities = logits.softmax(1)
        uncertainty = entropy(probabilities, 1)  # [1, h, w]
        mask, confidence = (upsample_nearest(x, (height, width)).view(-1) for x in _answer(probabilities))
        level = finest(upsample_nearest(uncertainty > entropy_threshold, (height, width))[0])
        flat = level.row * width + level.column  # [N]
        low_width = logits.shape[3]
        source = nearest_index(logits.shape[2], height)[level.row] * low_width
        source = source + nearest_index(low_width, width)[level.column]
        initial = _rows(logits).index_select(0, source)  # [N, K]
        x = self._normalised(image.view(-1, 3).index_select(0, flat).float())  # [N, 3]
        if self.context:
            x = torch.cat([x, _rows(probabilities).index_select(0, source)], 1)
        refined = self.classifier(self.unet(x, level))
        final = _answer(self.ensembler(initial, refined).softmax(1))
        mask, confidence = (
            dense.index_put((flat,), chosen) for dense, chosen in zip((mask, confidence), final, strict=True)
        )
        size = (1, height, width)
        density = level.row.new_tensor(1.0, dtype=torch.float32) * level.row.shape[0] / (height * width)
        return PipelineOutput(
            mask.view(size).to(torch.uint8), confidence.view(size).to(torch.uint8), uncertainty, density
        )

    def _normalised(self, pixels: Tensor) -> Tensor:  # [..., 3] float
        result: Tensor = (pixels - self.mean) / self.std
        return result


def shrink(image: Tensor, scale: float) -> Tensor:
    """[H, W, 3] uint8 to [h, w, 3] float of whole numbers: `preprocess.shrink` of a size that is not known yet."""
    height, width = image.shape[:2]
    h, w = (_low_size(size, scale) for size in (height, width))
    taps = math.ceil(1.5 / scale) + 1  # 1.5 rows at low resolution are rounded to one
    both = averaged(averaged(image.float(), h, taps).transpose(0, 1), w, taps).transpose(0, 1)
    halved = (height == 2 * h) & (width == 2 * w)
    return torch.where(_tensor(halved), (both + 0.5).floor(), both.round())


def _low_size(size: Any, scale: float) -> Tensor:
    """As `low_resolution_size`: at least one, halves to even."""
    return (_tensor(size).double() * scale).round().long().clamp(min=1)


def _tensor(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else torch.tensor(x)


def _rows(x: Tensor) -> Tensor:
    """[1, K, h, w] as [h w, K]."""
    return x[0].flatten(1).transpose(0, 1)


def _answer(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Class ids and confidences, 0 to 255, over axis 1 of ``probabilities``; int32, as few runtimes scatter bytes."""
    top = probabilities.max(1)
    return top.indices.int(), (top.values * 255).round().int()
