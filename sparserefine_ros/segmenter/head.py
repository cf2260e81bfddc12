"""The per-pixel ends of the pipeline: what the dense logits say of a pixel, and how the refiner's answer is blended in.

Shape shorthand: B images, K classes, C feature channels, H, W native size, h, w low resolution, N selected pixels.
"""

from __future__ import annotations

import ctypes
import logging
import math
from collections.abc import Callable, Iterator
from ctypes import c_int64, c_void_p
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparserefine_ros.errors import BundleError
from sparserefine_ros.native import PARALLEL, NativeError, address, load, parallel
from sparserefine_ros.networks.ensemblers import DirectEnsembler, GatedEnsembler
from sparserefine_ros.networks.entropy import entropy
from sparserefine_ros.networks.registry import Refiner
from sparserefine_ros.networks.selectors import nearest_index
from sparserefine_ros.sparse import SiteSet

KERNEL = Path(__file__).with_name("head_kernel.c")
HIDDEN, MAX_CHANNELS = 64, 256  # what the kernel is written for
CHUNK = 1024  # pixels a thread takes at a time
# Blocks of pixels under one pixel of the logits pay where no more than a tenth of their places is empty: the initial
# prediction's share of the work is done once a block, the rest for every place.
MAX_PLACES = 1.1

logger = logging.getLogger("sparserefine_ros")


@dataclass(frozen=True)
class Initial:
    """The dense segmenter's prediction at low resolution."""

    entropy: Tensor  # [B, h, w] float32, nats
    mask: Tensor  # [B, h, w] uint8
    confidence: Tensor  # [B, h, w] uint8, 255 times the largest probability
    probabilities: Tensor | None  # [B, K, h, w] float32, for a refiner that reads them
    finite: Tensor | bool  # False where logits were NaN or infinite; [] on the device, for whom it may concern later


class Head:
    """Plain torch: any device, any refiner."""

    def __init__(self, refiner: Refiner | None) -> None:
        self.refiner = refiner

    def initial(self, logits: Tensor) -> Initial:
        """Entropy, class and confidence of ``logits`` [B, K, h, w], from one softmax that stays in cache."""
        rows = _rows(logits)
        result = _empty(logits, self.refiner is not None and self.refiner.context)
        uncertainty, mask, confidence = (t.view(-1) for t in (result.entropy, result.mask, result.confidence))
        for part in _chunks(len(rows), logits.device):
            probabilities = rows[part].float().softmax(1)
            uncertainty[part] = entropy(probabilities)
            top = probabilities.max(1)
            mask[part] = top.indices.to(torch.uint8)
            confidence[part] = (top.values * 255).round().to(torch.uint8)
            if result.probabilities is not None:
                _rows(result.probabilities)[part] = probabilities
        return replace(result, finite=torch.isfinite(uncertainty).all())

    def merge(
        self, features: Tensor, logits: Tensor, sites: SiteSet, mask: Tensor, confidence: Tensor
    ) -> Tensor | bool:
        """Writes class and confidence of the selected pixels into ``mask`` and ``confidence`` [B, H, W] uint8.

        ``features`` [N, C] are the refiner's, ``logits`` [B, K, h, w] the dense segmenter's. False where the result is
        not finite, as `Initial.finite`.
        """
        assert self.refiner is not None
        finite = torch.ones((), dtype=torch.bool, device=features.device)
        for part in _chunks(len(sites), features.device):
            refined = self.refiner.classifier(features[part].float())
            initial = gather_initial(logits, sites, part)
            top = self.refiner.ensembler(initial.float(), refined).softmax(1).max(1)
            finite &= torch.isfinite(top.values).all()
            mask.view(-1)[sites.flat[part]] = top.indices.to(torch.uint8)
            confidence.view(-1)[sites.flat[part]] = (top.values * 255).round().to(torch.uint8)
        return finite


class NativeHead(Head):
    """The same in C, for float32 on a CPU: one pass over pixels that stay in registers.

    Predictions that are merged in another way than the two below are merged by torch.
    """

    def __init__(self, refiner: Refiner | None) -> None:
        super().__init__(refiner)
        load(PARALLEL)
        self._library = load(KERNEL)

    def initial(self, logits: Tensor) -> Initial:
        logits = logits.float()
        rows = _rows(logits)
        result = _empty(logits, self.refiner is not None and self.refiner.context)
        probabilities = None if result.probabilities is None else _rows(result.probabilities)
        job = _InitialJob(
            logits=rows.data_ptr(), pixel_stride=rows.stride(0), class_stride=rows.stride(1), classes=rows.shape[1],
            entropy=result.entropy.data_ptr(), mask=result.mask.data_ptr(), confidence=result.confidence.data_ptr(),
            probabilities=address(probabilities),
        )  # fmt: skip
        parallel(self._library, "sr_initial", job, len(rows), CHUNK)
        return replace(result, finite=not job.broken)


