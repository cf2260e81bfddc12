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
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sparserefine_ros import __version__
from sparserefine_ros.errors import BundleError, FrameError, ParameterError
from sparserefine_ros.networks.points import CoarseFine
from sparserefine_ros.networks.registry import DENSE, REFINERS, Refiner, build
from sparserefine_ros.networks.selectors import upsample_nearest
from sparserefine_ros.networks.superpixel import SuperpixelTransformer
from sparserefine_ros.segmenter.bundle import Bundle, NetworkSpec, load_network
from sparserefine_ros.segmenter.head import build_head
from sparserefine_ros.segmenter.onnx_dense import RUNTIMES, OnnxDense
from sparserefine_ros.segmenter.preprocess import low_resolution_size, normalise, resize, upload
from sparserefine_ros.segmenter.refining import KINDS, Refining, Seen
from sparserefine_ros.sparse.backends import pick_backend

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
STAGES = ("preprocess", "dense", "select", "refine", "merge")


@dataclass(frozen=True)
class Segmentation:
    """What is known of one frame; arrays have the frame's own size."""

    mask: np.ndarray  # [H, W] uint8 class ids
    confidence: np.ndarray  # [H, W] uint8, 255 times the largest softmax probability of the final prediction
    low_entropy: np.ndarray  # [h, w] float32, nats: entropy of the initial prediction
    density: float  # refined pixels over all pixels
    stage_ms: dict[str, float]  # milliseconds by stage, for the whole batch the frame was part of

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
        self.dense = self._load_dense(dense)
        if bundle.temperature != 1 and dense is bundle.dense:
            self.dense = Tempered(self.dense, bundle.temperature)
        self._run_dense: Callable[[Tensor], Tensor] = self.dense
        self.runtime = "torch"
        if runtime == "onnxruntime":
            self._run_dense = onnx = self._onnx(dense, provider)
            self.runtime = f"onnxruntime ({onnx.provider})"
        elif runtime != "torch":
            raise ParameterError(f"runtime {runtime!r} is unknown; choose one of {', '.join(RUNTIMES)}")
        backend = pick_backend(sparse_backend, self.device, PRECISIONS[precision])
        self.sparse_backend = backend.name
        self.refiner: Refiner | None = None
        self.refining: Refining | None = None
        if self.refines and bundle.refiner is not None:
            self.refiner = self._load(REFINERS, bundle.refiner)
            kind = KINDS[bundle.refiner.network]
            if kind.needs_maps:
                self._check_maps(bundle.refiner.network)
            native = None
            if kind.needs_native:
                native = self._load_dense(bundle.native) if bundle.native and dense is bundle.dense else self.dense
            self.refining = kind(self.refiner, backend, PRECISIONS[precision], native)
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

    def _check_maps(self, refiner: str) -> None:
        """Raises where the dense segmenter does not show the refiner what it reads."""
        if self.runtime != "torch":
            raise ParameterError(f"refiner {refiner!r} reads features of the dense segmenter; set runtime to torch")
        if not hasattr(self._network, "coarse_and_fine"):
            shown = [name for name, kind in DENSE.items() if hasattr(kind, "coarse_and_fine")]
            raise BundleError(
                f"refiner {refiner!r} reads features that network {self.bundle.dense.network!r} does not show; "
                f"networks that do: {', '.join(shown)}"
            )

    def _load_dense(self, spec: NetworkSpec) -> nn.Module:
        network = fold_batch_norm(self._load(DENSE, spec))
        return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

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

    def segment(self, images: Sequence[np.ndarray], refine: bool | None = None) -> list[Segmentation]:
        """Segments ``images``, each [H, W, 3] uint8 RGB; frames of one size share a batch.

        ``refine=False`` leaves the refiner out for this call. Raises FrameError for an array that is no such image and
        for logits that are not finite (broken weights, or overflow in half precision).
        """
        for image in images:
            _check_image(image)
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, image in enumerate(images):
            groups[image.shape[0], image.shape[1]].append(index)
        results: dict[int, Segmentation] = {}
        for indices in groups.values():
            batch = self._segment_batch([images[i] for i in indices], self.refines if refine is None else refine)
            results.update(zip(indices, batch, strict=True))
        return [results[i] for i in range(len(images))]

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
    def _segment_batch(self, images: Sequence[np.ndarray], refine: bool) -> list[Segmentation]:
        clock = _StageClock(self.device)
        size = (images[0].shape[0], images[0].shape[1])
        with clock("preprocess"):
            low = upload([resize(image, self.low_size(size)) for image in images], self.device)
            x = normalise(low)
        maps: CoarseFine | None = None
        with clock("dense"), self._autocast():
            if refine and self.refining is not None and self.refining.needs_maps:
                maps = coarse_and_fine(self.dense, x)
                logits = F.interpolate(maps.coarse, x.shape[-2:], mode="bilinear", align_corners=False)
            else:
                logits = self._run_dense(x)  # [B, K, h, w]
        with clock("select"):
            initial = self.head.initial(logits)
            if not initial.finite:
                raise FrameError(
                    f"the dense segmenter of bundle {self.bundle.name!r} gave logits that are not finite; "
                    f"check its weights, or try precision fp32 (now {self.precision})"
                )
            mask, confidence = upsample_nearest(initial.mask, size), upsample_nearest(initial.confidence, size)
            selected = upsample_nearest(initial.entropy > self._threshold, size)  # bool [B, H, W]
        densities = [0.0] * len(images)
        if refine and self.refining is not None:
            densities = selected.flatten(1).float().mean(1).tolist()
            with clock("refine"):
                seen = Seen(selected, upload(images, self.device), low, initial.probabilities, maps)
            densities = self._refine(seen, logits, mask, confidence, clock) or densities
        return [
            Segmentation(_array(mask[b]), _array(confidence[b]), _array(initial.entropy[b]), densities[b], clock.ms)
            for b in range(len(images))
        ]

    def _refine(self, seen: Seen, logits: Tensor, mask: Tensor, confidence: Tensor, clock: Any) -> list[float] | None:
        """Writes the final prediction of the refined pixels into ``mask`` and ``confidence`` [B, H, W].

        Returns the share of each image that was refined, where that is not the selection.
        """
        assert self.refining is not None
        with clock("refine"), self._autocast():
            refined = self.refining(seen)
        if refined is None:
            return None
        with clock("merge"):
            if not self.head.merge(refined.features, logits, refined.sites, mask, confidence):
                raise FrameError(
                    f"the refiner of bundle {self.bundle.name!r} gave logits that are not finite; "
                    f"check its weights, or try precision fp32 (now {self.precision})"
                )
        return refined.density

    def _autocast(self) -> Any:
        dtype = PRECISIONS[self.precision]
        return nullcontext() if dtype == torch.float32 else torch.autocast(self.device.type, dtype=dtype)


class Tempered(nn.Module):
    """A dense segmenter whose logits are divided by its bundle's temperature (Guo et al., 2017)."""

    def __init__(self, network: nn.Module, temperature: float) -> None:
        super().__init__()
        self.network, self.temperature = network, temperature

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, h, w] -> [B, K, h, w]
        logits: Tensor = self.network(images)
        return logits / self.temperature


def coarse_and_fine(dense: nn.Module, images: Tensor) -> CoarseFine:
    """What ``dense``, tempered or not, shows of normalised images [B, 3, h, w]."""
    if isinstance(dense, Tempered):
        maps = coarse_and_fine(dense.network, images)
        return CoarseFine(maps.coarse / dense.temperature, maps.fine)
    shown: CoarseFine = dense.coarse_and_fine(images)  # type: ignore[operator]
    return shown


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
