"""Boundary IoU (Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation", CVPR 2021).

Intersection over union of the bands that lie inside a class's true and predicted regions along their contours: unlike
IoU it does not forget poles beside roads, and it is where a refiner works.

Shape shorthand: H, W image height and width in pixels; K classes.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

from sparserefine_ros.datasets.base import UNLABELLED

DISTANCE = 0.005
"""Width of the band over the image's diagonal. The paper takes 0.02 for images of objects (COCO, LVIS) and 0.005 for
streets (Cityscapes), whose details are smaller."""


def band_width(size: tuple[int, int], distance: float = DISTANCE) -> int:
    """Pixels that the band of an image of ``size`` (H, W) is wide, at least 1."""
    return max(1, round(distance * math.hypot(*size)))


def boundary_band(ids: np.ndarray, width: int) -> np.ndarray:
    """[H, W] bool: pixels with another id, or the image's edge, within ``width`` pixels (chessboard distance).

    ``ids``: [H, W] uint8. For each class this is its mask without its erosion, as in the paper's reference code, which
    counts the image's edge as contour too; all classes come out of one pass.
    """
    window = np.ones((2 * width + 1, 2 * width + 1), np.uint8)
    lowest = cv2.erode(ids, window, borderType=cv2.BORDER_REPLICATE)
    highest = cv2.dilate(ids, window, borderType=cv2.BORDER_REPLICATE)
    band: np.ndarray = lowest != highest
    band[:width] = band[-width:] = True
    band[:, :width] = band[:, -width:] = True
    return band


def boundary_counts(label: np.ndarray, mask: np.ndarray, num_classes: int, distance: float = DISTANCE) -> np.ndarray:
    """[K, 3] int64: pixels of each class in both bands, in the label's band, in the mask's band.

    ``label``, ``mask``: [H, W] uint8 class ids. Pixels labelled 255 belong to no class in either.
    """
    mask = np.where(label == UNLABELLED, UNLABELLED, mask).astype(np.uint8)
    width = band_width((label.shape[0], label.shape[1]), distance)
    true, guess = boundary_band(label, width), boundary_band(mask, width)
    both = true & guess & (label == mask)
    counts = [np.bincount(ids[where], minlength=256)[:num_classes] for ids, where in
              ((label, both), (label, true), (mask, guess))]  # fmt: skip
    return np.stack(counts, 1).astype(np.int64)


def boundary_iou(counts: np.ndarray) -> np.ndarray:
    """[..., K] from counts [..., K, 3] summed over frames; nan for a class without a band in either."""
    both, true, guess = (counts[..., i].astype(np.float64) for i in range(3))
    union = true + guess - both
    return np.divide(both, union, out=np.full(union.shape, np.nan), where=union > 0)
