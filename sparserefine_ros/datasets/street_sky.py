"""Light from above: the sky with its clouds, and the shadows on the ground."""

from __future__ import annotations

import cv2
import numpy as np

from sparserefine_ros.datasets.street_raster import NEAR, clip_near, starts
from sparserefine_ros.datasets.street_shapes import Group
from sparserefine_ros.datasets.street_style import Style
from sparserefine_ros.datasets.street_textures import noise_tiles
from sparserefine_ros.datasets.street_view import View

SHADOW_DARK, CONTACT_DARK = 0.52, 0.45


def sky_image(style: Style, view: View, rows: int) -> np.ndarray:
    """The sky [rows, W, 3] uint8: a gradient with clouds on a far plane; computed coarsely, it is smooth."""
    h, w = max(2, rows // 4), max(2, view.width // 4)
    x = ((np.arange(w, dtype=np.float32) + 0.5) * (view.width / w) - view.cx) / view.focal
    y = ((np.arange(h, dtype=np.float32) + 0.5) * (rows / h) - view.cy) / view.focal
    inv = view.camera.rotation.T.astype(np.float32)
    dx, dy, dz = (x[None] * inv[i, 0] + y[:, None] * inv[i, 1] + inv[i, 2] for i in range(3))
    norm = np.sqrt(dx * dx + dy * dy + dz * dz)
    up = np.clip(dy / norm, 0, 1)
    plane = np.float32(46) / np.maximum(dy, np.float32(0.015))
    u = np.mod(dx * plane + np.float32(37 * (style.seed % 97)), np.float32(512))
    v = np.mod(dz * plane + np.float32(61 * (style.seed % 89)), np.float32(512))
    cloud = cv2.remap(noise_tiles()[2], u, v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    amount = np.clip((cloud - np.float32(1.1 - 1.9 * style.clouds)) * np.float32(0.8), 0, 0.9) * np.clip(
        up / np.float32(0.06), 0, 1
    )
    mix = np.clip(up / np.float32(0.28), 0, 1) ** np.float32(0.7)
    clear = style.overcast < 0.9
    shape = np.float32(0.86) + np.float32(0.14) * np.clip(cloud, -1, 1) if clear else np.float32(0.86)
    sx, sy, sz = style.light.sun
    glow = (
        90
        * style.light.sun_power
        * np.clip((dx * np.float32(sx) + dy * np.float32(sy) + dz * np.float32(sz)) / norm, 0, 1) ** 40
    )
    rgb = np.empty((h, w, 3), np.uint8)
    for c in range(3):
        haze, zenith = np.float32(style.haze[c]), np.float32(style.zenith[c])
        white = np.float32(min(haze * 1.08 + 6, 252.0)) if clear else haze
        blue = haze + (zenith - haze) * mix
        rgb[..., c] = np.clip(blue + (white * shape - blue) * amount + glow, 0, 255)
    return cv2.resize(rgb, (view.width, rows), interpolation=cv2.INTER_LINEAR)


def light_map(style: Style, view: View, groups: list[Group], top: int) -> np.ndarray:
    """Light on the ground [h, W] uint8, 255 = full: shadows and the dark below bodies, at half size and softened."""
    h, w = view.height - top, view.width
    sh, sw = max(1, h // 2), max(1, w // 2)
    out = np.full((sh, sw), 255, np.uint8)
    sun = style.light.sun_power
    dark = round(255 * (1 - (1 - SHADOW_DARK) * min(1.0, sun / 0.65)))
    fx, fy = sw / w, sh / h
    jobs = [(dark, [s for g in groups for s in g.shadows])] if sun > 0.05 else []
    jobs.append((round(255 * CONTACT_DARK), [s for g in groups for s in g.contacts]))
    for value, polygons in jobs:
        if not polygons:
            continue
        count = np.array([len(p) for p in polygons])
        flat = np.concatenate(polygons)
        points = view.to_camera(np.stack([flat[:, 0], np.zeros(len(flat)), flat[:, 1]], 1))
        first = starts(count)
        near, far = np.minimum.reduceat(points[:, 2], first), np.maximum.reduceat(points[:, 2], first)
        layer = np.full_like(out, 255)
        for i in np.flatnonzero((far > NEAR) & (near < 160)):
            p = points[first[i] : first[i] + count[i]]
            if near[i] < NEAR:
                p = clip_near(p)
            if len(p) < 3:
                continue
            xy = (view.to_pixels(p) - (0, top)) * (fx, fy)
            if xy[:, 0].max() < 0 or xy[:, 0].min() > sw or xy[:, 1].max() < 0:
                continue
            cv2.fillConvexPoly(layer, np.round(np.clip(xy, -8000, 8000) * 16).astype(np.int32), value, cv2.LINE_8, 4)
        blur = 1 + 2 * round(sw * (0.0012 if value == dark else 0.002))
        layer = cv2.blur(layer, (blur, max(1, blur // 2)))
        out = cv2.multiply(out, layer, scale=1 / 255.0)
    return cv2.resize(out, (w, h), interpolation=cv2.INTER_LINEAR)