class NativeGated(NativeHead):
    """With the gated ensembler."""

    def __init__(self, refiner: Refiner) -> None:
        super().__init__(refiner)
        self._library.sr_group.restype = c_int64
        self._weights = _merge_weights(refiner)

    def merge(self, features: Tensor, logits: Tensor, sites: SiteSet, mask: Tensor, confidence: Tensor) -> bool:
        rows, features, flat = _rows(logits.float()), _side_by_side(features), sites.flat
        low, pixels = self._blocks(logits, sites)
        members = 1 if pixels is None else pixels.shape[1]
        job = _MergeJob(
            features=features.data_ptr(), feature_stride=features.stride(0), channels=features.shape[1],
            logits=rows.data_ptr(), pixel_stride=rows.stride(0), class_stride=rows.stride(1), classes=rows.shape[1],
            low=low.data_ptr(), pixels=address(pixels), members=members, flat=flat.data_ptr(),
            mask=mask.data_ptr(), confidence=confidence.data_ptr(),
            **{name: weight.data_ptr() for name, weight in self._weights.items()},
        )  # fmt: skip
        parallel(self._library, "sr_merge", job, len(low), max(1, CHUNK // members))
        return not job.broken

    def _blocks(self, logits: Tensor, sites: SiteSet) -> tuple[Tensor, Tensor | None]:
        """Sites by the pixel of the logits they lie under: its row [blocks], and their own rows [blocks, members], -1
        where a block has fewer. Without the latter every site is a block of its own."""
        low, (batch, height, width) = low_rows(logits, sites), logits.shape[:1] + logits.shape[2:]
        members = math.ceil(sites.shape[1] / height) * math.ceil(sites.shape[2] / width)
        capacity = int(MAX_PLACES * len(sites) / members)
        if members == 1 or capacity == 0:
            return low, None
        head = torch.empty(batch * height * width, dtype=torch.int32)
        block_low, pixels = torch.empty(capacity, dtype=torch.int64), torch.empty(capacity, members, dtype=torch.int32)
        blocks = self._library.sr_group(
            c_void_p(low.data_ptr()), c_int64(len(low)), c_int64(len(head)), c_int64(members), c_int64(capacity),
            *(c_void_p(tensor.data_ptr()) for tensor in (head, block_low, pixels)),
        )  # fmt: skip
        return (low, None) if blocks < 0 else (block_low[:blocks], pixels[:blocks])


class NativeDirect(NativeHead):
    """With the refiner's prediction in the place of the initial one."""

    def __init__(self, refiner: Refiner) -> None:
        super().__init__(refiner)
        classifier = refiner.classifier
        self._weights = [] if isinstance(classifier, nn.Identity) else _weight_and_bias(classifier)

    def merge(self, features: Tensor, logits: Tensor, sites: SiteSet, mask: Tensor, confidence: Tensor) -> bool:
        features, flat, classes = _side_by_side(features), sites.flat, logits.shape[1]
        if not self._weights and features.shape[1] != classes:  # the kernel takes it at its word
            raise BundleError(f"the refiner gives {features.shape[1]} logits for {classes} classes")
        weight, bias = self._weights or (None, None)
        job = _DirectJob(
            features=features.data_ptr(), feature_stride=features.stride(0), channels=features.shape[1],
            classes=classes, flat=flat.data_ptr(), mask=mask.data_ptr(), confidence=confidence.data_ptr(),
            classifier=address(weight), classifier_bias=address(bias),
        )  # fmt: skip
        parallel(self._library, "sr_direct", job, len(flat), CHUNK)
        return not job.broken


def build_head(refiner: Refiner | None, device: torch.device) -> Head:
    """The fastest that runs on ``device``."""
    if device.type != "cpu":
        return Head(refiner)
    try:
        return _native_kind(refiner)(refiner)
    except NativeError as error:
        logger.warning("%s; torch does this kernel's work, more slowly", error)
        return Head(refiner)


def _native_kind(refiner: Refiner | None) -> Callable[[Any], NativeHead]:
    """What the kernels know of this refiner's end."""
    if refiner is None:
        return NativeHead
    ensembler, classifier = refiner.ensembler, refiner.classifier
    linear = isinstance(classifier, nn.Linear) and classifier.in_features <= MAX_CHANNELS
    if linear and isinstance(ensembler, GatedEnsembler) and ensembler.hidden == HIDDEN:
        return NativeGated
    if isinstance(ensembler, DirectEnsembler) and (linear or isinstance(classifier, nn.Identity)):
        return NativeDirect
    return NativeHead


def low_rows(logits: Tensor, sites: SiteSet, part: slice = slice(None)) -> Tensor:
    """[N] int64: the row of ``logits`` [B, K, h, w], as [B h w, K], over each of ``part`` of the sites."""
    batch, row, column = sites.sites[part].unbind(1)
    rows = nearest_index(logits.shape[2], sites.shape[1], logits.device)[row]
    columns = nearest_index(logits.shape[3], sites.shape[2], logits.device)[column]
    return (batch * logits.shape[2] + rows) * logits.shape[3] + columns


def gather_initial(logits: Tensor, sites: SiteSet, part: slice = slice(None)) -> Tensor:
    """Initial logits, or probabilities, [N, K] of ``part`` of the sites, from [B, K, h, w]."""
    return _rows(logits).index_select(0, low_rows(logits, sites, part))


def _rows(logits: Tensor) -> Tensor:
    """[B, K, h, w] as [B h w, K]; a view of what is channels-last."""
    return logits.permute(0, 2, 3, 1).reshape(-1, logits.shape[1])


def _side_by_side(features: Tensor) -> Tensor:
    """In float32, the channels of a pixel side by side in memory, as the kernels take them."""
    features = features.float()
    return features if features.stride(1) == 1 else features.contiguous()


def _empty(logits: Tensor, with_probabilities: bool) -> Initial:
    size, device = (len(logits), *logits.shape[2:]), logits.device
    mask, confidence = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    probabilities = (
        torch.empty(*size, logits.shape[1], device=device).permute(0, 3, 1, 2) if with_probabilities else None
    )
    return Initial(torch.empty(size, device=device), mask, confidence, probabilities, True)


def _chunks(rows: int, device: torch.device) -> Iterator[slice]:
    """Slices of ``rows`` that a CPU core can hold in its cache; one slice on other devices."""
    step = 8192 if device.type == "cpu" else max(rows, 1)
    for start in range(0, rows, step):
        yield slice(start, start + step)


class _InitialJob(ctypes.Structure):
    """As ``struct initial`` in head_kernel.c."""

    _fields_ = [
        ("logits", c_void_p), ("pixel_stride", c_int64), ("class_stride", c_int64), ("classes", c_int64),
        ("entropy", c_void_p), ("mask", c_void_p), ("confidence", c_void_p), ("probabilities", c_void_p),
        ("broken", c_int64),
    ]  # fmt: skip


WEIGHTS = (
    "classifier", "classifier_bias", "gate1", "gate1_bias", "gate2", "gate2_bias", "fuse1", "fuse1_bias", "fuse2",
    "fuse2_bias",
)  # fmt: skip


class _MergeJob(ctypes.Structure):
    """As ``struct merge`` in head_kernel.c."""

    _fields_ = [
        ("features", c_void_p), ("feature_stride", c_int64), ("channels", c_int64),
        ("logits", c_void_p), ("pixel_stride", c_int64), ("class_stride", c_int64), ("classes", c_int64),
        ("low", c_void_p), ("pixels", c_void_p), ("members", c_int64), ("flat", c_void_p),
        ("mask", c_void_p), ("confidence", c_void_p), ("broken", c_int64),
        *((name, c_void_p) for name in WEIGHTS),
    ]  # fmt: skip


class _DirectJob(ctypes.Structure):
    """As ``struct direct`` in head_kernel.c."""

    _fields_ = [
        ("features", c_void_p), ("feature_stride", c_int64), ("channels", c_int64), ("classes", c_int64),
        ("flat", c_void_p), ("mask", c_void_p), ("confidence", c_void_p), ("broken", c_int64),
        ("classifier", c_void_p), ("classifier_bias", c_void_p),
    ]  # fmt: skip


@torch.no_grad()
def _merge_weights(refiner: Refiner) -> dict[str, Tensor]:
    ensembler: Any = refiner.ensembler
    gate1, _, gate2 = ensembler.gate
    fuse1, _, fuse2 = ensembler.fuse
    difference = [
        (gate2.weight[:1] - gate2.weight[1:]).T.float().contiguous(),
        (gate2.bias[:1] - gate2.bias[1:]).float(),
    ]
    tensors = [*_weight_and_bias(refiner.classifier), *_weight_and_bias(gate1), *difference]
    tensors += [*_weight_and_bias(fuse1), *_weight_and_bias(fuse2)]
    return dict(zip(WEIGHTS, tensors, strict=True))


@torch.no_grad()
def _weight_and_bias(layer: Any) -> list[Tensor]:
    """[inputs, outputs] and [outputs], row by row in float32."""
    return [layer.weight.T.float().contiguous(), layer.bias.float().contiguous()]
