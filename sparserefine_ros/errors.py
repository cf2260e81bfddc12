"""Errors meant for people: each message names what was wrong, with which value, and what would be right."""

from __future__ import annotations


class SparseRefineError(Exception):
    """Base of every error that the command line prints as one line, without a traceback."""


class BundleError(SparseRefineError):
    """A model bundle is missing, incomplete, corrupt or does not fit what was asked of it."""


class FrameError(SparseRefineError):
    """One camera frame cannot be used; it costs that frame only."""


class BagError(SparseRefineError):
    """A bag cannot be read or written, or lacks what an evaluation needs."""


class DatasetError(SparseRefineError):
    """A dataset folder is missing or holds something other than what its reader expects."""


class ParameterError(SparseRefineError):
    """A parameter has a value outside its range or choices."""


class ExportError(SparseRefineError):
    """A network cannot be written for another runtime, or gives other values there."""


class TrainingError(SparseRefineError):
    """A training run cannot start or go on."""


class ResultError(SparseRefineError):
    """A file with results cannot be written or read, or cannot be compared with another."""


OUT_OF_MEMORY = (
    "out of memory",  # CUDA
    "can't allocate memory",  # torch on a CPU
    "not enough memory",  # the same, on some systems
    "alloc_failed",  # cuBLAS, cuDNN
    "failed to allocate memory",  # ONNX Runtime
    "insufficient memory",  # OpenCV
    "nvml_success == r",  # CUDA on a Jetson: torch's allocator stumbles over what that lacks before it can tell
)
"""What libraries say where memory ends; their exceptions share no type."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the host or the GPU ran out of memory."""
    text = str(error).lower()
    told = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # the latter is torch's
    return told or any(words in text for words in OUT_OF_MEMORY)
