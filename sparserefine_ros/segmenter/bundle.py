"""A bundle: the folder that holds everything needed to rebuild one segmenter.

models/NAME/model.yaml            what this module reads and writes
models/NAME/dense.safetensors     the dense segmenter
models/NAME/native.safetensors    the same network tuned for native resolution, where there is one: the HR baseline
models/NAME/refiner.safetensors   the refiner, where there is one
models/NAME/README.md             the model card
"""

from __future__ import annotations

import hashlib
import math
import os
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from sparserefine_ros.datasets.classes import ClassList
from sparserefine_ros.errors import BundleError
from sparserefine_ros.networks.limits import at_most, check_arguments
from sparserefine_ros.segmenter.bundle_files import FORMAT, read_model_yaml, read_weights, write_model_yaml
from sparserefine_ros.segmenter.preprocess import low_resolution_size
from sparserefine_ros.whole_files import write_whole

ONNX = "onnx"
"""In place of a network's name: the weights are an ONNX file, which ONNX Runtime runs as it is."""
MAX_NATIVE = 2**26
"""Pixels of the largest native size: as many as the node takes in a frame."""
MIN_SIDE = 4
"""Pixels that the dense segmenter must be left of a frame's side."""
DEFAULT_BUNDLES = {
    "sparserefine": "camvid",
    "superpixel": "camvid-superpixel",
    "offseg": "camvid-offseg",
    "dense": "camvid",
}
"""The bundle that each decoder uses when no model is named."""
DECODERS = tuple(DEFAULT_BUNDLES)


@dataclass(frozen=True)
class NetworkSpec:
    """One network of a bundle: what to build and which file holds its weights."""

    network: str  # a name of networks.registry, or ONNX
    args: dict[str, Any]
    weights: str  # file name inside the bundle
    sha256: str  # of that file, 64 hexadecimal digits


