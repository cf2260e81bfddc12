"""A bundle's dense segmenter, ready to run: in torch, in ONNX Runtime, or from an ONNX file that is all there is.

Shape shorthand: B images, K classes, h, w low resolution.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sparserefine_ros import __version__
from sparserefine_ros.errors import BundleError, ParameterError
from sparserefine_ros.networks.points import CoarseFine
from sparserefine_ros.networks.registry import DENSE, build
from sparserefine_ros.networks.superpixel import SuperpixelTransformer
from sparserefine_ros.segmenter.bundle import ONNX, Bundle, NetworkSpec, build_network
from sparserefine_ros.segmenter.onnx_dense import ExportedNetwork, GivenFile, OnnxDense, onnx_folder
from sparserefine_ros.segmenter.onnx_session import Progress

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
RUNTIMES = ("auto", "torch", "torch_compile", "torch_graph", "onnxruntime")
TRANSFORMERS_PAIR = ("convolution", "normalization")
FLOATS = {"float32": torch.float32, "float16": torch.float16}
"""Number formats of a given file, as its bundle names them."""


@dataclass(frozen=True)
class Dense:
    """What runs, and what it runs in."""

    module: nn.Module  # normalised images [B, 3, h, w] -> logits [B, K, h, w]
    runtime: str  # for people
    superpixels: SuperpixelTransformer | None  # torch's network, where it has superpixels to look at


def load_dense(
    bundle: Bundle,
    spec: NetworkSpec,
    device: torch.device,
    precision: str = "fp32",
    runtime: str = "auto",
    provider: str = "auto",
) -> Dense:
    """The dense segmenter that ``spec`` describes, for inference.

    Args:
        spec: the bundle's ``dense`` or ``native``. The bundle's temperature was fitted for the former alone.
        precision: of PRECISIONS.
        runtime: of RUNTIMES; "auto" is torch, but for a bundle that is an ONNX file. With torch_graph the caller
            captures what this returns.
        provider: of onnxruntime; see `OnnxDense`.

    Raises:
        BundleError: weights do not fit.
        ParameterError: an unknown runtime, or one that cannot run the bundle, or not at that precision.
    """
    if runtime not in RUNTIMES:
        raise ParameterError(f"runtime {runtime!r} is unknown; choose one of {', '.join(RUNTIMES)}")
    onnxruntime, half = runtime == "onnxruntime" or spec.network == ONNX, precision == "fp16"
    if onnxruntime and precision == "bf16":
        raise ParameterError("precision bf16 is for runtime torch; runtime onnxruntime takes fp32 or fp16")
    if runtime == "torch_graph" and device.type != "cuda":
        raise ParameterError(f"runtime torch_graph is for CUDA, but device is '{device}'; set runtime to torch")
    temperature = bundle.temperature if spec is bundle.dense else 1.0
    if spec.network == ONNX:
        onnx = _given(bundle, spec, device, half, runtime, provider, temperature)
        return Dense(onnx, f"onnxruntime ({onnx.provider})", None)

    def load() -> nn.Module:
        network = fold_batch_norm(load_registered(bundle, spec, DENSE))
        return network if temperature == 1 else Tempered(network, temperature)

    if onnxruntime:
        identity = [__version__, spec.sha256, spec.network, spec.args, temperature]
        onnx = OnnxDense(ExportedNetwork(load, identity, half, onnx_folder()), device, provider, half)
        # torch's network stays only where its superpixels may be asked for, which no file gives.
        kept = load() if spec.network == "superpixel" else None
        return Dense(onnx, f"onnxruntime ({onnx.provider})", _superpixels(kept, device))
    network = load()
    module = ready(network, device, PRECISIONS[precision])
    if runtime == "torch_compile":
        return Dense(Compiled(module), runtime, None)
    return Dense(module, "torch" if runtime == "auto" else runtime, _superpixels(network, device))


def load_registered(bundle: Bundle, spec: NetworkSpec, table: Mapping[str, Callable[..., Any]]) -> Any:
    """The network of ``table`` that ``spec`` describes, with its weights, on a CPU; BundleError where it cannot be."""

    def make() -> nn.Module:
        network: nn.Module = build(table, spec.network, len(bundle.classes), spec.args)
        return network

    return build_network(bundle.path, spec, make)


def _given(
    bundle: Bundle, spec: NetworkSpec, device: torch.device, half: bool, runtime: str, provider: str, temperature: float
) -> OnnxDense:
    if runtime not in ("auto", "onnxruntime"):
        raise ParameterError(
            f"bundle {bundle.name!r} is an ONNX file, which runtime '{runtime}' cannot run; set runtime to onnxruntime "
            "or auto"
        )
    try:
        source = GivenFile(
            bundle.path / spec.weights, spec.args["input"], spec.args["output"], FLOATS[spec.args["dtype"]],
            bool(spec.args["one_image"]), spec.sha256,
        )  # fmt: skip
    except KeyError as error:
        raise BundleError(
            f"{bundle.path / 'model.yaml'}: dense.args lack or mistake {error}; import it anew"
        ) from error
    onnx = OnnxDense(source, device, provider, half, temperature)
    if half and onnx.wanted[0] != "tensorrt":
        raise ParameterError(
            f"bundle {bundle.name!r} is an ONNX file, which computes in its own number format; precision fp16 is for "
            f"provider tensorrt, here it is '{onnx.wanted[0]}'; set precision to fp32"
        )
    return onnx


class Compiled(nn.Module):
    """A network through torch.compile, anew for every form of its images; the log says how long that takes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.progress = network, Progress()
        self.compiled = torch.compile(network, dynamic=False)
        self.forms: set[torch.Size] = set()

    def prepare(self, images: Tensor) -> None:
        """Compiles for the form of ``images`` [B, 3, h, w]; ParameterError where torch cannot, for whatever reason."""
        try:
            with torch.inference_mode():
                self(images)
        except Exception as error:  # of its compiler, of the machine's, of what either lacks; no base in common
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ParameterError(f"runtime torch_compile does not work here: {first}; set runtime to torch") from error

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, h, w] -> [B, K, h, w]
        new = images.shape not in self.forms
        what = f"torch compiles the dense segmenter for {images.shape[2]}x{images.shape[3]}"
        with self.progress(what) if new else nullcontext():
            logits: Tensor = self.compiled(images)
        self.forms.add(images.shape)
        return logits


