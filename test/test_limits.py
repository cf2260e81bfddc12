"""Arguments of networks that somebody else wrote: told by name before memory is taken, never found out on a frame."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparserefine_ros.errors import BundleError
from sparserefine_ros.networks.patches import PatchRefiner
from sparserefine_ros.networks.registry import DENSE, REFINERS, build
from sparserefine_ros.segmenter.bundle import construct


@pytest.mark.parametrize(
    ("network", "args", "message"),
    [
        ("superpixel", {"grid": []}, r"grid is \[\]; give a list of 2 whole numbers from 1"),
        ("superpixel", {"grid": [0, 3]}, r"grid is \[0, 3\]; give a list of 2 whole numbers from 1"),
        ("superpixel", {"pixel_stride": 0}, "pixel_stride is 0; give a whole number from 1"),
        ("superpixel", {"pixel_stride": -4, "superpixel_stride": -16}, "pixel_stride is -4; give a whole number"),
        ("superpixel", {"pixel_stride": 128, "superpixel_stride": 128}, "stride is 128; give .* from 1 to 64"),
        ("superpixel", {"local_heads": -2}, "local_heads is -2; give a whole number from 1"),
        ("superpixel", {"global_heads": 0}, "global_heads is 0; give a whole number from 1"),
        ("superpixel", {"channels": [8]}, r"channels is \[8\]; give a whole number from 1"),
        ("superpixel", {"channels": 0}, "channels is 0; give a whole number from 1"),
        ("superpixel", {"local_layers": -3}, "local_layers is -3; give a whole number from 0"),
        ("superpixel", {"residual": "no"}, "residual is 'no'; give true or false"),
        ("superpixel", {"backbone": 7}, "unknown backbone 7; known are compact"),
        ("compact", {"widths": [8, 8, 8]}, r"widths is \[8, 8, 8\]; give a list of 4 whole numbers from 1"),
        ("compact", {"widths": [8, 8, 8, 2]}, "2 channels into quarters; give at least 4"),
        ("compact", {"widths": "abcd"}, "widths is 'abcd'; give a list of 4 whole numbers from 1"),
        ("compact", {"depths": [1, 0, 1]}, r"depths is \[1, 0, 1\]; give a list of 3 whole numbers from 1"),
        ("compact", {"depths": [1, 1.5, 1]}, r"depths is \[1, 1.5, 1\]; give a list of 3 whole numbers from 1"),
        ("compact", {"offsets": "no"}, "offsets is 'no'; give true or false"),
        ("pyramid", {"width": 0}, "width is 0; give a whole number from 1"),
        ("pyramid", {"stride": -5}, "stride is -5; give a whole number from 1"),
        ("offseg", {"resolution": -512}, "resolution is -512; give a whole number from 1"),
        ("pointrend", {"features": 8, "hidden": 0}, "hidden is 0; give a whole number from 1"),
        ("pointrend", {"features": 8, "layers": -1}, "layers is -1; give a whole number from 0"),
        ("sparserefine", {"channels": [1] * 400}, "channels are of 400 levels; give 1 to 16"),
        ("patches", {"size": 256.5}, "size is 256.5; give a whole number from 1"),
        ("patches", {"batch": 1.5}, "batch is 1.5; give a whole number from 1 to 64"),
        ("patches", {"size": 1, "margin": 65536, "batch": 65536}, "batch is 65536; give a whole number from 1 to 64"),
        ("bilateral", {"distance": 1e-30}, "distance 1e-30, .*; give two numbers from 1e-06"),
        ("bilateral", {"colour": 1e-200}, "colour 1e-200, .*; give two numbers from 1e-06"),
        ("sparserefine", {"channels": [8], "blocks": 1.5}, "blocks is 1.5; give a whole number from 1"),
    ],
)
def test_arguments_that_no_frame_could_be_segmented_with(network: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=f"^model.yaml: .*{message}"):
        construct(lambda: build(DENSE | REFINERS, network, 3, args), args, {}, "model.yaml")


def test_a_grid_is_refused_before_it_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    filled: list[torch.Size] = []
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, **_: filled.append(tensor.shape))
    args = {"grid": [4096, 4096]}  # 6 GB
    with pytest.raises(BundleError, match="far more than the 0 values of its weights"):
        construct(lambda: build(DENSE, "superpixel", 3, args), args, {}, "model.yaml")
    assert not filled


def test_a_patch_beyond_the_image_takes_no_more_memory_than_the_image() -> None:
    selected = torch.zeros(2, 40, 30, dtype=torch.bool)
    selected[1, 39, 29] = True
    assert PatchRefiner(3, size=2**16).choose(selected).tolist() == [[1, 0, 0]]  # 34 GB if it were filled up
