"""The pipeline: dense prediction at low resolution, refinement of uncertain pixels at native resolution.

What is computed at low resolution (softmax, entropy, confidence, argmax) stays there until the end; only the mask,
the confidence and the entropy are upsampled, as single channels. Logits at native resolution exist for selected
pixels alone.

Shape shorthand: B images of one size, K classes, H, W native size, h, w low resolution, N selected pixels.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sparserefine_ros import __version__
from sparserefine_ros.errors import BundleError, FrameError, ParameterError
from sparserefine_ros.networks.bilateral import BilateralRefiner
from sparserefine_ros.networks.graphed_unet import GraphedUNet
from sparserefine_ros.networks.refiner import SparseRefiner
from sparserefine_ros.networks.registry import DENSE, REFINERS, Refiner, build
from sparserefine_ros.networks.selectors import upsample_nearest
from sparserefine_ros.networks.superpixel import SuperpixelTransformer
from sparserefine_ros.segmenter.bundle import Bundle, NetworkSpec, load_network
from sparserefine_ros.segmenter.head import Initial, build_head, gather_initial
from sparserefine_ros.segmenter.onnx_dense import RUNTIMES, OnnxDense
from sparserefine_ros.segmenter.preprocess import low_resolution_size, normalise, normalise_pixels, resize, upload
from sparserefine_ros.sparse import SiteSet
from sparserefine_ros.sparse.backends import pick_backend

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
STAGES = ("preprocess", "dense", "select", "refine", "merge")
ENTROPY_SAMPLE = 1 << 15

Choose = Callable[[np.ndarray, int], float | None]
"""Gives the entropy threshold for a batch, or None to leave it dense: called after the dense stage with a regular
sample of the batch's entropies, in nats, and its number of pixels; see `LatencyBudget`."""


@dataclass(frozen=True)
class Segmentation:
    """What is known of one frame; arrays have the frame's own size."""

    mask: np.ndarray  # [H, W] uint8 class ids
    confidence: np.ndarray  # [H, W] uint8, 255 times the largest softmax probability of the final prediction
    low_entropy: np.ndarray  # [h, w] float32, nats: entropy of the initial prediction
    density: float  # refined pixels over all pixels
    stage_ms: dict[str, float]  # milliseconds by stage, for the whole batch the frame was part of
    threshold: float | None = None  # nats: pixels above it were refined; None where the refiner did not run

    @property
    def entropy(self) -> np.ndarray:
        """[H, W] float32, nats: the selector's criterion at native size; upsampled when asked for, as few ask."""
        return upsample_nearest(torch.from_numpy(self.low_entropy), self.mask.shape).numpy()


