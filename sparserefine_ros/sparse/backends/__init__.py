"""Sparse engines by name. All give the same sites in the same order, and the same values within their rounding."""

from __future__ import annotations

from importlib import import_module

import torch

from sparserefine_ros.errors import ParameterError
from sparserefine_ros.sparse.backends.base import Backend, Output

__all__ = ["BACKENDS", "Backend", "Output", "pick_backend"]

BACKENDS = {
    "torch": "sparserefine_ros.sparse.backends.base:Backend",
    "cpu": "sparserefine_ros.sparse.backends.cpu:CpuBackend",
    "triton": "sparserefine_ros.sparse.backends.triton_backend:TritonBackend",
    "torchsparse": "sparserefine_ros.sparse.backends.torchsparse_backend:TorchsparseBackend",
    "spconv": "sparserefine_ros.sparse.backends.spconv_backend:SpconvBackend",
}
"""Where each engine lives; imported when first asked for."""

PREFERRED = {"cpu": ("cpu", "torch"), "cuda": ("torch",)}
"""What "auto" tries in turn, by device; on CUDA `segmenter.engine_trial` then looks for a faster one."""


def backend_class(name: str) -> type[Backend]:
    """The engine called ``name``; ParameterError for an unknown name."""
    if name not in BACKENDS:
        raise ParameterError(f"sparse backend {name!r} is unknown; choose one of auto, {', '.join(BACKENDS)}")
    module, attribute = BACKENDS[name].split(":")
    cls: type[Backend] = getattr(import_module(module), attribute)
    return cls


def pick_backend(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Backend:
    """The engine called ``name`` for features of ``dtype`` on ``device``; "auto" takes the fastest that can run there.

    Raises ParameterError for an unknown name and, naming what is missing, for one that cannot run there.
    """
    if name != "auto":
        cls = backend_class(name)
        reason = _reason(cls, device, dtype)
        if reason:
            raise ParameterError(f"sparse backend {name!r} cannot run on {device}: {reason}; choose auto or torch")
        return cls()
    for candidate in PREFERRED.get(device.type, ()):
        cls = backend_class(candidate)
        if not _reason(cls, device, dtype):
            return cls()
    return Backend()


def _reason(cls: type[Backend], device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype not in cls.dtypes:
        known = ", ".join(str(d).removeprefix("torch.") for d in cls.dtypes)
        return f"it computes in {known}, not in {str(dtype).removeprefix('torch.')}"
    return cls.missing(device)
