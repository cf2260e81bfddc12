"""A bundle's networks as ONNX files: the dense segmenter, and the whole pipeline with the refiner.

Written by torch's TorchScript exporter, which needs no package but onnx, follows sizes that depend on the data (how
many pixels are selected), and is in every torch from 2.4. Standard operators of opset 17 alone. Every file is run in
ONNX Runtime right after it is written, and what it gives compared with torch, value by value.

Shape shorthand: B images, K classes, H, W native size, h, w low resolution.
"""

from __future__ import annotations

import contextlib
import copy
import glob
import io
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from sparserefine_ros.errors import ExportError, ParameterError
from sparserefine_ros.networks.mask2former import Mask2Former
from sparserefine_ros.networks.offseg import OffSeg
from sparserefine_ros.networks.refiner import SparseRefiner
from sparserefine_ros.networks.superpixel import SuperpixelTransformer
from sparserefine_ros.segmenter.onnx_session import onnxruntime
from sparserefine_ros.segmenter.plain_pipeline import PipelineOutput, PlainPipeline
from sparserefine_ros.segmenter.preprocess import resize
from sparserefine_ros.segmenter.segmenter import Segmenter
from sparserefine_ros.whole_files import whole

OPSET = 17  # ONNX Runtime 1.14, TensorRT 8.6
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-2}  # of the largest logit, by the network's number format
FLIPPED = 1e-4  # share of the pixels, at least one, whose class may differ: ties that rounding breaks the other way
LEFT_S = 3600.0  # a folder of a file that is being written is not so old
FIXED_SIZE = (SuperpixelTransformer, OffSeg, Mask2Former)
"""Networks that decide on their images' size while they are traced: one file a size, one image at a time."""
ELSE = (33, 17)  # added to a traced size: where one file is to serve every size, it is compared there as well


@dataclass(frozen=True)
class Exported:
    """A file and how far from torch's its values are."""

    path: Path
    difference: float  # largest difference of the logits over the largest logit; of the pipeline: of the entropy, nats
    flipped: float = 0.0  # share of the pixels whose class differs


