"""Small masks: PNG gives the very mask back, nearest neighbour never invents a class."""

from __future__ import annotations

from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sparserefine_ros.node.compressed import bayer_of, compressed_size
from sparserefine_ros.node.conversion import compressed_to_rgb
from sparserefine_ros.node.mask_transport import at_scale, fill_png, scaled_size, shrink
from sparserefine_ros.segmenter.segmenter import Segmentation

sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))


@settings(max_examples=60, deadline=None)
@given(sizes.flatmap(lambda size: arrays.arrays(np.uint8, size)))
def test_png_is_the_very_mask(mask):
    message = fill_png(SimpleNamespace(), "header", mask)
    data = np.frombuffer(message.data, np.uint8)
    decoded = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
    assert decoded.dtype == np.uint8 and decoded.shape == mask.shape
    np.testing.assert_array_equal(decoded, mask)
    assert message.header == "header"
    # What image_transport's subscribers read: the encoding up to the semicolon, then "png" somewhere.
    encoding, _, rest = message.format.partition(";")
    assert encoding == "mono8" and "png" in rest and "jpeg" not in rest
    # And our own node, were the mask its input.
    assert compressed_size(data, message.format) == mask.shape and bayer_of(message.format) == ""
    np.testing.assert_array_equal(compressed_to_rgb(message)[..., 1], mask)


def test_png_of_regions_is_small() -> None:
    rows, columns = np.mgrid[:1024, :2048]
    mask = ((rows // 128 + (columns + rows // 3) // 256) % 19).astype(np.uint8)
    assert len(fill_png(SimpleNamespace(), None, mask).data) < mask.nbytes / 30


@settings(max_examples=100, deadline=None)
@given(sizes, st.floats(0.05, 1))
def test_nearest_by_index_arithmetic(size, scale):
    image = np.arange(size[0] * size[1], dtype=np.uint16).reshape(size)
    h, w = scaled_size(size, scale)
    rows = [(2 * i + 1) * size[0] // (2 * h) for i in range(h)]
    columns = [(2 * j + 1) * size[1] // (2 * w) for j in range(w)]
    np.testing.assert_array_equal(shrink(image, (h, w)), image[rows][:, columns])


def test_a_result_at_a_scale() -> None:
    mask = np.arange(8 * 6, dtype=np.uint8).reshape(8, 6)
    entropy = np.arange(4 * 3, dtype=np.float32).reshape(4, 3)
    result = Segmentation(mask, 255 - mask, entropy, 0.5, {"dense": 1.0}, 0.3)
    half = at_scale(result, 0.5)
    np.testing.assert_array_equal(half.mask, mask[1::2, 1::2])
    np.testing.assert_array_equal(half.confidence, 255 - mask[1::2, 1::2])
    np.testing.assert_array_equal(half.entropy, entropy)
    quarter = at_scale(result, 0.25)  # smaller than the dense segmenter's input
    np.testing.assert_array_equal(quarter.mask, mask[2::4, [1, 4]])
    np.testing.assert_array_equal(quarter.entropy, entropy[1::2, [0, 2]])
    assert (half.density, half.threshold, half.stage_ms) == (0.5, 0.3, {"dense": 1.0})
    assert at_scale(result, 1.0) is result


@pytest.mark.parametrize(("scale", "size"), [(0.5, (512, 1024)), (0.05, (51, 102)), (1 / 3, (341, 683))])
def test_sizes(scale: float, size: tuple[int, int]) -> None:
    assert scaled_size((1024, 2048), scale) == size
    assert scaled_size((3, 3), 0.05) == (1, 1)