class Segmenter:
    """Runs a bundle.

    Args:
        bundle: what to run.
        device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", ...
        precision: fp32, fp16 or bf16 for the networks; entropy and blending stay in float32.
        entropy_threshold: nats; None takes the bundle's calibrated value.
        refine: None refines where the bundle has a refiner.
        scale: low resolution over native; None takes the bundle's. Scale 1 without refinement is the dense
            baseline, with the bundle's weights for native resolution where it has them.
        sparse_backend: a name of ``sparse.backends``; "auto" takes the fastest that runs here.
        runtime: what runs the dense segmenter, torch or onnxruntime; the refiner runs on the sparse backend.
        provider: of onnxruntime; see `OnnxDense`.

    Raises:
        BundleError: weights do not fit, or ``refine=True`` without a refiner.
        ParameterError: a value out of range, or a device, runtime or sparse backend that is not there.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: str = "auto",
        precision: str = "fp32",
        entropy_threshold: float | None = None,
        refine: bool | None = None,
        scale: float | None = None,
        sparse_backend: str = "auto",
        runtime: str = "torch",
        provider: str = "auto",
    ) -> None:
        self.bundle, self.classes = bundle, bundle.classes
        self.device = pick_device(device)
        if precision not in PRECISIONS:
            raise ParameterError(f"precision {precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")
        self.precision = precision
        self.scale = bundle.scale if scale is None else scale
        if not 0 < self.scale <= 1:
            raise ParameterError(f"scale {self.scale} is out of range; give a number above 0 and at most 1")
        if refine and bundle.refiner is None:
            raise BundleError(
                f"bundle {bundle.name!r} has no refiner; set refine to auto or false, or choose another model"
            )
        self.refines = bundle.refiner is not None if refine is None else refine
        self.entropy_threshold = bundle.entropy_threshold if entropy_threshold is None else entropy_threshold
        dense = bundle.native if self.scale == 1 and bundle.native else bundle.dense
        self.dense: nn.Module = fold_batch_norm(self._load(DENSE, dense))
        self.dense = self.dense.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if bundle.temperature != 1 and dense is bundle.dense:
            self.dense = Tempered(self.dense, bundle.temperature)
        self._run_dense: Callable[[Tensor], Tensor] = self.dense
        self.runtime = "torch"
        if runtime == "onnxruntime":
            self._run_dense = onnx = self._onnx(dense, provider)
            self.runtime = "torch" if onnx.degraded else f"onnxruntime ({onnx.provider})"
        elif runtime != "torch":
            raise ParameterError(f"runtime {runtime!r} is unknown; choose one of {', '.join(RUNTIMES)}")
        backend = pick_backend(sparse_backend, self.device, PRECISIONS[precision])
        self.sparse_backend = backend.name
        self.refiner: Refiner | None = None
        self.graphed: GraphedUNet | None = None
        if self.refines and bundle.refiner is not None:
            self.refiner = refiner = self._load(REFINERS, bundle.refiner)
            if isinstance(refiner, SparseRefiner):
                refiner.fuse(backend, PRECISIONS[precision])
            if isinstance(refiner, SparseRefiner) and backend.name == "triton" and self.device.type == "cuda":
                assert refiner.fused is not None
                # One launch a frame. Not yet run on a GPU, as the backend itself, which "auto" therefore leaves alone.
                self.graphed = GraphedUNet(refiner.fused, refiner.stride, refiner_input)
        self.head = build_head(self.refiner, self.device)

    def _onnx(self, spec: NetworkSpec, provider: str) -> OnnxDense:
        """The dense segmenter in ONNX Runtime, ready for frames of the bundle's size."""
        if self.precision == "bf16":
            raise ParameterError("precision bf16 is for runtime torch; runtime onnxruntime takes fp32 or fp16")
        temperature = self.dense.temperature if isinstance(self.dense, Tempered) else 1.0
        identity = [__version__, spec.sha256, spec.network, spec.args, temperature]
        onnx = OnnxDense(self.dense, identity, self.device, provider, self.precision == "fp16")
        onnx.prepare(self.low_size(self.bundle.native_size))
        return onnx

    def _load(self, table: Any, spec: NetworkSpec) -> Any:
        try:
            module = build(table, spec.network, len(self.classes), spec.args)
        except ValueError as error:
            raise BundleError(f"{self.bundle.path / 'model.yaml'}: {error}") from error
        return load_network(self.bundle.path, spec, module).to(self.device)

    def low_size(self, size: tuple[int, ...]) -> tuple[int, int]:
        """(h, w) at which the dense segmenter sees a frame of ``size`` (H, W)."""
        return low_resolution_size(size, self.scale)

    @property
    def entropy_threshold(self) -> float:
        """Pixels above this entropy, in nats, are refined; may be set between any two frames."""
        return self._threshold

    @entropy_threshold.setter
    def entropy_threshold(self, value: float) -> None:
        limit = math.log(len(self.classes))
        if not (isinstance(value, float | int) and 0 <= value <= limit):  # NaN fails both comparisons
            raise ParameterError(
                f"entropy_threshold {value!r} is out of range; give a number of nats from 0 to {limit:.3f} "
                f"(log of {len(self.classes)} classes), or auto"
            )
        self._threshold = float(value)

    def segment(
        self, images: Sequence[np.ndarray], refine: bool | None = None, choose: Choose | None = None
    ) -> list[Segmentation]:
        """Segments ``images``, each [H, W, 3] uint8 RGB; frames of one size share a batch.

        ``refine=False`` leaves the refiner out for this call; ``choose`` takes the place of ``entropy_threshold``, once
        for each batch. Raises FrameError for an array that is no such image and
        for logits that are not finite (broken weights, or overflow in half precision).
        """
        for image in images:
            _check_image(image)
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, image in enumerate(images):
            groups[image.shape[0], image.shape[1]].append(index)
        results: dict[int, Segmentation] = {}
        for indices in groups.values():
            refined = self.refines if refine is None else refine
            batch = self._segment_batch([images[i] for i in indices], refined and self.refiner is not None, choose)
            results.update(zip(indices, batch, strict=True))
        return [results[i] for i in range(len(images))]

    @property
    def degraded(self) -> str:
        """Why it does not run as asked; empty where it does."""
        return self._run_dense.degraded if isinstance(self._run_dense, OnnxDense) else ""

    @property
    def has_superpixels(self) -> bool:
        """Whether the decoder works on superpixels."""
        return isinstance(self._network, SuperpixelTransformer)

    @torch.inference_mode()
    def superpixels(self, image: np.ndarray) -> np.ndarray:
        """The superpixel of every pixel, [H, W] int64 (Superpixel Transformers, Eq. 7); a pass of its own, to look at.

        Raises ParameterError for a decoder without superpixels, FrameError as ``segment``.
        """
        _check_image(image)
        network = self._network
        if not isinstance(network, SuperpixelTransformer):
            raise ParameterError(f"bundle {self.bundle.name!r} has no superpixels; choose a superpixel bundle")
        size = (image.shape[0], image.shape[1])
        low = torch.from_numpy(resize(image, self.low_size(size)))[None].to(self.device)
        with self._autocast():
            ids = network.superpixels(normalise(low))  # [1, h, w]
        return _array(upsample_nearest(ids, size)[0])

    @property
    def _network(self) -> nn.Module:
        return self.dense.network if isinstance(self.dense, Tempered) else self.dense

    @torch.inference_mode()
    def _segment_batch(
        self, images: Sequence[np.ndarray], refine: bool, choose: Choose | None = None
    ) -> list[Segmentation]:
        clock = _StageClock(self.device)
        size = (images[0].shape[0], images[0].shape[1])
        with clock("preprocess"):
            low = upload([resize(image, self.low_size(size)) for image in images], self.device)
            x = normalise(low)
        with clock("dense"), self._autocast():
            logits = self._run_dense(x)  # [B, K, h, w]
        with clock("select"):
            initial = self.head.initial(logits)
            if not initial.finite:
                raise FrameError(
                    f"the dense segmenter of bundle {self.bundle.name!r} gave logits that are not finite; "
                    f"check its weights, or try precision fp32 (now {self.precision})"
                )
            mask, confidence = upsample_nearest(initial.mask, size), upsample_nearest(initial.confidence, size)
            threshold = self._pick(initial.entropy, len(images) * size[0] * size[1], choose) if refine else None
        densities = [0.0] * len(images)
        if threshold is not None:
            with clock("select"):
                selected = upsample_nearest(initial.entropy > threshold, size)  # bool [B, H, W]
                densities = selected.flatten(1).float().mean(1).tolist()
            self._refine(images, low, logits, initial, selected, mask, confidence, clock)
        return [
            Segmentation(
                _array(mask[b]), _array(confidence[b]), _array(initial.entropy[b]), densities[b], clock.ms, threshold
            )
            for b in range(len(images))
        ]

    def _pick(self, entropy: Tensor, pixels: int, choose: Choose | None) -> float | None:
        """The threshold for a batch with ``entropy`` [B, h, w] and that many native pixels."""
        if choose is None:
            return self._threshold
        step = math.ceil(math.sqrt(max(1.0, entropy.numel() / ENTROPY_SAMPLE)))
        return choose(_array(entropy[:, ::step, ::step]), pixels)

    def _refine(
        self,
        images: Sequence[np.ndarray],
        low: Tensor,
        logits: Tensor,
        initial: Initial,
        selected: Tensor,
        mask: Tensor,
        confidence: Tensor,
        clock: Any,
    ) -> None:
        """Writes the final prediction of the selected pixels into ``mask`` and ``confidence`` [B, H, W].

        low: [B, h, w, 3] uint8, the images as the dense segmenter saw them.
        """
        assert self.refiner is not None
        with clock("refine"), self._autocast():
            context = () if initial.probabilities is None else (initial.probabilities,)
            if self.graphed is not None:
                sites, features = self.graphed(selected, self._native(images), *context)  # [N, C]
            elif isinstance(self.refiner, BilateralRefiner):
                sites = SiteSet.from_mask(selected)
                features = self.refiner(sites, self._native(images), low, *context)
            else:
                pyramid = self.refiner.pyramid(selected)
                sites = pyramid.levels[0]
                if len(sites) == 0:
                    return
                x = refiner_input(sites, self._native(images), *context)
                features = self.refiner.features(x, pyramid)
        with clock("merge"):
            if not self.head.merge(features, logits, sites, mask, confidence):
                raise FrameError(
                    f"the refiner of bundle {self.bundle.name!r} gave logits that are not finite; "
                    f"check its weights, or try precision fp32 (now {self.precision})"
                )

    def _native(self, images: Sequence[np.ndarray]) -> Tensor:  # [B, H, W, 3] uint8
        return upload(images, self.device)

    def _autocast(self) -> Any:
        dtype = PRECISIONS[self.precision]
        return nullcontext() if dtype == torch.float32 else torch.autocast(self.device.type, dtype=dtype)


