"""Procedural textures: noise, crowns, hedges, walls, fences and facades. Pure functions of their key.

A texture is [h, w, 4] uint8: RGB and coverage (255 = the surface is there). Its scale follows from the surface it is
put on.
"""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np

CROWNS = 10


def fractal(
    rng: np.random.Generator, height: int, width: int, cells: int, octaves: int, gain: float = 0.55
) -> np.ndarray:
    """Smooth periodic noise [height, width] float32 with mean 0 and standard deviation 1."""
    out = np.zeros((height, width), np.float32)
    weight = 1.0
    for octave in range(octaves):
        n = cells << octave
        if n > max(height, width):
            break
        grid = rng.standard_normal((n, n)).astype(np.float32)
        grid = np.pad(grid, 2, mode="wrap")
        big = cv2.resize(grid, (round(width * (n + 4) / n), round(height * (n + 4) / n)), interpolation=cv2.INTER_CUBIC)
        y, x = round(2 * height / n), round(2 * width / n)
        out += weight * big[y : y + height, x : x + width]
        weight *= gain
    out -= out.mean()
    return out / max(float(out.std()), 1e-6)


@lru_cache(maxsize=1)
def noise_tiles() -> np.ndarray:
    """[3, 512, 512] float32: fine grain, medium, coarse blotches. The same for all drives."""
    rng = np.random.default_rng(77)
    return np.stack(
        [fractal(rng, 512, 512, 64, 4, 0.8), fractal(rng, 512, 512, 16, 5, 0.7), fractal(rng, 512, 512, 4, 5)]
    )


@lru_cache(maxsize=32)
def crown(variant: int) -> tuple[np.ndarray, np.ndarray]:
    """A leafy crown as (luminance [512, 512] uint8, coverage [512, 512] uint8): lobes, gaps, lit from above."""
    rng = np.random.default_rng(500 + variant)
    size = 512
    yy, xx = np.mgrid[0:size, 0:size].astype(np.float32) / (size - 1) * 2 - 1
    shape = np.full((size, size), -1.0, np.float32)
    light = np.zeros((size, size), np.float32)
    kind = variant % 5  # 0-2 round, 3 tall, 4 cone
    for _ in range(26):
        a, r = rng.uniform(0, 2 * np.pi), np.sqrt(rng.uniform(0, 1)) * 0.62
        cx, cy, rad = r * np.cos(a), r * np.sin(a), rng.uniform(0.2, 0.36)
        if kind == 3:
            cx *= 0.55
        elif kind == 4:
            cy = rng.uniform(-0.8, 0.85)
            cx = rng.uniform(-1, 1) * 0.42 * (cy + 1.05)
            rad *= 0.35 + 0.4 * (cy + 1)
        bump = 1 - ((xx - cx) ** 2 + (yy - cy) ** 2) / (rad * rad)
        nearer = bump > shape
        light = np.where(
            nearer, -(yy - cy) / rad * 0.6 - (xx - cx) / rad * 0.2 + rng.uniform(-0.35, 0.35) - cy * 0.5, light
        )
        shape = np.maximum(shape, bump)
    leaf, clump = fractal(rng, size, size, 64, 3, 0.9), fractal(rng, size, size, 12, 4, 0.7)
    cover = (shape + 0.16 * leaf + 0.3 * clump > 0.06).astype(np.uint8) * 255
    cover[[0, -1], :] = 0
    cover[:, [0, -1]] = 0
    lum = 116 + 34 * light + 20 * leaf + 22 * clump
    return np.clip(lum, 6, 250).astype(np.uint8), cover


@lru_cache(maxsize=8)
def bare_crown(variant: int) -> tuple[np.ndarray, np.ndarray]:
    """A leafless crown as (luminance, coverage), both [512, 512] uint8: branches that fork."""
    rng = np.random.default_rng(700 + variant)
    size = 512
    cover = np.zeros((size, size), np.uint8)

    def grow(x: float, y: float, angle: float, length: float, width: float, depth: int) -> None:
        x2, y2 = x + np.cos(angle) * length, y - np.sin(angle) * length
        cv2.line(
            cover,
            (round(x * 16), round(y * 16)),
            (round(x2 * 16), round(y2 * 16)),
            255,
            max(2, round(width)),
            cv2.LINE_8,
            4,
        )
        if depth == 0:
            return
        for _ in range(3 if depth > 2 else 2):
            grow(x2, y2, angle + rng.normal(0, 0.5), length * rng.uniform(0.62, 0.88), width * 0.66, depth - 1)

    grow(256, 511, np.pi / 2, 110, 17, 6)
    return np.clip(96 + 26 * noise_tiles()[0], 10, 200).astype(np.uint8), cover