class Autocast(nn.Module):
    """A network under torch.autocast; its convolutions and linear layers hold their weights in ``dtype`` already.

    autocast would cast them anew for every frame. The values are the same.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = network, dtype
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                module.to(dtype)

    def context(self, device: torch.device) -> torch.autocast:
        """What the network computes under."""
        # Nothing is left to be cached, and a CUDA graph must not contain what belongs to a cache.
        return torch.autocast(device.type, dtype=self.dtype, cache_enabled=False)

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, h, w] -> [B, K, h, w]
        with self.context(images.device):
            logits: Tensor = self.network(images)
        return logits


def ready(network: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """``network``, folded, on ``device`` in channels-last order, computing in ``dtype``."""
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network if dtype == torch.float32 else Autocast(network, dtype)


class Tempered(nn.Module):
    """A dense segmenter whose logits are divided by its bundle's temperature (Guo et al., 2017)."""

    def __init__(self, network: nn.Module, temperature: float) -> None:
        super().__init__()
        self.network, self.temperature = network, temperature

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, h, w] -> [B, K, h, w]
        logits: Tensor = self.network(images)
        return logits / self.temperature


def unwrapped(module: nn.Module) -> nn.Module:
    """The network of the registry that ``module``, of `load_dense` in torch, runs."""
    while isinstance(module, Tempered | Autocast):
        module = module.network
    return module


def coarse_and_fine(module: nn.Module, images: Tensor) -> CoarseFine:
    """What ``module``, of `load_dense` in torch, shows of normalised images [B, 3, h, w]."""
    if isinstance(module, Autocast):
        with module.context(images.device):
            return coarse_and_fine(module.network, images)
    if isinstance(module, Tempered):
        maps = coarse_and_fine(module.network, images)
        return CoarseFine(maps.coarse / module.temperature, maps.fine)
    shown: CoarseFine = module.coarse_and_fine(images)  # type: ignore[operator]
    return shown


def fold_batch_norm(module: nn.Module) -> nn.Module:
    """Folds every BatchNorm2d that directly follows a Conv2d into it, in place.

    That is what follows it in an nn.Sequential, and what transformers calls convolution and normalization of one layer.
    """
    for parent in module.modules():
        names = list(parent._modules)
        pairs = list(zip(names, names[1:], strict=False)) if isinstance(parent, nn.Sequential) else [TRANSFORMERS_PAIR]
        for first, second in pairs:
            conv, norm = getattr(parent, first, None), getattr(parent, second, None)
            if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d:  # timm's heirs of both do more than these
                setattr(parent, first, fuse_conv_bn_eval(conv, norm))
                setattr(parent, second, nn.Identity())
    return module


def _superpixels(module: nn.Module | None, device: torch.device) -> SuperpixelTransformer | None:
    network = None if module is None else unwrapped(module)
    return network.to(device) if isinstance(network, SuperpixelTransformer) else None