def refiner_input(sites: SiteSet, native: Tensor, probabilities: Tensor | None = None) -> Tensor:
    """[N, 3 or 3 + K]: colours at ``sites`` of ``native`` [B, H, W, 3] uint8, normalised, and context where given.

    probabilities: [B, K, h, w] of the initial prediction.
    """
    pixels = normalise_pixels(native.view(-1, 3)[sites.flat])
    return pixels if probabilities is None else torch.cat([pixels, gather_initial(probabilities, sites)], 1)


class Tempered(nn.Module):
    """A dense segmenter whose logits are divided by its bundle's temperature (Guo et al., 2017)."""

    def __init__(self, network: nn.Module, temperature: float) -> None:
        super().__init__()
        self.network, self.temperature = network, temperature

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, h, w] -> [B, K, h, w]
        logits: Tensor = self.network(images)
        return logits / self.temperature


def pick_device(name: str) -> torch.device:
    """The device called ``name``; "auto" prefers CUDA. ParameterError when it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ParameterError(f"device {name!r} is unknown; give auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ParameterError(
            f"device {name!r} is not there ({torch.cuda.device_count()} CUDA devices); give auto or cpu"
        )
    return device


def fold_batch_norm(module: nn.Module) -> nn.Module:
    """Folds every BatchNorm2d that directly follows a Conv2d in an nn.Sequential into that convolution, in place."""
    for parent in module.modules():
        if isinstance(parent, nn.Sequential):
            for i in range(len(parent) - 1):
                conv, norm = parent[i], parent[i + 1]
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    parent[i], parent[i + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
    return module


def _array(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.cpu().numpy()
    return array


def _check_image(image: np.ndarray) -> None:
    if not isinstance(image, np.ndarray) or image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        what = f"{image.dtype} array of shape {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise FrameError(f"cannot segment a {what}; give a uint8 RGB array of shape [H, W, 3]")
    if 0 in image.shape:
        raise FrameError(f"cannot segment an image of shape {image.shape}; it has no pixels")


class _StageClock:
    """Milliseconds by stage; waits for the device at the end of each."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ms = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.ms[stage] += (time.perf_counter() - start) * 1e3
