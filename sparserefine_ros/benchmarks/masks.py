"""Masks to measure on: thin bands, as an entropy threshold gives, of exactly the wanted density."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor


def edge_mask(height: int, width: int, density: float, seed: int = 0) -> Tensor:
    """bool [1, height, width] of 2x2 blocks around the zero lines of smooth noise, ``density`` of all blocks set.

    Selected pixels lie along borders between regions, and nearest upsampling of a low-resolution prediction makes 2x2
    blocks of them; both decide how many neighbours a site has and how sites spread over the levels.
    Raises ValueError for an odd size or a density outside 0..1.
    """
    if height % 2 or width % 2:
        raise ValueError(f"size is {height}x{width}: give even numbers, the mask is made of 2x2 blocks")
    if not 0 <= density <= 1:
        raise ValueError(f"density is {density}: give a number from 0 to 1")
    low = (height // 2, width // 2)
    noise = np.random.default_rng(seed).normal(size=low)
    distance = np.abs(cv2.GaussianBlur(noise, (0, 0), max(low) / 64)).ravel()  # from the nearest border
    chosen = np.zeros(distance.size, bool)
    chosen[np.argsort(distance, kind="stable")[: round(density * distance.size)]] = True
    blocks = torch.from_numpy(chosen.reshape(low))
    return blocks.repeat_interleave(2, 0).repeat_interleave(2, 1)[None]
