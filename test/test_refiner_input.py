"""What the sparse U-Net is shown of its pixels: in C, bit for bit what torch gathers."""

from __future__ import annotations

import pytest
import torch
from compiler import needs_compiler
from hypothesis import given, settings
from hypothesis import strategies as st

from sparserefine_ros.networks.selectors import upsample_nearest
from sparserefine_ros.segmenter import refiner_input as module
from sparserefine_ros.segmenter.preprocess import normalise_pixels
from sparserefine_ros.segmenter.refiner_input import refiner_input
from sparserefine_ros.sparse import SiteSet


@pytest.mark.parametrize("engine", [pytest.param("c", marks=needs_compiler), "torch"])
@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3), st.tuples(st.integers(1, 30), st.integers(1, 30)), st.tuples(st.integers(1, 20),
    st.integers(1, 20)), st.integers(0, 21), st.floats(0, 1), st.booleans(),
)  # fmt: skip
def test_colours_and_the_prediction_over_them(
    engine: str, batch: int, size: tuple[int, int], low: tuple[int, int], classes: int, share: float, last: bool
) -> None:
    """classes: 0 without a prediction; last: whether they lie last in memory, as the pipeline has them."""
    generator = torch.Generator().manual_seed(0)
    native = torch.randint(0, 256, (batch, *size, 3), dtype=torch.uint8, generator=generator)
    selected = torch.rand(batch, *size, generator=generator) < share
    sites = SiteSet.from_mask(selected)
    expected = normalise_pixels(native[selected])
    prediction = None
    if classes:
        prediction = torch.rand(batch, classes, *low, generator=generator)
        over = upsample_nearest(prediction, size).permute(0, 2, 3, 1)[selected]
        expected = torch.cat([expected, over], 1)
        prediction = prediction.to(memory_format=torch.channels_last) if last else prediction
    with pytest.MonkeyPatch.context() as patch:
        if engine == "torch":
            patch.setattr(module, "load_if_possible", lambda source: None)
        assert torch.equal(refiner_input(sites, native, prediction), expected)
