"""Fixtures that several tests share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sparserefine_ros.datasets.classes import CAMVID
from sparserefine_ros.networks.compact import CompactSegmenter
from sparserefine_ros.networks.refiner import SparseRefiner
from sparserefine_ros.segmenter.bundle import Bundle, save_network

torch.set_num_threads(1)


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
def frame() -> np.ndarray:
    """A smooth image with noise, [64, 96, 3] uint8."""
    rng = np.random.default_rng(7)
    coarse = rng.uniform(0, 255, (8, 12, 3)).repeat(8, 0).repeat(8, 1)
    return (0.8 * coarse + rng.uniform(0, 50, coarse.shape)).clip(0, 255).astype(np.uint8)
