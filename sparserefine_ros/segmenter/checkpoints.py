"""The weights in a checkpoint file, read without running what else it may hold."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from sparserefine_ros.errors import BundleError

WRAPPER = "module."
SAFE_TORCH = (2, 6)  # before it, weights_only kept code out less well than it said


class Checkpoint(NamedTuple):
    """What is in a file."""

    weights: dict[str, Tensor]
    class_names: tuple[str, ...] = ()  # in the order of their ids, where it says so


class _Ignored:
    """Takes anything and does nothing."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


STAND_INS = tuple(
    type(name, (_Ignored,), {"__module__": module})
    for module, name in (
        ("mmengine.logging.history_buffer", "HistoryBuffer"),
        ("builtins", "getattr"),
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    )
)
"""What the log of the training is made of that mmengine saves with the weights; these are built in its place.

torch's weights_only refuses the file for the sake of that log. None of the real ones is looked up, let alone called.
"""


def read_checkpoint(file: Path) -> Checkpoint:
    """The weights of ``file`` by name, without the `module.` that torch's DataParallel puts before all of them.

    Raises BundleError for a file that is unreadable or holds anything but tensors.
    """
    try:
        if file.suffix == ".safetensors":
            return Checkpoint(_unwrapped(load_file(file)))
        if _release(torch.__version__) < SAFE_TORCH:
            raise BundleError(
                f"torch {torch.__version__} can be made to run code by a .pth file (CVE-2025-32434); install torch >= "
                f"{'.'.join(map(str, SAFE_TORCH))}, or import {file} from .safetensors"
            )
        with torch.serialization.safe_globals(list(STAND_INS)):
            data = torch.load(file, map_location="cpu", weights_only=True)
    except BundleError:
        raise
    except pickle.UnpicklingError as error:
        raise BundleError(
            f"{file} is damaged or holds more than weights, which could run code and is not loaded; if you trust it, "
            "keep its weights alone: torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW_FILE)"
        ) from error
    except Exception as error:  # a file cut short makes the readers raise anything
        raise BundleError(f"cannot read checkpoint {file}: {error}; give a .pth or .safetensors file") from error
    names = _class_names(data)
    if isinstance(data, dict) and isinstance(data.get("state_dict"), dict):
        data = data["state_dict"]
    if not isinstance(data, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in data.items()):
        held = f"a dict of {', '.join(map(str, list(data)[:8]))}" if isinstance(data, dict) else type(data).__name__
        raise BundleError(
            f"{file} holds no state dict of named weights, but {held:.200}; if one of these is it, keep that alone: "
            "torch.save(torch.load(FILE, weights_only=True)[KEY], NEW_FILE)"
        )
    for name, tensor in data.items():
        if not _is_plain(tensor):
            what = f"{str(tensor.dtype).removeprefix('torch.')}, {str(tensor.layout).removeprefix('torch.')}"
            raise BundleError(f"{file}: weight {name!r} is no plain tensor of numbers ({what}); save it as float32")
    return Checkpoint(_unwrapped(data), names)


def _unwrapped(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    wrapped = bool(weights) and all(name.startswith(WRAPPER) for name in weights)
    return {name.removeprefix(WRAPPER) if wrapped else name: tensor for name, tensor in weights.items()}


def _class_names(data: Any) -> tuple[str, ...]:
    """Of mmsegmentation's note beside the weights, as its versions 0 and 1 write it."""
    meta = data.get("meta") if isinstance(data, dict) else None
    if not isinstance(meta, dict):
        return ()
    dataset = meta.get("dataset_meta")
    names = dataset.get("classes") if isinstance(dataset, dict) else meta.get("CLASSES")
    return tuple(map(str, names)) if isinstance(names, list | tuple) else ()


def _is_plain(tensor: Tensor) -> bool:
    """Whether it has its values in memory, one after another; counters and index tables are whole numbers."""
    dense = tensor.layout is torch.strided and not tensor.is_nested and tensor.device.type == "cpu"
    numbers = tensor.is_floating_point() or tensor.dtype in (torch.int32, torch.int64)
    return dense and numbers and not tensor.is_quantized


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (2, 6, 0) of "2.6.0+cpu"."""
    return tuple(int(number) for number in re.findall(r"\d+", version.split("+")[0])[:3])
