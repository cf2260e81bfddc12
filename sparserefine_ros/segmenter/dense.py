"""A bundle's dense segmenter, ready to run: in torch, in ONNX Runtime, or from an ONNX file that is all there is.

Shape shorthand: B images, K classes, h, w low resolution.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sparserefine_ros import __version__
from sparserefine_ros.errors import BundleError, ParameterError
from sparserefine_ros.networks.registry import DENSE, build
from sparserefine_ros.networks.superpixel import SuperpixelTransformer
from sparserefine_ros.segmenter.bundle import ONNX, Bundle, NetworkSpec, load_network
from sparserefine_ros.segmenter.onnx_dense import ExportedNetwork, GivenFile, OnnxDense, onnx_folder

RUNTIMES = ("auto", "torch", "onnxruntime")
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
        precision: what ONNX Runtime computes in; torch's networks are cast as they run.
        runtime: of RUNTIMES; "auto" is torch, but for a bundle that is an ONNX file.
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
        network = load() if spec.network == "superpixel" else None
        return Dense(onnx, f"onnxruntime ({onnx.provider})", _superpixels(network, device))
    module = load().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Dense(module, "torch", _superpixels(module, device))


def load_registered(bundle: Bundle, spec: NetworkSpec, table: Mapping[str, Callable[..., Any]]) -> Any:
    """The network of ``table`` that ``spec`` describes, with its weights, on a CPU; BundleError where it cannot be."""
    try:
        module = build(table, spec.network, len(bundle.classes), spec.args)
    except ValueError as error:
        raise BundleError(f"{bundle.path / 'model.yaml'}: {error}") from error
    return load_network(bundle.path, spec, module)


def _given(
    bundle: Bundle, spec: NetworkSpec, device: torch.device, half: bool, runtime: str, provider: str, temperature: float
) -> OnnxDense:
    if runtime == "torch":
        raise ParameterError(
            f"bundle {bundle.name!r} is an ONNX file, which runtime 'torch' cannot run; set runtime to onnxruntime "
            "or auto"
        )
    try:
        source = GivenFile(
            bundle.path / spec.weights, spec.args["input"], spec.args["output"], FLOATS[spec.args["dtype"]],
            bool(spec.args["one_image"]),
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


class Tempered(nn.Module):
    """A dense segmenter whose logits are divided by its bundle's temperature (Guo et al., 2017)."""

    def __init__(self, network: nn.Module, temperature: float) -> None:
        super().__init__()
        self.network, self.temperature = network, temperature

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, h, w] -> [B, K, h, w]
        logits: Tensor = self.network(images)
        return logits / self.temperature


def fold_batch_norm(module: nn.Module) -> nn.Module:
    """Folds every BatchNorm2d that directly follows a Conv2d in an nn.Sequential into that convolution, in place."""
    for parent in module.modules():
        if isinstance(parent, nn.Sequential):
            for i in range(len(parent) - 1):
                conv, norm = parent[i], parent[i + 1]
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    parent[i], parent[i + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
    return module


def _superpixels(module: nn.Module | None, device: torch.device) -> SuperpixelTransformer | None:
    network = module.network if isinstance(module, Tempered) else module
    return network.to(device) if isinstance(network, SuperpixelTransformer) else None
