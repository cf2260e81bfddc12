"""Marks what needs a C compiler: without one the package falls back to torch, and so do the tests."""

from __future__ import annotations

import pytest
import torch

from sparserefine_ros.sparse.backends.cpu import CpuBackend

MISSING = CpuBackend.missing(torch.device("cpu"))
needs_compiler = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