class HalfPrecision(nn.Module):
    """A network in float16 whose images and logits stay float32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.half()

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, h, w] -> [B, K, h, w]
        logits: Tensor = self.network(images.half())
        return logits.float()


def is_dynamic(network: nn.Module) -> bool:
    """Whether one file serves images of every size and number."""
    return not any(isinstance(module, FIXED_SIZE) for module in network.modules())


def export_dense(
    network: nn.Module, path: Path, size: tuple[int, int], fixed: bool, half: bool = False, external: bool = False
) -> Exported:
    """Writes ``network``, normalised images float32 [B, 3, h, w] to logits float32 [B, K, h, w].

    Args:
        network: on any device; a copy is exported.
        path: of the file.
        size: (h, w) to trace and compare at; unless ``fixed``, two images of another size are compared, too.
        fixed: one image of exactly ``size``; needed where the network is not `is_dynamic`.
        half: compute in float16.
        external: weights in a file of their own beside it, ``path`` + ".data".

    Raises ExportError where the network cannot be exported, or its values differ from torch's.
    """
    network = copy.deepcopy(network).cpu().float().eval()
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with _naming(path, size):
        expected = [(images, network(images))]  # float32: half precision is compared with what it stands for
    if not fixed:
        others = torch.randn(2, 3, size[0] + ELSE[0], size[1] + ELSE[1], generator=torch.Generator().manual_seed(1))
        with contextlib.suppress(RuntimeError, ValueError), torch.no_grad():  # a size that torch takes no more either
            expected.append((others, network(others)))
    axes = {0: "batch", 2: "height", 3: "width"}
    with _checked(path) as partial:
        _write(
            HalfPrecision(network) if half else network, (images,), partial, ["images"], ["logits"],
            {} if fixed else {"images": axes, "logits": axes}, external,
        )  # fmt: skip
        tolerance, differences = TOLERANCE[torch.float16 if half else torch.float32], []
        for given, right in expected:
            height, width = given.shape[2:]
            [found] = _run(partial, {"images": given.numpy()}, f"{len(given)} of {height}x{width}")
            difference = float(np.abs(found - right.numpy()).max() / right.abs().max())
            if not difference <= tolerance:  # NaN, too
                raise ExportError(
                    f"{path.name} would give logits that differ from torch's by {difference:.1e} of the largest for "
                    f"images of {height}x{width}, allowed are {tolerance:.0e}; it is not kept: export it for one size "
                    f"alone{', or without half precision' if half else ''}, or run it in torch"
                )
            differences.append(difference)
    return Exported(path, max(differences))


def export_pipeline(
    segmenter: Segmenter, path: Path, size: tuple[int, int], fixed: bool, external: bool = False
) -> Exported:
    """Writes ``segmenter``, dense network and refiner: see `plain_pipeline`.

    Inputs are image uint8 [1, H, W, 3] RGB and entropy_threshold float32 []; outputs those of `PipelineOutput`.

    Args:
        segmenter: on any device.
        path, external: as in `export_dense`.
        size: (H, W) to trace and compare at.
        fixed: images of exactly ``size``.

    Raises ExportError where it has no refiner, cannot be exported, or gives other values than torch.
    """
    if segmenter.refiner is None:
        raise ExportError(
            f"bundle {segmenter.bundle.name!r} has no refiner to export; export its dense segmenter: --what dense"
        )
    if not isinstance(segmenter.refiner, SparseRefiner):
        raise ExportError(
            f"the refiner of bundle {segmenter.bundle.name!r} is no sparse network; export its dense segmenter: "
            "--what dense"
        )
    dense, unfused = copy.deepcopy(segmenter.dense), copy.copy(segmenter.refiner)
    unfused.fused = None
    pipeline = PlainPipeline(dense, copy.deepcopy(unfused), segmenter.scale).cpu().float().eval()
    image, threshold = torch.from_numpy(_picture(size))[None], torch.tensor(segmenter.entropy_threshold)
    with _naming(path, size):
        expected: PipelineOutput = pipeline(image, threshold)
    native, low = {1: "height", 2: "width"}, {1: "low_height", 2: "low_width"}
    axes = {"image": native, "mask": native, "confidence": native, "entropy": low}
    feeds = {"image": image.numpy(), "entropy_threshold": threshold.numpy()}
    with _checked(path) as partial:
        _write(
            pipeline, (image, threshold), partial, list(feeds), list(PipelineOutput._fields), {} if fixed else axes,
            external,
        )  # fmt: skip
        arrays = _run(partial, feeds, f"{size[0]}x{size[1]}")
        found = PipelineOutput(*(torch.from_numpy(np.asarray(array)) for array in arrays))
        pixels, flips = expected.mask.numel(), int((found.mask != expected.mask).sum())
        difference = float((found.entropy - expected.entropy).abs().max())
        allowed = max(1, int(FLIPPED * pixels))
        if not (flips <= allowed and difference <= TOLERANCE[torch.float32] * len(segmenter.classes)):
            raise ExportError(
                f"{path.name} would give another class than torch for {flips} of {pixels} pixels, allowed are "
                f"{allowed}, and entropies that differ by {difference:.1e} nats; it is not kept: give another --size, "
                "or run it in torch"
            )
    return Exported(path, difference, flips / pixels)


@contextlib.contextmanager
def _naming(path: Path, size: tuple[int, int]) -> Iterator[None]:
    """Without gradients; ExportError where the network does not take images of ``size``."""
    try:
        with torch.no_grad():
            yield
    except (RuntimeError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(
            f"cannot make {path.name} for images of {size[0]}x{size[1]}: {first}; give a size that the network takes"
        ) from error


def require(package: str, install: str) -> ModuleType:
    """The package; ExportError saying how to install it."""
    try:
        return __import__(package)
    except ImportError as error:
        raise ExportError(f"export needs the package {package}: pip install {install} ({error})") from error


@contextlib.contextmanager
def _checked(path: Path) -> Iterator[Path]:
    """Gives a file of that name in a folder of its own; with its weights it goes to ``path`` when the block ends well.

    Its weights beside it are found by their own name, so another name would not do.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.stem[:100])}-????????"):  # of processes that were killed
        with contextlib.suppress(OSError):
            if left.is_dir() and time.time() - left.stat().st_mtime > LEFT_S:
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.stem[:100]}-", dir=path.parent) as folder:
        try:
            yield Path(folder) / path.name
        except OSError as error:  # of a full disk the exporter does not say where
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        for file in sorted(Path(folder).iterdir(), reverse=True):  # the weights first
            with whole(path.parent / file.name) as partial:
                file.replace(partial)


