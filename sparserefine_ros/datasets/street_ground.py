"""The ground plane: which surface and which colour lies at every pixel below the horizon.

Every pixel's ray meets the plane at a street position (s, t). A table over (zone along s, t) names the material there,
so lane marks, crossings, kerbs and lawns are exact at any distance; texture comes from prefiltered tiles.

Shape shorthand: h rows of the strip below the horizon, W columns, K zones, T steps of t.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import cv2
import numpy as np

from sparserefine_ros.datasets.street_lots import Lot
from sparserefine_ros.datasets.street_style import Camera, Side, Style
from sparserefine_ros.datasets.street_textures import noise_tiles

(ASPHALT, PARKING, PAINT, SLAB, KERB, GRASS, GRAVEL, RAIL, TRACK, PATCH, GUTTER, CROSS_SLAB) = range(12)
MATERIAL_CLASS = np.array([0, 0, 0, 1, 1, 9, 1, 0, 0, 0, 0, 1], np.uint8)
MATERIAL_TILE = np.array([0, 0, 0, 1, 0, 2, 0, 0, 3, 0, 0, 1], np.uint8)

STEP_T, HALF_T = 0.02, 70.0
STEP_S, BEHIND, AHEAD = 0.05, 12.0, 420.0
TILE = 256
TILE_METRES = 2.0

CLASS_TABLE = np.pad(MATERIAL_CLASS, (0, 256 - len(MATERIAL_CLASS)))[None]
TILE_TABLE = np.pad(MATERIAL_TILE, (0, 256 - len(MATERIAL_TILE)))[None].astype(np.float32) * TILE


@lru_cache(maxsize=4)
def _tiles(slab_kind: int) -> list[np.ndarray]:
    """Luminance tiles [4 * TILE, TILE] uint8 (asphalt, paving, grass, cobbles), each level at half the detail."""
    fine, mid, coarse = (cv2.resize(t, (TILE, TILE), interpolation=cv2.INTER_AREA) for t in noise_tiles())
    y, x = np.mgrid[0:TILE, 0:TILE]
    asphalt = 128 + 8 * fine + 5 * mid + 7 * coarse
    paving = 130 + 5 * fine + 5 * coarse
    bh, bw = ((64, 64), (32, 64), (16, 32))[slab_kind]
    shift = (y // bh % 2) * (bw // 2) if slab_kind else np.zeros_like(y)
    rng = np.random.default_rng(31 + slab_kind)
    tone = rng.normal(0, 8, (TILE // bh, TILE // bw))
    paving = paving + tone[y // bh, (x + shift) // bw % (TILE // bw)]
    paving[(y % bh < 2) | ((x + shift) % bw < 2)] *= 0.72
    grass = 124 + 22 * fine + 12 * mid + 8 * coarse
    cobble = 128 + 8 * fine + 6 * coarse
    cobble[(y % 16 < 2) | ((x + (y // 16 % 2) * 8) % 16 < 2)] *= 0.7
    stack = [np.clip(t, 20, 250).astype(np.float32) for t in (asphalt, paving, grass, cobble)]
    levels = []
    for level in range(7):
        side = TILE >> level
        small = [cv2.resize(t, (side, side), interpolation=cv2.INTER_AREA) for t in stack]
        big = [cv2.resize(np.pad(t, 2, mode="wrap"), (TILE + 4 * TILE // side, TILE + 4 * TILE // side)) for t in small]
        edge = 2 * TILE // side
        levels.append(np.concatenate([b[edge : edge + TILE, edge : edge + TILE] for b in big]).astype(np.uint8))
    return levels


def palette(style: Style) -> np.ndarray:
    """Colour of each material, [12, 3] RGB in sunlight."""
    a, s = style.asphalt, style.slab
    rows = [
        a,
        a * 0.93 + 4,
        np.array((206, 206, 198)),
        s,
        s * 0.55 + 84,
        style.grass,
        a * 0.4 + np.array((96, 88, 74)),
        np.array((92, 90, 90)),
        a * 0.85 + 12,
        a * 0.86,
        a * 0.7,
        s * 0.95 + 4,
    ]
    light = style.light.ambient + style.light.sun_power * max(style.light.sun[1], 0.0) * 1.05
    return np.array(rows) * light


class Ground:
    """Tables of one drive's cross-section, and the shading of a frame."""

    def __init__(self, style: Style) -> None:
        self.style = style
        self.t = (np.arange(int(2 * HALF_T / STEP_T)) + 0.5) * STEP_T - HALF_T
        self.profile = self._profile()
        self.colours = palette(style)

    def _profile(self) -> dict[str, np.ndarray]:
        """Material over t for each kind of zone; 255 and 254 stand for the right and left lots."""
        style, t = self.style, self.t
        base = np.full(len(t), ASPHALT, np.uint8)
        side_of: list[tuple[float, Side, int]] = [(1.0, style.right, 255), (-1.0, style.left, 254)]
        for sign, side, lot in side_of:
            u = t * sign
            edge = style.median + side.lanes * side.lane
            if side.parking:
                base[(u > edge + 0.06) & (u < side.kerb)] = PARKING
                base[(u > edge - 0.05) & (u < edge + 0.06)] = PAINT
            base[(u > side.kerb - 0.3) & (u < side.kerb)] = GUTTER
            base[(u >= side.kerb) & (u < side.kerb + 0.2)] = KERB
            if side.verge:
                base[(u >= side.kerb + 0.2) & (u < side.kerb + 0.2 + side.verge)] = GRASS
            base[(u >= side.kerb + 0.2 + side.verge) & (u < side.line)] = SLAB
            base[u >= side.line] = lot
        if style.median_kind == "grass":
            base[np.abs(t) < style.median] = KERB
            base[np.abs(t) < style.median - 0.2] = GRASS
        elif style.median_kind == "tram":
            base[np.abs(t) < style.median - 0.15] = TRACK
            for c in (-1.6, 1.6):
                for r in (-0.7175, 0.7175):
                    base[np.abs(t - c - r) < 0.04] = RAIL
            base[np.abs(np.abs(t) - style.median + 0.05) < 0.06] = PAINT
        dashed = base.copy()
        inner = style.median
        for sign, side, _ in side_of:
            for lane in range(1, side.lanes):
                dashed[np.abs(t * sign - inner - lane * side.lane) < 0.07] = PAINT
        if style.median_kind == "none":
            dashed[np.abs(t) < 0.07] = PAINT
            if style.seed % 3 == 0:  # a solid middle line instead
                base[np.abs(t) < 0.07] = PAINT
        road = (t > -style.left.kerb) & (t < style.right.kerb)
        rails = base == RAIL
        cross = np.where(road, np.where(rails, RAIL, ASPHALT), ASPHALT).astype(np.uint8)
        between = (t > -style.left.line) & (t < style.right.line) & ~road
        walk = np.where(road, cross, np.where(between & (base != GRASS), base, CROSS_SLAB))
        walk = walk.astype(np.uint8)
        zebra = walk.copy()
        zebra[
            road & ((t + 50.0) % 1.0 < 0.5) & (np.abs(t - style.right.kerb) > 0.4) & (np.abs(t + style.left.kerb) > 0.4)
        ] = PAINT
        zebra = np.where(road, zebra, np.where(base == GRASS, SLAB, base)).astype(np.uint8)
        stop = base.copy()
        stop[(t > style.median + 0.1) & (t < style.median + style.right.lanes * style.right.lane)] = PAINT
        patch = base.copy()
        patch[(t > 0.4 + style.median) & (t < 2.1 + style.median) & (base == ASPHALT)] = PATCH
        return {
            "base": base,
            "dash": dashed,
            "cross": cross,
            "walk": walk,
            "zebra": zebra,
            "stop": stop,
            "patch": patch,
        }

    def _zones(self, s: np.ndarray) -> np.ndarray:
        """Index into the profiles (0 base, 1 dash, 2 cross, 3 walk, 4 zebra, 5 stop, 6 patch) for street positions."""
        style = self.style
        local, block = np.mod(s, style.block), np.floor(s / style.block)
        zone = np.where(np.mod(s, 9.0) < 3.0, 1, 0)
        crack = (np.mod(s * 0.618 + block * 13.7, 41.0) < 2.6) & (zone == 0)
        zone[crack] = 6
        left = style.block - local
        zone[(local >= style.crossing) & (local < style.crossing + 2.5) | (left < 2.5)] = 3
        zone[(local >= style.crossing + 1.7) & (local < style.crossing + 4.7) | (left < 4.7) & (left > 1.7)] = 4
        zone[(left < 6.0) & (left > 5.6)] = 5
        zone[local < style.crossing] = 2
        return zone

    def tables(self, camera: Camera, lots: tuple[Sequence[Lot], Sequence[Lot]]) -> tuple[np.ndarray, np.ndarray]:
        """Row number over s [steps], and materials [rows, T] around the camera."""
        s = camera.s - BEHIND + (np.arange(int((AHEAD + BEHIND) / STEP_S)) + 0.5) * STEP_S
        kinds = {"grass": 0, "pavement": 1, "gravel": 2}
        ground = np.zeros((2, len(s)), np.int64)
        for i in range(2):
            for lot in lots[i]:
                a, b = (int((x - camera.s + BEHIND) / STEP_S) for x in (lot.s0, lot.s1))
                ground[i, max(a, 0) : max(b, 0)] = kinds[lot.ground]
        code = self._zones(s) * 9 + ground[0] * 3 + ground[1]
        found, row = np.unique(code, return_inverse=True)
        names = list(self.profile)
        fill = np.array([GRASS, SLAB, GRAVEL], np.uint8)
        table = np.empty((len(found), len(self.t)), np.uint8)
        for n, c in enumerate(found):
            line = self.profile[names[c // 9]].copy()
            line[line == 255] = fill[c // 3 % 3]
            line[line == 254] = fill[c % 3]
            table[n] = line
        return row.astype(np.int32), table

    def shade(
        self,
        camera: Camera,
        size: tuple[int, int],
        focal: float,
        centre: tuple[float, float],
        top: int,
        lots: tuple[Sequence[Lot], Sequence[Lot]],
        lit: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Colours [h, W, 3] uint8, labels [h, W] uint8 and validity [h, W] bool of the rows from ``top`` down.

        ``lit`` [h, W] uint8 is 255 in full light, less in shadow. Pixels whose ray never meets the ground are invalid.
        """
        height, width = size
        row = (np.arange(top, height, dtype=np.float32) + 0.5 - centre[1])[:, None] / focal
        col = (np.arange(width, dtype=np.float32) + 0.5 - centre[0])[None] / focal
        inv = camera.rotation.T.astype(np.float32)  # camera to world
        dy = (row * inv[1, 1] + inv[1, 2]) + col * inv[1, 0]
        valid = dy < -1e-4
        np.minimum(dy, -2e-3, out=dy)
        scale = np.float32(-camera.position[1]) / dy
        z = (row * inv[2, 1] + inv[2, 2]) + col * inv[2, 0]
        z *= scale  # metres ahead of the camera, along the world's Z
        t = (row * inv[0, 1] + inv[0, 2]) + col * inv[0, 0]
        t *= scale
        a, k, p = self.style.bend
        angle = z * np.float32(k)
        angle += np.float32(np.mod(k * camera.s + p, 2 * np.pi))
        t += np.float32(camera.position[0])
        t -= np.float32(a) * np.sin(angle)
        rows, table = self.tables(camera, lots)
        s_index = np.clip((z + np.float32(BEHIND)) * np.float32(1 / STEP_S), 0, len(rows) - 1).astype(np.int32)
        t_index = np.clip((t + np.float32(HALF_T)) * np.float32(1 / STEP_T), 0, len(self.t) - 1).astype(np.int32)
        t_index += np.take(rows * np.int32(len(self.t)), s_index)
        material = np.take(table.reshape(-1), t_index)
        detail = self._detail(camera, z, t, material, float(inv[1, 1]), focal)
        middle = z[:, width // 2]
        clear = np.exp(-self.style.fog * np.where(valid[:, width // 2], np.clip(middle, 0, 2000), 2000))[:, None]
        light = cv2.multiply(detail, (lit * clear).astype(np.uint8), scale=1 / 255.0)
        table3 = np.zeros((256, 3), np.uint8)
        table3[: len(self.colours)] = np.clip(self.colours, 0, 255)
        rgb = cv2.LUT(cv2.merge([material, material, material]), table3[None])
        rgb = cv2.multiply(rgb, cv2.merge([light, light, light]), scale=1 / 128.0)
        haze = (self.style.haze * (1 - clear)).astype(np.uint8)
        rgb = cv2.add(rgb, np.repeat(haze[:, None], width, 1))
        return rgb, cv2.LUT(material, CLASS_TABLE), valid

    def _detail(
        self, camera: Camera, z: np.ndarray, t: np.ndarray, material: np.ndarray, down: float, focal: float
    ) -> np.ndarray:
        """Texture luminance [h, W] uint8 around 128, from the tile level that suits each row's distance."""
        levels = _tiles(self.style.slab_kind)
        per = np.float32(TILE / TILE_METRES)
        u = t * per
        u -= np.floor(u * np.float32(1 / TILE)) * np.float32(TILE)
        v = (z + np.float32(camera.s % TILE_METRES)) * per
        v -= np.floor(v * np.float32(1 / TILE)) * np.float32(TILE)
        v += cv2.LUT(material, TILE_TABLE)
        out = np.empty(z.shape, np.uint8)
        middle = np.abs(z[:, z.shape[1] // 2])
        # a pixel's footprint: z / f across, z^2 / (f h) along; their geometric mean, in texels
        texel = per * np.sqrt((middle / focal) * (middle**2 / (focal * abs(float(camera.position[1])))))
        level = np.clip(np.floor(np.log2(np.maximum(texel, 1.0)) + 0.3), 0, len(levels) - 1).astype(int)
        cuts = np.flatnonzero(np.diff(level)) + 1
        for a, b in zip([0, *cuts.tolist()], [*cuts.tolist(), len(level)], strict=True):
            cv2.remap(levels[int(level[a])], u[a:b], v[a:b], cv2.INTER_LINEAR, out[a:b], cv2.BORDER_REPLICATE)
        return out
