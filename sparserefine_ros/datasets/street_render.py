"""One frame: gather what is in view, project it, paint ids far to near, then colour every pixel by its id.

The id buffer is the only coverage test: label and image are both looked up from it, so they agree at every pixel.

Shape shorthand: N surfaces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np

from sparserefine_ros.datasets.street_blocks import Block
from sparserefine_ros.datasets.street_facades import facade_texture
from sparserefine_ros.datasets.street_ground import Ground
from sparserefine_ros.datasets.street_lots import Lot
from sparserefine_ros.datasets.street_raster import Polygons, Spans, fill_large, fill_small, polygon_spans, starts
from sparserefine_ros.datasets.street_shapes import Group, Surface
from sparserefine_ros.datasets.street_sky import light_map, sky_image
from sparserefine_ros.datasets.street_style import Style
from sparserefine_ros.datasets.street_textures import fence_texture, hedge_texture, tree_texture, wall_texture
from sparserefine_ros.datasets.street_view import (
    FOCAL,
    Screen,
    View,
    corners,
    join,
    screen_faces,
    screen_sticks,
    screen_surfaces,
    skyline,
    visible,
)  # fmt: skip

SKY, GROUND, FIRST = 0, 1, 2  # ids; polygons follow from FIRST
LARGE = 0.01  # share of the image from which a polygon's box counts as large: painted by mask, shaded by a gradient
SEE_THROUGH = ("tree", "fence", "hedge")  # textures whose coverage has holes

TEXTURES: dict[str, Callable[..., np.ndarray]] = {
    "facade": facade_texture,
    "wall": wall_texture,
    "fence": fence_texture,
    "hedge": hedge_texture,
    "tree": tree_texture,
}


class Items(NamedTuple):
    """The textured surfaces of a frame and their camera-space corners [N, 4, 3]."""

    surfaces: list[Surface]
    corners: np.ndarray


class Renderer:
    """Renders frames of one drive. Caches textures; a frame does not depend on what the cache holds."""

    def __init__(self, style: Style) -> None:
        self.style = style
        self.ground = Ground(style)
        self.textures: dict[tuple[tuple[object, ...], int, int], np.ndarray] = {}

    def level(self, key: tuple[object, ...], x: int, y: int) -> np.ndarray:
        """The texture of a key, halved x times across and y times down; from the cache or made now."""
        full = (key, x, y)
        texture = self.textures.get(full)
        if texture is None:  # two threads may make the same one; they make it equal
            if len(self.textures) > 1500:
                self.textures.clear()
            if x or y:
                finer = self.level(key, x - 1 if x >= y else x, y - 1 if y >= x else y)
                size = (max(1, finer.shape[1] // (2 if x >= y else 1)), max(1, finer.shape[0] // (2 if y >= x else 1)))
                texture = cv2.resize(finer, size, interpolation=cv2.INTER_AREA)
            else:
                texture = TEXTURES[str(key[0])](*key[1:])
            self.textures[full] = texture
        return texture

    def render(self, view: View, blocks: list[Block], traffic: Group) -> tuple[np.ndarray, np.ndarray]:
        """Image [H, W, 3] uint8 RGB before the sensor, and label [H, W] uint8."""
        groups = [b.group for b in blocks] + [traffic]
        parts = [skyline(self.style, view)]
        surfaces: list[Surface] = []
        placed: list[np.ndarray] = []
        for group in groups:
            faces = screen_faces(view, group)
            parts += ([faces] if faces is not None else []) + screen_sticks(view, group)
            if group.surfaces:
                points = corners(view, group.surfaces)
                found = screen_surfaces(view, points, group)
                parts.append(found._replace(surface=found.surface + len(surfaces)))
                surfaces += group.surfaces
                placed.append(points)
        screen = visible(view, join(parts))
        items = Items(surfaces, np.concatenate(placed) if placed else np.zeros((0, 4, 3)))
        ids = np.zeros((view.height, view.width), np.uint16)
        lots: tuple[list[Lot], list[Lot]] = (
            [x for b in blocks for x in b.lots[0]],
            [x for b in blocks for x in b.lots[1]],
        )
        top = self._horizon(view)
        lit = light_map(self.style, view, groups, top)
        ground_rgb, ground_label, valid = self.ground.shade(
            view.camera, (view.height, view.width), view.focal, (view.cx, view.cy), top, lots, lit
        )
        ids[top:][valid] = GROUND
        drawn = self._paint(view, screen, items, ids)
        return self._colour(view, screen, items, ids, drawn, (ground_rgb, ground_label, top))

    def _horizon(self, view: View) -> int:
        """First row in which any pixel may see the ground."""
        inv = view.camera.rotation.T
        rows = [(-(inv[1, 2] + inv[1, 0] * x)) / inv[1, 1] for x in (-0.5 / FOCAL, 0.5 / FOCAL)]
        return int(np.clip(np.floor(min(rows) * view.focal + view.cy) - 1, 0, view.height - 1))

    def _warp(
        self, view: View, surface: Surface, corners: np.ndarray, box: tuple[int, int, int, int], depth: float
    ) -> np.ndarray:
        """The surface's texture [h, w, 4] as seen in the box (x0, y0, x1, y1), lit and fogged."""
        texture = self.level(surface.texture, 0, 0)
        style = self.style
        h, w = texture.shape[:2]
        z = np.clip(corners[:, 2], 1.5, None)
        along = float(np.linalg.norm(surface.along[:1])) if surface.board else float(np.linalg.norm(surface.along))
        tall = float(surface.along[1]) if surface.board else float(np.linalg.norm(surface.down))
        # prefilter: about as many texels as pixels, less across where the surface is seen at an angle
        scale = view.focal / float(z.min())
        seen = abs(float(np.ptp(corners[:, 0] / z))) * view.focal
        tw = int(np.clip(seen * (2.2 if not surface.board else 1.0), 2, min(w, along * scale + 2)))
        th = int(np.clip(tall * scale, 2, h))
        texture = self.level(surface.texture, max(0, int(np.log2(w / tw) + 0.4)), max(0, int(np.log2(h / th) + 0.4)))
        h, w = texture.shape[:2]
        clear = float(np.exp(-style.fog * depth))
        table = np.empty((256, 4))
        table[:, :3] = np.arange(256)[:, None] * (surface.light * clear) + style.haze * (1 - clear)
        table[:, 3] = np.arange(256)
        texture = cv2.LUT(texture, np.clip(table, 0, 255).astype(np.uint8)[None])
        camera_matrix = np.array([[view.focal, 0, view.cx - box[0]], [0, view.focal, view.cy - box[1]], [0, 0, 1.0]])
        plane = np.stack([corners[1] - corners[0], corners[3] - corners[0], corners[0]], 1)
        to_texture = np.diag([float(w), float(h), 1.0]) @ np.linalg.inv(camera_matrix @ plane)
        shift = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1.0]])
        back = np.array([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1.0]])
        return cv2.warpPerspective(
            texture, back @ to_texture @ shift, (box[2] - box[0], box[3] - box[1]),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE,
        )  # fmt: skip

    def _paint(
        self, view: View, screen: Screen, items: Items, ids: np.ndarray
    ) -> dict[int, tuple[tuple[int, int, int, int], np.ndarray | None]]:
        """Paints ids in order; returns boxes of textured and large polygons, with pixels where coverage needed them."""
        spans = polygon_spans(Polygons(screen.xy, screen.sides), view.height, view.width)
        bounds = np.searchsorted(spans.polygon, np.arange(len(screen.sides) + 1))
        first = starts(screen.sides)
        x, y = screen.xy[:, 0], screen.xy[:, 1]
        x0 = np.clip(np.floor(np.minimum.reduceat(x, first)), 0, view.width).astype(int)
        x1 = np.clip(np.ceil(np.maximum.reduceat(x, first)), 0, view.width).astype(int)
        y0 = np.clip(np.floor(np.minimum.reduceat(y, first)), 0, view.height).astype(int)
        y1 = np.clip(np.ceil(np.maximum.reduceat(y, first)), 0, view.height).astype(int)
        special = (screen.surface >= 0) | ((x1 - x0) * (y1 - y0) > LARGE * view.height * view.width)
        value = (np.arange(len(screen.sides)) + FIRST).astype(np.uint16)
        drawn: dict[int, tuple[tuple[int, int, int, int], np.ndarray | None]] = {}
        done = 0
        for p in np.flatnonzero(special):
            fill_small(ids, spans, int(bounds[done]), int(bounds[p]), value)
            done = p + 1
            low, high = int(bounds[p]), int(bounds[p + 1])
            if high <= low:
                continue
            n = int(screen.surface[p])
            box = (int(x0[p]), int(y0[p]), int(x1[p]), int(y1[p]))
            if n >= 0 and items.surfaces[n].texture[0] in SEE_THROUGH:
                pixels = self._warp(view, items.surfaces[n], items.corners[n], box, float(screen.depth[p]))
                mask = np.zeros(pixels.shape[:2], np.uint8)
                own = Spans(*(part[low:high] for part in spans))
                own = own._replace(row=own.row - box[1], begin=own.begin - box[0], end=own.end - box[0])
                fill_large(mask, own, 0, high - low, 255)
                cv2.bitwise_and(
                    mask, cv2.threshold(cv2.extractChannel(pixels, 3), 127, 255, cv2.THRESH_BINARY)[1], mask
                )
                mask &= 1
                np.copyto(ids[box[1] : box[3], box[0] : box[2]], value[p], where=mask.view(bool))
                drawn[int(p)] = (box, pixels)
            else:
                fill_large(ids, spans, low, high, int(value[p]))
                drawn[int(p)] = (box, None)
        fill_small(ids, spans, int(bounds[done]), int(bounds[-1]), value)
        return drawn

    def _colour(
        self,
        view: View,
        screen: Screen,
        items: Items,
        ids: np.ndarray,
        drawn: dict[int, tuple[tuple[int, int, int, int], np.ndarray | None]],
        ground: tuple[np.ndarray, np.ndarray, int],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Image and label from the ids."""
        style = self.style
        clear = np.exp(-style.fog * screen.depth)[:, None]
        table = np.zeros((len(screen.sides) + FIRST, 4), np.uint8)
        table[FIRST:, :3] = np.clip(screen.rgb * clear + style.haze * (1 - clear), 0, 255)
        colour = np.take(table.view(np.uint32)[:, 0], ids).view(np.uint8).reshape(*ids.shape, 4)
        image = cv2.cvtColor(colour, cv2.COLOR_RGBA2RGB)
        classes = np.zeros(len(screen.sides) + FIRST, np.uint8)
        classes[SKY] = 10
        classes[FIRST:] = screen.cls
        label = np.take(classes, ids)
        lowest = min(view.height, ground[2] + 2 + round(0.03 * view.width))  # the horizon may tilt
        cv2.copyTo(sky_image(style, view, lowest), (ids[:lowest] == SKY).view(np.uint8), image[:lowest])
        first = starts(screen.sides)
        rgb, ground_label, top = ground
        ground_mask = (ids[top:] == GROUND).view(np.uint8)
        cv2.copyTo(rgb, ground_mask, image[top:])
        cv2.copyTo(ground_label, ground_mask, label[top:])
        for p, (box, pixels) in drawn.items():
            x0, y0, x1, y1 = box
            mask = (ids[y0:y1, x0:x1] == p + FIRST).view(np.uint8)
            if not cv2.countNonZero(mask):
                continue
            if screen.surface[p] < 0:  # a large flat face: brighter towards the sky
                ys = screen.xy[first[p] : first[p] + screen.sides[p], 1]
                ramp = 1.07 - 0.16 * (np.arange(y0, y1) + 0.5 - ys.min()) / max(float(np.ptp(ys)), 1.0)
                rows = np.clip(table[p + FIRST, :3] * ramp[:, None], 0, 255).astype(np.uint8)
                cv2.copyTo(np.repeat(rows[:, None], x1 - x0, 1), mask, image[y0:y1, x0:x1])
                continue
            if pixels is None:
                n = int(screen.surface[p])
                pixels = self._warp(view, items.surfaces[n], items.corners[n], box, float(screen.depth[p]))
            cv2.copyTo(cv2.cvtColor(pixels, cv2.COLOR_RGBA2RGB), mask, image[y0:y1, x0:x1])
        return image, label
