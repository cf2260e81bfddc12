"""Facades: floors of window bays with shops below and a cornice above. Pure functions of their arguments."""

from __future__ import annotations

import cv2
import numpy as np

from sparserefine_ros.datasets.street_textures import finish, speckle

PIXELS_PER_METRE = 40.0

_WALL = np.array(
    [(202, 192, 170), (186, 160, 126), (170, 96, 76), (142, 74, 58), (196, 196, 192), (160, 160, 158), (122, 122, 124),
     (214, 204, 150), (178, 190, 196), (206, 172, 150), (150, 138, 118), (226, 220, 208), (110, 96, 84),
     (166, 178, 154)],
    float,
)  # fmt: skip


def _window(
    rng: np.random.Generator, h: int, w: int, frame: np.ndarray, night: float, panes: tuple[int, int]
) -> np.ndarray:
    """One window with glass, blinds or a curtain, and its frame."""
    sky = rng.uniform(0.0, 1.0)
    glass = np.array((38, 44, 52)) + sky * np.array((66, 78, 90))
    out = np.broadcast_to(glass, (h, w, 3)).copy()
    out *= np.linspace(1.18, 0.72, h)[:, None, None]
    if rng.random() < night:
        out[:] = np.array((236, 196, 128)) * rng.uniform(0.6, 1.0)
    mode = rng.random()
    if mode < 0.3:  # blind part of the way down
        drop = int(h * rng.uniform(0.15, 0.9))
        out[:drop] = np.array((198, 192, 180)) * rng.uniform(0.55, 1.0)
        out[:drop:3] *= 0.88
    elif mode < 0.5:  # curtains
        side = int(w * rng.uniform(0.15, 0.3))
        tone = np.array((206, 200, 190)) * rng.uniform(0.5, 1.0)
        out[:, :side] = out[:, w - side :] = tone
    elif mode < 0.7:  # a reflected roof line
        cv2.fillPoly(
            out,
            [np.array([(0, h), (0, int(h * rng.uniform(0.2, 0.8))), (w, int(h * rng.uniform(0.2, 0.8))), (w, h)])],
            (glass * 0.55).tolist(),
        )
    t = max(2, w // 14)
    for i in range(panes[0] + 1):
        x = min(w - t, max(0, round(i * w / panes[0] - t / 2)))
        out[:, x : x + t] = frame
    for i in range(panes[1] + 1):
        y = min(h - t, max(0, round(i * h / panes[1] - t / 2)))
        out[y : y + t] = frame
    return out


def facade_texture(
    seed: int, bays: int, floors: int, bay: float, floor: float, ground: float, shop: bool, glassy: bool, night: float
) -> np.ndarray:
    """A whole front [h, w, 4] uint8 of ``bays`` x ``floors`` over a ground floor.

    Sizes in metres; ``night`` is the share of lit windows.
    """
    rng = np.random.default_rng(seed)
    px = PIXELS_PER_METRE
    bw, fh, gh = round(bay * px), round(floor * px), round(ground * px)
    w, h = bays * bw, floors * fh + gh
    wall = _WALL[rng.integers(len(_WALL))] + rng.normal(0, 9, 3)
    frame = np.array([(222, 220, 214), (92, 74, 58), (64, 66, 70), (150, 152, 154)][rng.integers(4)], float)
    trim = np.clip(wall * rng.uniform(0.7, 1.25) + rng.uniform(-10, 25), 20, 240)
    out = np.empty((h, w, 3), np.float32)
    out[:] = wall
    material = rng.integers(4)
    if glassy:
        out[:] = wall = np.array((70, 82, 92)) + rng.normal(0, 10, 3)
    elif material == 0:  # brick courses
        out[::4] *= 0.82
        out[:, ::11] *= 0.93
    elif material == 1:  # stone blocks
        out[:: max(8, fh // 5)] *= 0.8
        out[:, :: max(12, bw // 3)] *= 0.9
    elif material == 2:  # concrete panels
        out[::fh] *= 0.65
        out[:, ::bw] *= 0.65
    ww = int(bw * (rng.uniform(0.38, 0.62) if not glassy else 0.92))
    wh = int(fh * (rng.uniform(0.48, 0.66) if not glassy else 0.8))
    panes = (int(rng.integers(1, 4)), int(rng.integers(1, 3)))
    variants = [_window(rng, wh, ww, frame, night, panes) for _ in range(7)]
    x0, y0 = (bw - ww) // 2, int((fh - wh) * 0.45)
    balcony = not glassy and rng.random() < 0.3
    every = int(rng.integers(1, 4))
    surround, sill = rng.random() < 0.5, rng.random() < 0.7
    rail = np.array([(60, 62, 64), (150, 150, 148), (120, 96, 72)][rng.integers(3)], float)
    for f in range(floors):
        for b in range(bays):
            y, x = f * fh + y0, b * bw + x0
            if surround:
                out[max(0, y - 4) : y + wh + 4, max(0, x - 4) : x + ww + 4] = trim
            out[y : y + wh, x : x + ww] = variants[int(rng.integers(len(variants)))]
            if sill:
                out[y + wh : y + wh + 3, max(0, x - 3) : x + ww + 3] = trim * 1.08
                out[y + wh + 3 : y + wh + 6, max(0, x - 3) : x + ww + 3] *= 0.7
            if not glassy:
                out[y : y + 3, x : x + ww] *= 0.5  # the lintel's shadow
            if balcony and b % every == 0:
                top = y + wh - int(0.95 * px)
                left, right = max(0, x - 10), min(w, x + ww + 10)
                out[max(0, top) : y + wh : 1, left:right:5] = rail
                out[max(0, top) : max(0, top) + 3, left:right] = rail
                out[y + wh : y + wh + 7, left:right] = rail * 0.5 + 60
    band = floors * fh
    if rng.random() < 0.7:
        out[band - 5 : band] = trim
        out[band : band + 3] *= 0.55
    _ground_floor(rng, out[band:], bw, bays, shop, frame, night)
    cap = int(rng.integers(6, 16))
    out[:cap] = trim
    out[cap : cap + 4] *= 0.6
    out += speckle(rng, h, w, (4, 0, 5))
    stain = max(0, int(0.5 * px))
    out[-stain:] *= np.linspace(1.0, 0.8, stain)[:, None, None]
    if rng.random() < 0.6:  # a rain pipe
        x = int(rng.choice([3, w - 8]))
        out[:, x : x + 4] = np.array((96, 98, 98))
        out[:, x + 4 : x + 6] *= 0.7
    return finish(out)


def _ground_floor(
    rng: np.random.Generator, out: np.ndarray, bw: int, bays: int, shop: bool, frame: np.ndarray, night: float
) -> None:
    """Draws shops (glass, name boards, awnings) or plain windows and a door into ``out`` [h, w, 3]."""
    h, w = out.shape[:2]
    out *= rng.uniform(0.8, 1.05)
    door_bay = int(rng.integers(bays))
    colour = rng.uniform(30, 220, 3)
    for b in range(bays):
        x = b * bw
        if b == door_bay:
            dw, dh = min(bw - 8, int(1.15 * PIXELS_PER_METRE)), int(2.3 * PIXELS_PER_METRE)
            left = x + (bw - dw) // 2
            out[h - dh - 6 :, left - 4 : left + dw + 4] = frame
            out[h - dh :, left : left + dw] = rng.uniform(30, 130, 3)
            out[h - dh : h - dh + 20, left + 6 : left + dw - 6] = (60, 66, 74)
            continue
        if shop:
            if b % 2 == 0 or b == door_bay + 1:
                colour = rng.uniform(30, 220, 3)
            board = int(0.62 * PIXELS_PER_METRE)
            top = int(h * 0.1)
            glass = _window(rng, h - top - board - 14, bw - 6, frame, max(night, 0.25), (2, 1))
            out[top : top + board, x : x + bw] = colour
            n = int(rng.integers(3, 8))
            for k in range(n):  # lettering
                a = x + 8 + k * (bw - 16) // n
                tall = int(rng.integers(board // 4, board // 2))
                out[top + board // 2 - tall // 2 : top + board // 2 + tall // 2, a : a + max(3, (bw - 16) // n - 4)] = (
                    235 - colour * 0.6
                )
            out[top + board : top + board + glass.shape[0], x + 3 : x + 3 + glass.shape[1]] = glass
            if rng.random() < 0.3:
                awning = out[top + board : top + board + 22, x : x + bw]
                awning[:] = colour
                awning[:, (np.arange(awning.shape[1]) // 8) % 2 == 0] = (226, 222, 214)
            for _ in range(int(rng.integers(0, 4))):
                gx, gy = (
                    x + int(rng.integers(6, bw - 26)),
                    top + board + int(rng.integers(8, max(9, glass.shape[0] - 34))),
                )
                out[gy : gy + int(rng.integers(8, 26)), gx : gx + int(rng.integers(6, 20))] = rng.uniform(40, 230, 3)
        else:
            ww, wh = int(bw * 0.5), int(h * 0.45)
            left = x + (bw - ww) // 2
            out[int(h * 0.22) : int(h * 0.22) + wh, left : left + ww] = _window(rng, wh, ww, frame, night, (2, 2))