@dataclass(frozen=True)
class Bundle:
    """The contents of ``model.yaml``, checked."""

    path: Path
    name: str
    classes: ClassList
    scale: float  # low resolution over native resolution
    native_size: tuple[int, int]  # (H, W) it was trained for; other sizes work too
    dense: NetworkSpec
    refiner: NetworkSpec | None = None
    native: NetworkSpec | None = None  # runs in place of ``dense`` at scale 1
    entropy_threshold: float = 0.3  # nats
    temperature: float = 1.0  # divides the dense segmenter's logits, so that entropy means the same in every bundle
    calibration: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def decoders(self) -> tuple[str, ...]:
        """The launch choices that this bundle serves; "dense" is whatever dense segmenter it has, unrefined."""
        kind = "offseg" if self.dense.args.get("offsets") else self.dense.network
        return (
            "dense",
            *(("sparserefine",) if self.refiner else ()),
            *((kind,) if kind in ("superpixel", "offseg") else ()),
        )

    @staticmethod
    def load(name_or_path: str | Path) -> Bundle:
        """Reads and checks ``model.yaml`` and the presence and hash of the weights, before any of them is parsed.

        Raises BundleError for a missing folder, a broken file, a class list or threshold out of range, weights outside
        the folder or with another hash than ``model.yaml`` says.
        """
        path = find_bundle(name_or_path)
        bundle = _checked(path, read_model_yaml(path / "model.yaml"))
        for spec in (bundle.dense, bundle.refiner, bundle.native):
            if spec:
                read_weights(path, spec.weights, spec.sha256)
        return bundle

    def check(self) -> None:
        """Raises BundleError where `load` would refuse what `save` writes."""
        _checked(self.path, self._data())

    def save(self) -> None:
        """Writes ``model.yaml``; the weights are written by ``save_network``."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_model_yaml(self.path / "model.yaml", self._data())

    def _data(self) -> dict[str, Any]:
        """What ``model.yaml`` says."""
        return {
            "format": FORMAT,
            "name": self.name,
            "classes": self.classes.as_data(),
            "scale": self.scale,
            "native_size": list(self.native_size),
            "entropy_threshold": self.entropy_threshold,
            "temperature": self.temperature,
            "dense": vars(self.dense),
            "refiner": vars(self.refiner) if self.refiner else None,
            "native": vars(self.native) if self.native else None,
            "calibration": self.calibration,
            "provenance": self.provenance,
        }


def find_bundle(name_or_path: str | Path) -> Path:
    """The folder of a bundle given by path or by name.

    A name is looked for under $SPARSEREFINE_MODELS, then models/ of a source checkout, then the installed share folder.
    """
    direct = Path(os.path.expanduser(name_or_path))  # Path's own raises for ~user where there is no such user
    try:
        if (direct / "model.yaml").is_file():
            return direct
    except OSError as error:  # a name too long, a folder that may not be looked into
        raise BundleError(f"no bundle {str(name_or_path)!r:.80}: {error.strerror}; give another folder") from error
    folders = model_folders()
    inside = bool(direct.parts) and not direct.is_absolute() and ".." not in direct.parts
    for folder in folders:
        if inside and (folder / direct / "model.yaml").is_file():
            return folder / direct
    if direct.is_dir():
        raise BundleError(f"{direct} is no bundle: it has no model.yaml; give a folder that `sparserefine train` wrote")
    here = Path("models") / direct
    if inside and (here / "model.yaml").is_file():
        raise BundleError(
            f"no bundle {str(name_or_path)!r} where names are looked up, but one at {here}: give that folder, or set "
            "SPARSEREFINE_MODELS to the folder it lies in"
        )
    known = sorted({p.parent.name for folder in folders if folder.is_dir() for p in folder.glob("*/model.yaml")})
    raise BundleError(
        f"no bundle {str(name_or_path)!r}; give a folder with a model.yaml, "
        f"or one of: {', '.join(known) or '(none found)'}"
    )


def model_folders() -> list[Path]:
    """Where bundles are looked for, in order."""
    package = Path(__file__).resolve().parents[1]
    folders = [Path(os.environ["SPARSEREFINE_MODELS"])] if os.environ.get("SPARSEREFINE_MODELS") else []
    folders.append(package.parent / "models")
    share = Path("share") / "sparserefine_ros" / "models"
    folders += [Path(prefix) / share for prefix in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep) if prefix]
    prefixes = [*package.parents[:4], Path(sysconfig.get_path("data"))]  # PREFIX/lib/pythonX.Y/site-packages, --target
    folders += [prefix / share for prefix in dict.fromkeys(prefixes)]
    return folders


def default_bundle(decoder: str) -> str:
    """The bundle that ``decoder`` uses when no model is named."""
    if decoder not in DEFAULT_BUNDLES:
        raise BundleError(f"unknown decoder {decoder!r}; choose one of {', '.join(DECODERS)}")
    return DEFAULT_BUNDLES[decoder]


def save_network(path: Path, module: nn.Module, network: str, args: Mapping[str, Any], file: str) -> NetworkSpec:
    """Writes ``module``'s weights as safetensors into the bundle folder and describes them.

    Matrices and kernels are stored in half precision, which halves the bundle; loading widens them again. Those with a
    number that is too large for it stay as they are.
    """
    path.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    content = save_tensors({name: _halved(tensor) for name, tensor in state.items()})
    write_whole(path / file, content)
    return NetworkSpec(network, dict(args), file, hashlib.sha256(content).hexdigest())


def _halved(tensor: Tensor) -> Tensor:
    if tensor.ndim < 2 or not tensor.is_floating_point():
        return tensor
    half = tensor.half()
    return half if half.isfinite().all() else tensor


def build_network(path: Path, spec: NetworkSpec, make: Callable[[], nn.Module]) -> nn.Module:
    """What ``make`` builds, filled from the bundle's file.

    Raises BundleError where it cannot be built, asks for far more memory than the weights fill, or as ``load_network``.
    """
    tensors = _read_tensors(path, spec)
    module = construct(make, spec.args, tensors, f"{path / 'model.yaml'}: network {spec.network!r:.80}")
    return _fill(path, spec, module, tensors)


def construct(
    make: Callable[[], nn.Module], args: Mapping[str, Any], weights: Mapping[str, Tensor], what: str
) -> nn.Module:
    """What ``make`` builds of ``args`` that somebody else wrote, to be filled with ``weights``.

    Raises BundleError, which begins with ``what``, where it cannot be built or asks for far more memory than they fill.
    """
    try:
        check_arguments(args)
        with at_most(sum(tensor.numel() for tensor in weights.values()), len(weights)):
            return make()
    except Exception as error:  # a constructor may stumble over its arguments in any way
        why = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise BundleError(f"{what}: {why}") from error


def load_network(path: Path, spec: NetworkSpec, module: nn.Module) -> nn.Module:
    """Fills ``module`` from the bundle's file; BundleError names any weight that is missing, left over or misshapen."""
    return _fill(path, spec, module, _read_tensors(path, spec))


