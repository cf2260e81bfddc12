"""The pipeline: dense prediction at low resolution, refinement of uncertain pixels at native resolution.

What is computed at low resolution (softmax, entropy, confidence, argmax) stays there until the end; only the mask,
the confidence and the entropy are upsampled, as single channels. Logits at native resolution exist for selected
pixels alone.

Shape shorthand: B images of one size, K classes, H, W native size, h, w low resolution, N selected pixels.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sparserefine_ros.errors import BundleError, FrameError, ParameterError
from sparserefine_ros.networks.graphed import Graphed
from sparserefine_ros.networks.points import CoarseFine
from sparserefine_ros.networks.refiner import SparseRefiner
from sparserefine_ros.networks.registry import REFINERS, Refiner
from sparserefine_ros.networks.repeater import RepeatRefiner
from sparserefine_ros.networks.repetition_recording import Kept, record
from sparserefine_ros.networks.selectors import upsample_nearest
from sparserefine_ros.segmenter.bundle import ONNX, Bundle, NetworkSpec
from sparserefine_ros.segmenter.dense import (
    PRECISIONS,
    Compiled,
    coarse_and_fine,
    load_dense,
    load_registered,
)
from sparserefine_ros.segmenter.engine_trial import Case, fastest
from sparserefine_ros.segmenter.fitting import check_refiner, check_repetition
from sparserefine_ros.segmenter.head import build_head
from sparserefine_ros.segmenter.onnx_dense import OnnxDense
from sparserefine_ros.segmenter.preprocess import low_resolution_size, normalise, resize, shrink, to_host, upload
from sparserefine_ros.segmenter.refining import KINDS, Refining, Seen
from sparserefine_ros.segmenter.stage_clock import StageClock
from sparserefine_ros.sparse.backends import pick_backend

UNLIKE = 1.5  # times larger or smaller, in each direction, than what a bundle was made for: worth a word
logger = logging.getLogger("sparserefine_ros")
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
        sparse_backend: a name of ``sparse.backends``; "auto" takes the fastest here, on a GPU by `engine_trial`.
        runtime: what runs the dense segmenter, one of RUNTIMES; the refiner runs on the sparse backend.
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
        runtime: str = "auto",
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
        self._told = scale is not None  # of frames that are not what the bundle was made for
        self.refines = bundle.refiner is not None if refine is None else refine
        self.entropy_threshold = bundle.entropy_threshold if entropy_threshold is None else entropy_threshold
        spec = bundle.native if self.scale == 1 and bundle.native else bundle.dense
        self._fixed_size = self._only_size(spec, scale)
        dense = load_dense(bundle, spec, self.device, precision, runtime, provider)
        self.dense, self.runtime, self._superpixels = dense.module, dense.runtime, dense.superpixels
        low = self.low_size(bundle.native_size)
        if isinstance(self.dense, Compiled):
            self.dense.prepare(normalise(torch.zeros(1, *low, 3, dtype=torch.uint8, device=self.device)))
        if isinstance(self.dense, OnnxDense):
            self.dense.prepare(low)
            self.runtime = "torch" if self.dense.degraded else f"onnxruntime ({self.dense.provider})"
        backend = pick_backend(sparse_backend, self.device, PRECISIONS[precision])
        self.refiner: Refiner | None = None
        self.refining: Refining | None = None
        if self.refines and bundle.refiner is not None:
            self.refiner = load_registered(bundle, bundle.refiner, REFINERS).to(self.device)
            kind = KINDS[bundle.refiner.network]
            own = isinstance(self.refiner, RepeatRefiner) and self.refiner.own is not None
            needs_native = kind.needs_native and not own
            tuned = bundle.native if needs_native and spec is bundle.dense else None
            check_refiner(bundle, self.refiner, self.dense, tuned or spec, self.runtime)
            if sparse_backend == "auto" and isinstance(self.refiner, SparseRefiner):
                args, size = bundle.refiner.args, bundle.native_size
                backend = fastest(Case(len(self.classes), args, size, str(self.device), precision))
            native: Any = None
            if needs_native:
                native = load_dense(bundle, tuned, self.device, precision).module if tuned else self.dense
            self.refining = kind(self.refiner, backend, PRECISIONS[precision], native)
            if isinstance(self.refiner, RepeatRefiner):
                self.recorded = check_repetition(bundle, self.refiner.own or native, self.dense, self.device)
        self.sparse_backend = backend.name
        self.head = build_head(self.refiner, self.device)
        captured = self.runtime == "torch_graph"  # for who asks: not yet run on a GPU
        self.shrunk_and_seen = Graphed(self._shrink_and_see) if captured else self._shrink_and_see

    def _only_size(self, spec: NetworkSpec, scale: float | None) -> tuple[int, int] | None:
        """The only (h, w) that the dense segmenter takes, if it is an ONNX file of such a kind."""
        if spec.network != ONNX or spec.args.get("size") is None:
            return None
        height, width = spec.args["size"]
        if scale is not None and low_resolution_size(self.bundle.native_size, scale) != (height, width):
            raise ParameterError(
                f"bundle {self.bundle.name!r} is an ONNX file for images of {height}x{width} alone: it cannot run at "
                f"scale {scale}; export it anew with dynamic height and width"
            )
        return height, width

    def low_size(self, size: tuple[int, ...]) -> tuple[int, int]:
        """(h, w) at which the dense segmenter sees a frame of ``size`` (H, W)."""
        return self._fixed_size or low_resolution_size(size, self.scale)

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
        for logits that are not finite (broken weights, or overflow in half precision), BundleError for logits of
        another number of classes than the bundle's.
        """
        for image in images:
            _check_image(image)
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, image in enumerate(images):
            groups[image.shape[0], image.shape[1]].append(index)
        results: dict[int, Segmentation] = {}
        for size, indices in groups.items():
            self._tell_of(size)
            refined = self.refines if refine is None else refine
            batch = self._segment_batch([images[i] for i in indices], refined and self.refiner is not None, choose)
            results.update(zip(indices, batch, strict=True))
        return [results[i] for i in range(len(images))]

    def _tell_of(self, size: tuple[int, int]) -> None:
        """Warns once of frames far from what the bundle was made for: what it learnt has another size in them."""
        made_for, fixed = self.bundle.native_size, self._fixed_size is not None
        ratio = math.sqrt(size[0] * size[1] / (made_for[0] * made_for[1]))
        if self._told or fixed or 1 / UNLIKE <= ratio <= UNLIKE:
            return
        self._told = True
        fitting = min(1.0, self.scale / ratio)
        logger.warning(
            "frames are %dx%d, and '%s' was made for %dx%d: masks may be much worse%s", size[1], size[0],
            self.bundle.name, made_for[1], made_for[0],
            f"; try scale {fitting:.2g}" if abs(fitting / self.scale - 1) > 0.1 else "",
        )  # fmt: skip

    @property
    def degraded(self) -> str:
        """Why it does not run as asked; empty where it does."""
        return self.dense.degraded if isinstance(self.dense, OnnxDense) else ""

    @property
    def has_superpixels(self) -> bool:
        """Whether the decoder works on superpixels."""
        return self._superpixels is not None

    @torch.inference_mode()
    def superpixels(self, image: np.ndarray) -> np.ndarray:
        """The superpixel of every pixel, [H, W] int64 (Superpixel Transformers, Eq. 7); a pass of its own, to look at.

        Raises ParameterError for a decoder without superpixels, FrameError as ``segment``.
        """
        _check_image(image)
        if self._superpixels is None:
            raise ParameterError(f"bundle {self.bundle.name!r} has no superpixels; choose a superpixel bundle")
        size = (image.shape[0], image.shape[1])
        low = upload([resize(image, self.low_size(size))], self.device)
        with self._autocast():
            ids = self._superpixels.superpixels(normalise(low))  # [1, h, w]
        [array] = to_host(upsample_nearest(ids, size)[0])
        return array

    @property
    def under_way(self) -> str:
        """What the runtime is busy with beside frames, an engine or compiling, and since when; else empty."""
        return self.dense.progress.text if isinstance(self.dense, OnnxDense | Compiled) else ""

    @torch.inference_mode()
    def _segment_batch(
        self, images: Sequence[np.ndarray], refine: bool, choose: Choose | None = None
    ) -> list[Segmentation]:
        clock = StageClock(self.device)
        size = (images[0].shape[0], images[0].shape[1])
        on_gpu = self.device.type == "cuda"
        with clock("preprocess"):
            # A GPU shrinks what the refiner needs there anyway; on a CPU OpenCV is faster.
            native = upload(images, self.device) if on_gpu or refine else None
            low = None if on_gpu else upload([resize(image, self.low_size(size)) for image in images], self.device)
        maps: CoarseFine | None = None
        kept: Sequence[Kept] = ()
        with clock("dense"), self._naming(size):
            if refine and self.refining is not None and (self.refining.needs_maps or self.refining.needs_record):
                assert native is not None
                low = shrink(native, self.low_size(size)) if low is None else low
                if self.refining.needs_record:
                    logits, kept = record(self.dense, normalise(low), self.recorded)
                else:
                    maps = coarse_and_fine(self.dense, normalise(low))
                    logits = F.interpolate(maps.coarse, low.shape[1:3], mode="bilinear", align_corners=False)
            elif low is None:
                assert native is not None
                low, logits = self.shrunk_and_seen(native)
            else:
                logits = self.dense(normalise(low))  # [B, K, h, w]
        self._check_logits(logits, len(images))
        with clock("select"):
            initial = self.head.initial(logits)
            mask, confidence = upsample_nearest(initial.mask, size), upsample_nearest(initial.confidence, size)
            threshold = self._pick(initial.entropy, len(images) * size[0] * size[1], choose) if refine else None
        density, finite = torch.zeros(len(images), device=self.device), torch.tensor(True)
        if threshold is not None:
            assert native is not None
            with clock("select"):
                selected = upsample_nearest(initial.entropy > threshold, size)  # bool [B, H, W]
                density = selected.flatten(1).float().mean(1)
            seen = Seen(selected, native, low, initial.probabilities, maps, kept)
            refined, worked_on = self._refine(seen, logits, mask, confidence, clock)
            finite = torch.as_tensor(refined)
            density = density if worked_on is None else torch.tensor(worked_on)
        # Nothing above asks the device for a value, but for the number of selected pixels, what `choose` looks at, and
        # the maps of sparse backends other than triton.
        masks, confidences, entropies, densities, *whole = to_host(
            mask, confidence, initial.entropy, density, torch.as_tensor(initial.finite), finite
        )
        for part, fine in zip(("dense segmenter", "refiner"), whole, strict=True):
            if not fine:
                raise FrameError(
                    f"the {part} of bundle {self.bundle.name!r} gave logits that are not finite; "
                    f"check its weights, or try precision fp32 (now {self.precision})"
                )
        ms = clock.ms
        return [
            Segmentation(masks[b], confidences[b], entropies[b], float(densities[b]), ms, threshold)
            for b in range(len(images))
        ]

    @contextmanager
    def _naming(self, size: tuple[int, int]) -> Iterator[None]:
        """FrameError where the dense segmenter does not take images as small, or as odd, as frames of ``size`` become.

        What a machine lacks, memory or a device, stays the error that it is.
        """
        try:
            yield
        except (RuntimeError, ValueError) as error:  # some of torch's own checks raise the latter
            if any(word in str(error).lower() for word in ("memory", "alloc", "cuda")):
                raise
            height, width = self.low_size(size)
            raise FrameError(
                f"the dense segmenter of bundle {self.bundle.name!r} fails on images of {height}x{width}: "
                f"{str(error).strip() or type(error).__name__}; give frames or a scale that make a size it takes"
            ) from error

    def _check_logits(self, logits: Tensor, images: int) -> None:
        """BundleError unless [B, K, h, w]: kernels take it at its word, and weights in an ONNX file show no classes."""
        if logits.shape[:2] != (images, len(self.classes)):
            raise BundleError(
                f"the dense segmenter of bundle {self.bundle.name!r} gave logits of shape {list(logits.shape)} for "
                f"{images} images of {len(self.classes)} classes; do the classes of model.yaml fit the weights?"
            )

    def _pick(self, entropy: Tensor, pixels: int, choose: Choose | None) -> float | None:
        """The threshold for a batch with ``entropy`` [B, h, w] and that many native pixels."""
        if choose is None:
            return self._threshold
        step = math.ceil(math.sqrt(max(1.0, entropy.numel() / ENTROPY_SAMPLE)))
        [sample] = to_host(entropy[:, ::step, ::step])
        # Broken logits are told below; they must not teach the budget anything.
        return choose(sample, pixels) if np.isfinite(sample).all() else None

    def _shrink_and_see(self, native: Tensor) -> tuple[Tensor, Tensor]:
        """[B, H, W, 3] uint8 to what the dense segmenter sees of it, [B, h, w, 3] uint8, and its logits."""
        low = shrink(native, self.low_size(native.shape[1:3]))
        return low, self.dense(normalise(low))

    def _refine(
        self, seen: Seen, logits: Tensor, mask: Tensor, confidence: Tensor, clock: StageClock
    ) -> tuple[Tensor | bool, list[float] | None]:
        """Writes the final prediction of the refined pixels into ``mask`` and ``confidence`` [B, H, W].

        Returns whether the result is finite, as `Initial.finite`, and the share of each image that was refined, where
        that is not the selection.
        """
        assert self.refining is not None
        with clock("refine"), self._autocast():
            refined = self.refining(seen)
        if refined is None:
            return True, None
        with clock("merge"):
            return self.head.merge(refined.features, logits, refined.sites, mask, confidence), refined.density

    def _autocast(self) -> Any:
        dtype = PRECISIONS[self.precision]
        return nullcontext() if dtype == torch.float32 else torch.autocast(self.device.type, dtype=dtype)


def pick_device(name: str) -> torch.device:
    """The device called ``name``; "auto" prefers CUDA. ParameterError when it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("nothing here was written for it")
    except RuntimeError as error:
        raise ParameterError(f"device {name!r} is unknown; give auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ParameterError(
            f"device {name!r} is not there ({torch.cuda.device_count()} CUDA devices); give auto or cpu"
        )
    return device


def _check_image(image: np.ndarray) -> None:
    if not isinstance(image, np.ndarray) or image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        what = f"{image.dtype} array of shape {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise FrameError(f"cannot segment a {what}; give a uint8 RGB array of shape [H, W, 3]")
    if 0 in image.shape:
        raise FrameError(f"cannot segment an image of shape {image.shape}; it has no pixels")
