"""Fixtures that several tests share."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

# Triton reads this when it is first imported, which is later than this line: without a GPU it interprets its kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from sparserefine_ros.datasets.classes import CAMVID
from sparserefine_ros.networks.compact import CompactSegmenter
from sparserefine_ros.networks.refiner import SparseRefiner
from sparserefine_ros.networks.registry import DENSE, build
from sparserefine_ros.segmenter.bundle import Bundle, save_network

torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`pytest -n 2`: a file stays with one worker, and all files that have to do with ROS stay with the same.

    Nodes keep time and choose their domains: no two tests may run some at once.
    """
    from xdist.scheduler import LoadScopeScheduling

    @cache
    def group(file: str) -> str:
        return "ros" if "rclpy" in (config.rootpath / file).read_text() else file

    class Grouped(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid.partition("::")[0])

    return Grouped(config, log)


@contextmanager
def disk_with(size: int) -> Iterator[None]:
    """Stands for a disk that is almost full: no file may grow beyond so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def write_tiny_bundle(path: Path, seed: int = 0) -> Path:
    """A bundle of random weights, small enough to run anywhere in milliseconds."""
    torch.manual_seed(seed)
    dense_args = {"widths": [8, 8, 8, 8], "depths": [1, 1, 1]}
    refiner_args = {"channels": [8, 16], "stride": "floor", "blocks": 1}
    dense = CompactSegmenter(len(CAMVID), **dense_args)
    refiner = SparseRefiner(len(CAMVID), **refiner_args)
    with torch.no_grad():
        dense.classifier.weight *= 60  # spreads the entropies, so that thresholds have something to divide
    Bundle(
        path=path, name="tiny", classes=CAMVID, scale=0.5, native_size=(64, 96),
        dense=save_network(path, dense, "compact", dense_args, "dense.safetensors"),
        refiner=save_network(path, refiner, "sparserefine", refiner_args, "refiner.safetensors"),
        entropy_threshold=1.0,
    ).save()  # fmt: skip
    return path


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a randomly initialised bundle with the 11 CamVid classes; do not write into it."""
    return write_tiny_bundle(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def quick_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter without its search for integer overflow, a third of its time.

    For tests of whole networks: each kernel is searched in test_backend_triton.py.
    """
    if "TRITON_INTERPRET" in os.environ and find_spec("triton"):
        from triton.runtime.interpreter import interpreter_builder

        if getattr(interpreter_builder.options, "sanitize_overflow", False):  # Triton 3.0 does not search
            options = replace(interpreter_builder.options, sanitize_overflow=False)
            monkeypatch.setattr(interpreter_builder, "options", options)


DECODERS = {
    "per-pixel": ("compact", {"widths": [8, 8, 8, 8], "depths": [1, 1, 1]}),
    "offseg": ("compact", {"widths": [8, 8, 8, 8], "depths": [1, 1, 1], "offsets": True}),
    "superpixel": (
        "superpixel",
        {"channels": 16, "grid": [2, 3], "global_layers": 1, "global_heads": 2, "residual": True},
    ),
}


def write_decoder_bundle(path: Path, decoder: str, **changes: Any) -> Path:
    """A bundle of random weights with that decoder and a refiner."""
    torch.manual_seed(0)
    network, args = DECODERS[decoder]
    refiner_args = {"channels": [8, 16], "stride": "floor", "blocks": 1}
    dense, refiner = build(DENSE, network, len(CAMVID), args), SparseRefiner(len(CAMVID), **refiner_args)
    if decoder == "superpixel":
        with torch.no_grad():
            dense.queries *= 100  # as drawn, superpixels are so alike that one takes all pixels around it
            dense.superpixel_positions *= 100
    Bundle(
        path=path, name=decoder, classes=CAMVID, scale=0.5, native_size=(64, 96),
        dense=save_network(path, dense, network, args, "dense.safetensors"),
        refiner=save_network(path, refiner, "sparserefine", refiner_args, "refiner.safetensors"),
        entropy_threshold=2.3, **changes,
    ).save()  # fmt: skip
    return path


@pytest.fixture
def frame() -> np.ndarray:
    """A smooth image with noise, [64, 96, 3] uint8."""
    rng = np.random.default_rng(7)
    coarse = rng.uniform(0, 255, (8, 12, 3)).repeat(8, 0).repeat(8, 1)
    return (0.8 * coarse + rng.uniform(0, 50, coarse.shape)).clip(0, 255).astype(np.uint8)