def _read_tensors(path: Path, spec: NetworkSpec) -> dict[str, Tensor]:
    content = read_weights(path, spec.weights, spec.sha256)  # what is hashed is what is parsed
    try:
        tensors: dict[str, Tensor] = load_tensors(content)
    except Exception as error:  # SafetensorError; KeyError for a type of number that torch does not have; ...
        raise BundleError(f"cannot read weights {path / spec.weights}: {error}; restore the bundle") from error
    return tensors


def _fill(path: Path, spec: NetworkSpec, module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    file, wanted = path / spec.weights, module.state_dict()
    for key in sorted(set(wanted) | set(tensors)):
        if key not in tensors or key not in wanted:
            where = "is missing from" if key not in tensors else "is left over in"
            raise BundleError(f"weight {key!r} {where} {file} for network {spec.network!r} with {spec.args}")
        if wanted[key].shape != tensors[key].shape:
            raise BundleError(
                f"weight {key!r} in {file} has shape {tuple(tensors[key].shape)}, but {spec.network!r} "
                f"with {spec.args} needs {tuple(wanted[key].shape)}; do the classes of model.yaml fit the weights?"
            )
        if not tensors[key].to(wanted[key].dtype).isfinite().all():  # the types of 8 bits cannot say it themselves
            raise BundleError(
                f"weight {key!r} in {file} has values that are not finite: the training diverged; train it again, or "
                "restore the bundle"
            )
    module.load_state_dict(tensors)
    return module.eval()


def _checked(path: Path, data: Mapping[str, Any]) -> Bundle:
    try:
        return _parse(path, data)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise BundleError(f"{path / 'model.yaml'}: {what}; compare it with a bundle under models/") from error


def _parse(path: Path, data: Mapping[str, Any]) -> Bundle:
    classes = ClassList.from_data(data["classes"])
    if len(classes) < 2:
        raise ValueError("1 class; expected 2 at least")
    scale, threshold = float(data["scale"]), float(data["entropy_threshold"])
    if not 0 < scale <= 1:
        raise ValueError(f"scale {scale}; expected above 0 and at most 1")
    if not 0 <= threshold <= math.log(len(classes)):
        raise ValueError(
            f"entropy_threshold {threshold}; expected 0 to log {len(classes)} = {math.log(len(classes)):.3f}"
        )
    temperature = float(data.get("temperature", 1.0))
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature {temperature}; expected a number above 0")
    height, width = (int(v) for v in data["native_size"])
    if not (height > 0 and width > 0 and height * width <= MAX_NATIVE):
        raise ValueError(
            f"native_size {height} x {width}; expected two numbers above 0, of at most {MAX_NATIVE} pixels"
        )
    low = low_resolution_size((height, width), scale)
    if min(low) < MIN_SIDE:
        raise ValueError(
            f"scale {scale:g} leaves {low[0]}x{low[1]} of frames of {height}x{width}; expected {MIN_SIDE} pixels a "
            "side, or more"
        )
    refiner, native = (_spec(key, data[key]) if data.get(key) else None for key in ("refiner", "native"))
    return Bundle(
        path, str(data["name"]), classes, scale, (height, width), _spec("dense", data["dense"]), refiner, native,
        threshold, temperature, dict(data.get("calibration") or {}), dict(data.get("provenance") or {}),
    )  # fmt: skip


def _spec(key: str, data: Any) -> NetworkSpec:
    if not isinstance(data, dict) or not isinstance(data.get("args", {}), dict):
        raise ValueError(f"{key}; expected network, args, weights and sha256")
    for name in ("network", "weights", "sha256"):
        if name in data and not isinstance(data[name], str):
            raise ValueError(f"{key}: {name} {data[name]!r:.80}; expected text")
    if "sha256" not in data:
        raise ValueError(f"{key} has no sha256 of its weights; if you trust them, `sparserefine rehash` writes it")
    spec = NetworkSpec(**data)
    if spec.network == ONNX:
        _check_onnx(key, spec.args)
    return spec


def _check_onnx(key: str, args: Mapping[str, Any]) -> None:
    """ValueError unless ``args`` are what `onnx_file.inspect` writes; missing ones show where they are read."""
    size = args.get("size")
    if size is not None and not (
        isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
        and size[0] * size[1] <= MAX_NATIVE
    ):  # fmt: skip
        raise ValueError(
            f"{key}: size {size!r:.80}; expected null or [height, width] above 0, of at most {MAX_NATIVE} pixels"
        )
    for name in ("input", "output", "dtype"):
        if name in args and not isinstance(args[name], str):
            raise ValueError(f"{key}: {name} {args[name]!r:.80}; expected text")