def _ramp(lum: np.ndarray, cover: np.ndarray, dark: np.ndarray, bright: np.ndarray) -> np.ndarray:
    """Maps luminance 0..255 to colours between ``dark`` and ``bright``: [h, w, 4] uint8 with the given coverage."""
    table = np.empty((256, 4))
    table[:, :3] = dark + (bright - dark) * np.linspace(0, 1, 256)[:, None]
    table[:, 3] = np.arange(256)
    return cv2.LUT(cv2.merge([lum, lum, lum, cover]), np.clip(table, 0, 255).astype(np.uint8)[None])


def finish(rgb: np.ndarray, cover: np.ndarray | None = None) -> np.ndarray:
    """Float colours [h, w, 3] and coverage (default: everywhere) to a texture."""
    out = cv2.cvtColor(
        cv2.add(np.ascontiguousarray(rgb, np.float32), (0.0, 0.0, 0.0, 0.0), dtype=cv2.CV_8U), cv2.COLOR_RGB2RGBA
    )
    if cover is not None:
        cv2.insertChannel(cover, out, 3)
    return out


def speckle(rng: np.random.Generator, h: int, w: int, amounts: tuple[float, float, float]) -> np.ndarray:
    """Noise [h, w, 3] float32 that is equal in all colours: ``amounts`` of the fine, medium and coarse tile."""
    rows, columns = np.arange(h) + rng.integers(0, 512), np.arange(w) + rng.integers(0, 512)
    total = np.zeros((h, w), np.float32)
    for amount, tile in zip(amounts, noise_tiles(), strict=True):
        if amount:
            total += np.float32(amount) * np.take(np.take(tile, rows, 0, mode="wrap"), columns, 1, mode="wrap")
    return cv2.merge([total, total, total])


def tree_texture(variant: int, bare: bool, colour: tuple[float, float, float], flip: bool) -> np.ndarray:
    """A crown in the given mid colour (RGB)."""
    lum, cover = bare_crown(variant % 6) if bare else crown(variant % CROWNS)
    mid = np.asarray(colour)
    out = _ramp(lum, cover, mid * 0.22, np.clip(mid * 1.75 + 14, 0, 255))
    return cv2.flip(out, 1) if flip else out


def hedge_texture(seed: int, colour: tuple[float, float, float], length: float, height: float) -> np.ndarray:
    """A hedge with an uneven top."""
    rng = np.random.default_rng(seed)
    w, h = int(np.clip(length * 64, 64, 640)), int(np.clip(height * 72, 48, 320))
    tiles = noise_tiles()
    ox, oy = rng.integers(0, 512, 2)
    grab = [np.take(np.take(t, np.arange(h) + oy, 0, mode="wrap"), np.arange(w) + ox, 1, mode="wrap") for t in tiles]
    depth = np.linspace(1, 0, h, dtype=np.float32)[:, None]
    lum = 88 + 40 * depth + 24 * grab[0] + 24 * grab[1]
    mid = np.asarray(colour)
    cover = ((1 - depth) * h > (5 + 3 * grab[1] + 2.5 * grab[0])).astype(np.uint8) * 255
    return _ramp(np.clip(lum, 4, 250).astype(np.uint8), cover, mid * 0.2, np.clip(mid * 1.7 + 10, 0, 255))


