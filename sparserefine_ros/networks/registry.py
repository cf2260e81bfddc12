"""Networks by name, so that a bundle's ``model.yaml`` can say which one to rebuild.

A builder takes ``num_classes`` and the keyword arguments written in the bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import nn

from sparserefine_ros.networks.bilateral import BilateralRefiner
from sparserefine_ros.networks.compact import CompactSegmenter
from sparserefine_ros.networks.hrnet import HRNet
from sparserefine_ros.networks.mask2former import Mask2Former
from sparserefine_ros.networks.offseg import OffSeg
from sparserefine_ros.networks.patches import PatchRefiner
from sparserefine_ros.networks.pointrend import PointRend
from sparserefine_ros.networks.pyramid import PyramidSegmenter
from sparserefine_ros.networks.refiner import SparseRefiner
from sparserefine_ros.networks.repeater import RepeatRefiner
from sparserefine_ros.networks.segformer import SegFormer
from sparserefine_ros.networks.segformer_hub import HubSegFormer
from sparserefine_ros.networks.segnext import SegNeXt
from sparserefine_ros.networks.superpixel import SuperpixelTransformer

Refiner: TypeAlias = SparseRefiner | BilateralRefiner | PointRend | PatchRefiner | RepeatRefiner

DENSE: dict[str, Callable[..., nn.Module]] = {
    "compact": CompactSegmenter,
    "hrnet": HRNet,
    "mask2former": Mask2Former,
    "offseg": OffSeg,
    "pyramid": PyramidSegmenter,
    "segformer": SegFormer,
    "segformer-hub": HubSegFormer,
    "segnext": SegNeXt,
    "superpixel": SuperpixelTransformer,
}


def _repeat(num_classes: int, own: Mapping[str, Any] | None = None) -> RepeatRefiner:
    """own: ``network`` and ``args``, as a bundle writes them."""
    return RepeatRefiner(None if own is None else build(DENSE, own["network"], num_classes, own["args"]))


REFINERS: dict[str, Callable[..., Refiner]] = {
    "sparserefine": SparseRefiner,
    "bilateral": BilateralRefiner,
    "patches": PatchRefiner,
    "pointrend": PointRend,
    "repeat": _repeat,
}


def build(table: Mapping[str, Callable[..., Any]], name: str, num_classes: int, args: Mapping[str, Any]) -> Any:
    """The network called ``name``; ValueError with the known names, the rejected argument or the missing package."""
    if name not in table:
        raise ValueError(f"unknown network {name!r}; known are {', '.join(sorted(table))}")
    try:
        return table[name](num_classes, **args)
    except ImportError as error:
        raise ValueError(f"network {name!r} cannot be built here: {error}") from error
    except TypeError as error:
        raise ValueError(f"network {name!r} does not take these arguments {dict(args)}: {error}") from error