def _write(
    module: nn.Module, inputs: tuple[Tensor, ...], path: Path, names: list[str], outputs: list[str],
    axes: dict[str, dict[int, str]], external: bool,
) -> None:  # fmt: skip
    onnx: Any = require("onnx", "onnx")
    # torch 2.4 has one exporter and no such choice
    choice: dict[str, Any] = {"dynamo": False} if "dynamo" in signature(torch.onnx.export).parameters else {}
    chatter = io.StringIO()  # on failure the exporter prints the whole graph
    with warnings.catch_warnings(), contextlib.redirect_stdout(chatter), torch.no_grad():
        warnings.simplefilter("ignore")  # tracing warns of every size that becomes a number
        try:
            torch.onnx.export(
                module, inputs, str(path), input_names=names, output_names=outputs, dynamic_axes=axes,
                opset_version=OPSET, **choice,
            )  # fmt: skip
        except (RuntimeError, ValueError, TypeError, torch.onnx.errors.OnnxExporterError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise ExportError(f"torch {torch.__version__} cannot export {type(module).__name__}: {first}") from error
    if not axes and any(isinstance(part, Mask2Former) for part in module.modules()):
        _make_grids_single(onnx, path)
    if external:
        data = path.with_name(path.name + ".data")
        onnx.save_model(onnx.load(path), path, save_as_external_data=True, location=data.name, size_threshold=1024)
        data.chmod(0o644)  # onnx writes a file that only its owner may read


def _make_grids_single(onnx: Any, path: Path) -> None:
    """Where sizes are fixed the exporter computes positions in float64 beforehand, at which no CPU samples a grid."""
    model = onnx.load(path)
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        if node.op_type == "GridSample":
            grid, node.input[1] = node.input[1], f"{node.name}/single"
            cast = onnx.helper.make_node("Cast", [grid], [node.input[1]], to=onnx.TensorProto.FLOAT)
            model.graph.node.append(cast)
        model.graph.node.append(node)
    onnx.save(model, path)


def _run(path: Path, feeds: dict[str, np.ndarray], images: str) -> list[np.ndarray]:
    try:
        runtime = onnxruntime()
    except ParameterError as error:
        raise ExportError(f"export runs what it has written: {error}") from error
    try:
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        arrays: list[np.ndarray] = session.run(None, feeds)
    except Exception as error:  # its exceptions share no base of their own
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(
            f"onnxruntime {runtime.__version__} cannot run {path.name} on images, {images}: {first}; it is not kept: "
            "export it for one size alone, without half precision, or run it in torch"
        ) from error
    return arrays


def _picture(size: tuple[int, int]) -> np.ndarray:
    """[H, W, 3] uint8: random colours in patches, so that there are areas and borders."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (size[0] // 8 + 1, size[1] // 8 + 1, 3), dtype=np.uint8)
    return resize(np.ascontiguousarray(cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_LINEAR)), size)
