"""Boundary IoU against the paper's definition, class by class and pixel by pixel."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparserefine_ros.evaluation.boundary import band_width, boundary_band, boundary_counts, boundary_iou

K = 4


def inner_band(region: np.ndarray, width: int) -> np.ndarray:
    """Pixels of ``region`` [H, W] bool within ``width`` (chessboard) of a pixel outside of it or of the image."""
    height, columns = region.shape
    outside = np.pad(~region, width, constant_values=True)
    band = np.zeros_like(region)
    for row in range(height):
        for column in range(columns):
            if region[row, column]:
                band[row, column] = outside[row : row + 2 * width + 1, column : column + 2 * width + 1].any()
    return band


def reference(label: np.ndarray, mask: np.ndarray, width: int) -> list[float]:
    """|G_d and P_d| / |G_d or P_d| of every class, Eq. 2 of the paper, in floats."""
    values = []
    for k in range(K):
        true = inner_band(label == k, width)
        guess = inner_band((mask == k) & (label != 255), width)
        union = float((true | guess).sum())
        values.append(float((true & guess).sum()) / union if union else math.nan)
    return values


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(6, 20), st.integers(6, 24), st.sampled_from([0.02, 0.05, 0.11]))
def test_boundary_iou_is_the_papers(seed: int, height: int, width: int, distance: float) -> None:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, K, (4, 4), np.uint8)
    label = coarse.repeat(6, 0).repeat(6, 1)[:height, :width].copy()
    mask = np.roll(label, (1, -1), (0, 1))
    mask[rng.random(mask.shape) < 0.05] = rng.integers(0, K)
    label[rng.random(label.shape) < 0.03] = 255
    found = boundary_iou(boundary_counts(label, mask, K, distance))
    np.testing.assert_allclose(found, reference(label, mask, band_width((height, width), distance)), rtol=1e-12)


def test_band_of_a_square_by_hand() -> None:
    ids = np.zeros((9, 9), np.uint8)
    ids[2:7, 2:7] = 1
    band = boundary_band(ids, 1)
    assert band[2:7, 2:7].sum() == 25 - 9 and not band[3:6, 3:6].any()
    assert band[0].all() and band[:, 0].all()  # the image's edge is contour, as in the paper's code


def test_an_image_smaller_than_its_band_is_all_band() -> None:
    assert boundary_band(np.zeros((3, 2), np.uint8), 5).all()


def test_width_follows_the_diagonal() -> None:
    assert band_width((1024, 2048)) == 11 and band_width((360, 480)) == 3 and band_width((4, 4)) == 1


def test_frames_are_summed_before_they_are_divided() -> None:
    label = np.zeros((8, 8), np.uint8)
    label[:, 4:] = 1
    same, shifted = boundary_counts(label, label, 2), boundary_counts(label, np.roll(label, 1, 1), 2)
    both = boundary_iou(same + shifted)
    assert boundary_iou(same).tolist() == [1.0, 1.0]
    one = same[0, 0], shifted[0]
    assert both[0] == pytest.approx((one[0] + one[1][0]) / (one[0] + one[1][1] + one[1][2] - one[1][0]))
