"""Whether a bundle's refiner can run over its dense segmenter: told when both are loaded, not at the first frame."""

from __future__ import annotations

import torch
from torch import nn

from sparserefine_ros.errors import BundleError, ParameterError, is_out_of_memory
from sparserefine_ros.networks.ensemblers import OracleEnsembler
from sparserefine_ros.networks.pointrend import PointRend
from sparserefine_ros.networks.registry import DENSE, Refiner
from sparserefine_ros.networks.repeater import check_repeatable
from sparserefine_ros.segmenter.bundle import ONNX, Bundle, NetworkSpec
from sparserefine_ros.segmenter.dense import coarse_and_fine, unwrapped
from sparserefine_ros.segmenter.refining import KINDS


def check_refiner(bundle: Bundle, refiner: Refiner, dense: nn.Module, native: NetworkSpec, runtime: str) -> None:
    """Raises BundleError, or ParameterError for a runtime that hides what the refiner reads.

    Args:
        refiner: of ``bundle``, loaded.
        dense: of `load_dense`, which ``runtime`` runs.
        native: what a refiner that runs the dense segmenter at native resolution runs.
    """
    assert bundle.refiner is not None
    name = bundle.refiner.network
    if isinstance(refiner.ensembler, OracleEnsembler):
        raise BundleError(
            f"the ensembler of bundle {bundle.name!r} is oracle, which needs labels; train it with another"
        )
    if KINDS[name].needs_native and native.network == ONNX and native.args.get("size") is not None:
        raise BundleError(
            f"refiner {name!r} shows the dense segmenter parts of frames, but that of bundle {bundle.name!r} is an "
            "ONNX file for images of one size; export it anew with dynamic height and width"
        )
    if (KINDS[name].needs_maps or KINDS[name].needs_record) and runtime != "torch":
        raise ParameterError(f"refiner {name!r} reads features of the dense segmenter; set runtime to torch")
    if KINDS[name].needs_maps:
        _check_maps(bundle, name, refiner, dense)


def check_repetition(bundle: Bundle, repeated: nn.Module, dense: nn.Module, device: torch.device) -> set[int]:
    """As `check_repeatable`; both as `load_dense` loads them, ``dense`` that of ``bundle``. Raises BundleError."""
    if reason := why_not_repeatable(repeated, dense, device):
        raise BundleError(
            f"refiner 'repeat' cannot follow network {bundle.dense.network!r} of bundle {bundle.name!r}: {reason}; "
            "take another refiner"
        )
    return check_repeatable(dense, repeated, device)


def why_not_repeatable(repeated: nn.Module, dense: nn.Module, device: torch.device) -> str:
    """Why ``repeated`` cannot follow ``dense``; empty where it can. Both take normalised images."""
    try:
        check_repeatable(dense, repeated, device)
    except Exception as error:  # a network may stumble in any way over what is no tensor
        if is_out_of_memory(error):
            raise
        return str(error) or type(error).__name__
    return ""


def _check_maps(bundle: Bundle, name: str, refiner: Refiner, dense: nn.Module) -> None:
    if not hasattr(unwrapped(dense), "coarse_and_fine"):
        shown = [network for network, kind in DENSE.items() if hasattr(kind, "coarse_and_fine")]
        raise BundleError(
            f"refiner {name!r} reads features that network {bundle.dense.network!r} does not show; "
            f"networks that do: {', '.join(shown)}"
        )
    assert isinstance(refiner, PointRend)
    with torch.inference_mode():
        maps = coarse_and_fine(dense, torch.zeros(1, 3, 32, 32, device=next(dense.parameters()).device))
    found = sum(fine.shape[1] for fine in maps.fine)
    if found != refiner.features:
        raise BundleError(
            f"the dense segmenter has {found} fine features, refiner {name!r} was built for {refiner.features}; take "
            "the refiner that was trained with it"
        )