def _bricks(
    rng: np.random.Generator, h: int, w: int, brick: tuple[int, int], colour: np.ndarray, joint: np.ndarray
) -> np.ndarray:
    """[h, w, 3] float32: courses of bricks with joints, ``brick`` = (height, width) in pixels."""
    bh, bw = brick
    rows, cols = np.arange(h) // bh, np.arange(w)
    shift = (rows % 2) * (bw // 2)
    index = (cols[None] + shift[:, None]) // bw
    tone = rng.normal(1.0, 0.09, (h // bh + 2, w // bw + 3)).astype(np.float32)[rows[:, None], index]
    out = colour.astype(np.float32) * tone[..., None]
    lines = (np.arange(h) % bh == 0)[:, None] | ((cols[None] + shift[:, None]) % bw == 0)
    out[lines] = joint
    return out


def wall_texture(seed: int, kind: int, length: float, height: float) -> np.ndarray:
    """A free-standing wall: 0 brick, 1 plaster, 2 concrete panels, 3 rubble; with a coping on top."""
    rng = np.random.default_rng(seed)
    scale = 56.0
    w, h = int(np.clip(length * scale, 64, 640)), int(np.clip(height * scale, 48, 256))
    base = np.array([(132, 84, 66), (186, 178, 160), (150, 149, 145), (140, 132, 118)][kind]) + rng.normal(0, 12, 3)
    if kind == 0:
        out = _bricks(rng, h, w, (5, 13), base, base * 0.4 + 90)
    elif kind == 3:
        out = _bricks(rng, h, w, (14, 27), base, base * 0.55)
    else:
        out = np.broadcast_to(base, (h, w, 3)).astype(np.float32).copy()
        if kind == 2:
            out[:, :: max(24, w // 4)] *= 0.6
    out += speckle(rng, h, w, (5, 0, 9))
    out[-max(3, h // 8) :] *= np.linspace(1, 0.72, max(3, h // 8))[:, None, None]
    cap = max(3, h // 14)
    out[:cap] = base * 0.5 + 75
    out[cap] *= 0.6
    if rng.random() < 0.3:  # graffiti
        for _ in range(int(rng.integers(2, 6))):
            centre = (int(rng.integers(0, w)), int(rng.integers(h // 3, h)))
            axes = (int(rng.integers(8, 30)), int(rng.integers(6, 18)))
            cv2.ellipse(
                out,
                centre,
                axes,
                float(rng.uniform(0, 180)),
                0.0,
                float(rng.uniform(180, 360)),
                rng.uniform(20, 230, 3).tolist(),
                3,
            )
    return finish(out)


def fence_texture(seed: int, kind: int, length: float, height: float) -> np.ndarray:
    """A fence: 0 pickets with gaps, 1 boards, 2 iron bars on a base, 3 wire mesh, 4 guard rail, 5 site hoarding."""
    rng = np.random.default_rng(seed)
    scale = 80.0
    w, h = int(np.clip(length * scale, 64, 768)), int(np.clip(height * scale, 40, 256))
    px = w / length
    colour = np.array(
        [(176, 172, 164), (118, 88, 62), (44, 50, 48), (98, 112, 100), (150, 152, 154), (150, 156, 160)][kind]
    ) + rng.normal(0, 14, 3)
    if kind in (0, 1) and rng.random() < 0.4:
        colour = np.array((84, 104, 74)) + rng.normal(0, 12, 3)
    x = (np.arange(w) + 0.5) / px
    y = (np.arange(h) + 0.5) / h
    out = np.broadcast_to(colour, (h, w, 3)).astype(np.float32).copy()
    cover = np.full((h, w), 255, np.uint8)
    if kind in (0, 1):
        pitch, fill = (0.16, 0.66) if kind == 0 else (0.14, 1.0)
        board, f = np.floor(x / pitch).astype(int), (x / pitch) % 1.0
        tone = rng.normal(1.0, 0.09, board.max() + 1)[board]
        out *= (tone * np.where(f > (fill - 0.1), 0.6, 1.0))[None, :, None]
        rails = (np.abs(y - 0.28) < 0.05) | (np.abs(y - 0.75) < 0.05)
        if kind == 0:
            gaps = f > fill
            cover[:, gaps] = 0
            cover[rails] = 255
            cover[(y < 0.07)[:, None] & (np.abs(f - fill / 2) > fill * 0.28)[None]] = 0
            out[rails[:, None] & gaps[None]] = colour * 0.6
        else:
            cover[: 1 + h // 40, tone < 0.97] = 0
    elif kind == 2:
        bars = (x / 0.125) % 1.0 < 0.36
        posts = (x / 2.2) % 1.0 < 0.045
        solid = (np.abs(y - 0.07) < 0.04) | (np.abs(y - 0.66) < 0.035)
        base = y > 0.78
        cover[:] = 0
        cover[:, bars | posts] = 255
        cover[solid] = 255
        cover[base] = 255
        out[base] = np.array((140, 136, 128)) + rng.normal(0, 8, 3)
        cover[0, ~bars] = 0
    elif kind == 3:
        out[:] = colour * 0.75 + 26
        gx, gy = (x / 0.09) % 1.0, (y * height / 0.09) % 1.0
        out[(gy < 0.3)[:, None] | (gx < 0.3)[None]] = colour * 1.1
        out[:, (x / 2.5) % 1.0 < 0.03] = colour * 0.6
        out += speckle(rng, h, w, (0, 14, 0))
    elif kind == 4:
        cover[:] = 0
        cover[(y > 0.08) & (y < 0.5)] = 255
        cover[:, (x / 2.0) % 1.0 < 0.06] = 255
        out *= (1 - 0.3 * np.cos(y * 13) ** 2)[:, None, None]
    else:
        panel = (x / 2.0).astype(int)
        out *= rng.normal(1.0, 0.06, panel.max() + 1)[panel][None, :, None]
        out[:, (x / 2.0) % 1.0 < 0.03] *= 0.5
        stripe = ((x[None] / 0.3 + y[:, None] * height / 0.3) % 1.0 < 0.5) & (np.abs(y - 0.5) < 0.09)[:, None]
        out[np.abs(y - 0.5) < 0.09] = (214, 210, 204)
        out[stripe] = (176, 48, 42)
    out += speckle(rng, h, w, (7, 0, 6))
    return finish(out, cover)
