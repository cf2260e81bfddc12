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
