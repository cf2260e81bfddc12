"""Street furniture and two-wheelers as templates: lamps, signs, traffic lights, bicycles, motorcycles."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from sparserefine_ros.datasets.street_shapes import (
    ACCENT,
    BODY,
    EXTRA,
    GLASS,
    LAMP,
    LOWER,
    PLATE,
    RIM,
    SLOTS,
    TAIL,
    TRIM,
    TYRE,
    UPPER,
    Builder,
    Template,
)  # fmt: skip

BUILDING, POLE, LIGHT, SIGN, MOTORCYCLE, BICYCLE = 2, 5, 6, 7, 17, 18


@lru_cache(maxsize=32)
def lamp(variant: int) -> Template:
    """A street lamp; its arm points to local -x (towards the road for the right pavement)."""
    b = Builder(POLE)
    height = (7.5, 6.0, 8.5, 4.2)[variant % 4]
    b.stick((0, 0, 0), (0, 0.9, 0), 0.1, 0.09, BODY)
    b.stick((0, 0.9, 0), (0, height, 0), 0.075, 0.05, BODY)
    b.stick((0.025, 0.9, 0), (0.018, height, 0), 0.025, 0.016, UPPER)
    if variant % 4 == 3:  # a lantern on a short post
        b.ball((0, height + 0.25, 0), 0.24, 0.3, LAMP)
        b.stick((0, height + 0.5, 0), (0, height + 0.6, 0), 0.28, 0.1, BODY)
    else:
        reach = (1.6, 0.9, 2.2)[variant % 4]
        b.stick((0, height, 0), (-reach * 0.6, height + 0.35, 0), 0.045, 0.04, BODY)
        b.stick((-reach * 0.6, height + 0.35, 0), (-reach, height + 0.4, 0), 0.04, 0.035, BODY)
        b.stick((-reach + 0.1, height + 0.38, 0), (-reach - 0.6, height + 0.38, 0), 0.1, 0.07, BODY)
        b.stick((-reach - 0.05, height + 0.31, 0), (-reach - 0.5, height + 0.31, 0), 0.05, 0.05, LAMP)
    return b.build()


@lru_cache(maxsize=8)
def bollard(variant: int) -> Template:
    """A short post at the kerb."""
    b = Builder(POLE)
    b.stick((0, 0, 0), (0, 0.95, 0), 0.06, 0.055, BODY)
    b.stick((0, 0.72, 0), (0, 0.84, 0), 0.06, 0.06, ACCENT if variant % 2 else UPPER)
    return b.build()


@lru_cache(maxsize=8)
def utility_pole(variant: int) -> Template:
    """A tall wooden or concrete pole with cross-arms."""
    b = Builder(POLE)
    b.stick((0, 0, 0), (0, 9.0, 0), 0.13, 0.09, BODY)
    b.stick((0.05, 0, 0), (0.03, 9.0, 0), 0.03, 0.02, UPPER)
    for k in range(1 + variant % 2):
        b.stick((-0.9, 8.5 - k * 0.8, 0), (0.9, 8.5 - k * 0.8, 0), 0.05, 0.05, BODY)
        for x in (-0.8, -0.4, 0.4, 0.8):
            b.stick((x, 8.55 - k * 0.8, 0), (x, 8.72 - k * 0.8, 0), 0.035, 0.025, UPPER)
    return b.build()


def _glyph(b: Builder, y: float, size: float, kind: int, z: float, slot: int) -> None:
    """Dark marks inside a sign, ``kind`` picks which."""
    if kind == 0:
        b.across((-size * 0.45, -size * 0.08), (y - size * 0.4, y + size * 0.4), z, slot, False)
        b.across((size * 0.1, size * 0.45), (y - size * 0.4, y + size * 0.4), z, slot, False)
    elif kind == 1:
        b.across((-size * 0.12, size * 0.12), (y - size * 0.55, y + size * 0.45), z, slot, False)
    elif kind == 2:
        b.across((-size * 0.62, size * 0.62), (y - size * 0.16, y + size * 0.16), z, slot, False)
    else:
        b.across((-size * 0.4, size * 0.1), (y - size * 0.3, y - size * 0.05), z, slot, False)
        b.across((-size * 0.1, size * 0.45), (y + size * 0.05, y + size * 0.32), z, slot, False)


def _plate(b: Builder, kind: int, y: float, glyph: int, z: float = -0.06) -> float:
    """One sign plate that faces local -z with its centre near height y; returns its half height.

    Slots: ACCENT red or blue field, UPPER white field, TRIM black, EXTRA yellow, RIM the grey back.
    """
    inside = (0.0, y, z + 1.0)
    if kind in (0, 1, 2):  # round: prohibition, mandatory (blue), no parking
        r = 0.33
        b.disc((0, y, z), r, EXTRA if kind == 1 else ACCENT, "z", 16, sign=-1.0)
        if kind == 0:
            b.disc((0, y, z - 0.01), r * 0.74, UPPER, "z", 14, sign=-1.0)
            _glyph(b, y, r * 0.7, glyph, z - 0.02, TRIM)
        elif kind == 1:
            _glyph(b, y, r * 0.8, 1 + glyph % 2, z - 0.02, UPPER)
        else:
            b.disc((0, y, z - 0.01), r * 0.72, EXTRA, "z", 14, sign=-1.0)
            b.face(
                [
                    (-r * 0.55, y + r * 0.4, z - 0.02),
                    (-r * 0.4, y + r * 0.55, z - 0.02),
                    (r * 0.55, y - r * 0.4, z - 0.02),
                    (r * 0.4, y - r * 0.55, z - 0.02),
                ],
                ACCENT,
                inside,
            )
        b.disc((0, y, z + 0.03), r, RIM, "z", 16, sign=1.0)
        return r
    if kind in (3, 4):  # triangle: warning, give way
        r, up = 0.44, 1.0 if kind == 3 else -1.0
        for scale, slot, dz in ((1.0, ACCENT, 0.0), (0.68, UPPER, -0.01)):
            angle = np.pi / 2 * up + np.arange(3) * (2 * np.pi / 3)
            points = [(r * scale * np.cos(a), y + r * scale * np.sin(a), z + dz) for a in angle]
            b.face(points, slot, inside)
            if dz == 0.0:
                b.face([(x, yy, z + 0.03) for x, yy, _ in points], RIM, (0.0, y, z - 1.0))
        if kind == 3:
            b.across((-0.03, 0.03), (y - 0.1, y + 0.16), z - 0.02, TRIM, False)
        return r
    half_w, half_h = ((0.3, 0.3), (0.4, 0.22), (0.28, 0.42), (0.95, 0.62), (0.45, 0.13))[kind - 5]
    field = (EXTRA, UPPER, EXTRA, EXTRA, UPPER)[kind - 5]
    if kind == 5 and glyph == 0:  # right of way: a diamond
        for scale, slot, dz in ((1.3, UPPER, 0.0), (1.05, PLATE, -0.01)):
            s = half_w * scale
            b.face([(-s, y, z + dz), (0, y - s, z + dz), (s, y, z + dz), (0, y + s, z + dz)], slot, inside)
        return half_h * 1.3
    b.across((-half_w, half_w), (y - half_h, y + half_h), z, UPPER, False)
    b.across((-half_w + 0.03, half_w - 0.03), (y - half_h + 0.03, y + half_h - 0.03), z - 0.01, field, False)
    b.across((-half_w, half_w), (y - half_h, y + half_h), z + 0.03, RIM, True)
    ink = TRIM if field == UPPER else UPPER
    for row in range(1 if half_h < 0.2 else 2 if half_h < 0.5 else 3):
        yy = y + half_h * (0.0 if half_h < 0.2 else 0.45 - 0.5 * row)
        t = half_h * (0.35 if half_h < 0.2 else 0.14)
        right = half_w * (0.75 - 0.25 * ((glyph + row) % 3))
        b.across((-half_w * 0.75, right), (yy - t, yy + t), z - 0.02, ink, False)
    return half_h


SIGN_KINDS = 10


@lru_cache(maxsize=256)
def sign_post(kind: int, second: int, glyph: int) -> Template:
    """A post with one plate, or two (``second`` >= 0)."""
    b = Builder(SIGN, sticks_first=True)
    top = 2.55 + 0.15 * (glyph % 3) + (0.5 if kind == 8 else 0.0)
    posts = (-0.6, 0.6) if kind == 8 else (0.0,)
    for x in posts:
        b.stick((x, 0, 0), (x, top + 0.35, 0), 0.035, 0.035, BODY, POLE)
    half = _plate(b, kind, top, glyph)
    if second >= 0 and kind != 8:
        _plate(b, second, top - half - 0.42, (glyph + 1) % 4)
    return b.build()


@lru_cache(maxsize=64)
def traffic_light(arm: float, state: int, walk: int) -> Template:
    """A mast with a signal that faces local -z; ``arm`` > 0 carries a second signal over the road (towards -x)."""
    b = Builder(LIGHT, sticks_first=True)
    height = 6.0 if arm > 0 else 3.5
    b.stick((0, 0, 0), (0, height, 0), 0.085, 0.065, BODY, POLE)
    b.stick((0.03, 0, 0), (0.02, height, 0), 0.025, 0.02, UPPER, POLE)
    spots = [(0.0, 2.4)]
    if arm > 0:
        b.stick((0, height - 0.15, 0), (-arm, height + 0.1, 0), 0.06, 0.045, BODY, POLE)
        spots.append((-arm + 0.3, height - 0.65))
    lamps = (TAIL, EXTRA, PLATE)
    for x, y in spots:
        b.box((x - 0.17, x + 0.17), (y, y + 0.98), (-0.3, -0.08), TRIM)
        for k in range(3):
            lit = k == (0, 2, 1)[state % 3]
            b.disc((x, y + 0.81 - 0.32 * k, -0.315), 0.115, lamps[k] if lit else GLASS, "z", 10, sign=-1.0)
    if walk:
        b.box((0.08, 0.36), (1.75, 2.3), (-0.2, 0.0), TRIM)
        b.disc((0.22, 2.15 if state % 3 else 1.9, -0.21), 0.09, TAIL if state % 3 == 1 else PLATE, "z", 8, sign=-1.0)
    return b.build()


@lru_cache(maxsize=4)
def shelter(variant: int) -> Template:
    """A bus shelter: posts, roof, glass-dark back wall. Cityscapes counts it as building."""
    b = Builder(BUILDING)
    b.face(
        [(1.1, 0.3, -2.0), (1.1, 0.3, 2.0), (1.1, 2.2, 2.0), (1.1, 2.2, -2.0)], GLASS, (5.0, 1.0, 0.0), two_sided=True
    )
    b.box((-0.3, 1.2), (2.3, 2.5), (-2.1, 2.1), BODY)
    b.box((0.6, 1.05), (0.42, 0.5), (-1.6, 1.6), ACCENT)
    for z in (-2.0, 2.0):
        for x in (-0.2, 1.1):
            b.stick((x, 0, z), (x, 2.3, z), 0.04, 0.04, BODY, BUILDING)
    if variant % 2:
        b.box((-0.2, 1.0), (0.3, 2.1), (2.02, 2.14), EXTRA)
    return b.build()


def furniture_palette(rng: np.random.Generator) -> np.ndarray:
    """Colours of poles, signs and lights, [S, 3] RGB."""
    grey = rng.uniform(62, 150)
    body = np.array(
        [(grey, grey, grey * 1.02), (52, 60, 54), (70, 72, 76), (118, 96, 74)][
            int(rng.choice(4, p=[0.55, 0.15, 0.2, 0.1]))
        ]
    )
    p = np.zeros((SLOTS, 3))
    p[BODY], p[UPPER], p[LOWER] = body, (226, 226, 220), body * 0.7
    p[TRIM], p[RIM], p[GLASS] = (36, 36, 38), (118, 120, 122), (30, 30, 32)
    p[ACCENT], p[EXTRA] = (186, 30, 36), (32, 78, 158)
    if rng.random() < 0.2:
        p[EXTRA] = (30, 110, 70)
    p[LAMP], p[TAIL], p[PLATE] = (236, 226, 196), (240, 60, 40), (236, 186, 36)
    p[TYRE] = (28, 28, 30)
    return p


def light_palette(rng: np.random.Generator) -> np.ndarray:
    """Colours of a traffic light: its housing may be black, yellow-grey or green."""
    p = furniture_palette(rng)
    p[UPPER] = np.clip(p[BODY] * 1.3, 0, 255)
    p[EXTRA], p[PLATE] = (250, 190, 50), (70, 235, 150)
    p[TRIM] = np.array([(34, 36, 36), (46, 62, 50), (30, 30, 34), (96, 92, 58)])[
        int(rng.choice(4, p=[0.5, 0.2, 0.2, 0.1]))
    ]
    return p


def _ring(b: Builder, z: float, radius: float, width: float, slot: int, parts: int) -> None:
    angle = np.linspace(0, 2 * np.pi, parts + 1)
    for i in range(parts):
        a, c = angle[i], angle[i + 1]
        b.stick(
            (0, radius + radius * np.sin(a), z + radius * np.cos(a)),
            (0, radius + radius * np.sin(c), z + radius * np.cos(c)),
            width,
            width,
            slot,
        )


@lru_cache(maxsize=8)
def bicycle(coarse: bool, variant: int = 0) -> Template:
    """A bicycle along z; ``coarse`` has solid wheels, for a distance at which spokes and gaps vanish."""
    b = Builder(BICYCLE)
    for z in (-0.52, 0.52):
        if coarse:
            b.disc((0, 0.34, z), 0.35, TYRE, two_sided=True, sides=10)
        else:
            b.disc((0, 0.34, z), 0.3, GLASS, two_sided=True, sides=10)
        _ring(b, z, 0.335, 0.024, TYRE, 6 if coarse else 12)
        b.stick((0, 0.02, z), (0, 0.66, z), 0.03, 0.03, TYRE)  # the wheel seen edge-on
    pedal, seat, head, rear, fork = (0, 0.3, -0.05), (0, 0.85, -0.2), (0, 0.88, 0.33), (0, 0.34, -0.52), (0, 0.34, 0.52)
    for a, c in ((pedal, seat), (pedal, head), (seat, head), (rear, pedal), (rear, seat), (head, fork)):
        b.stick(a, c, 0.024, 0.024, BODY)
    b.stick((0, 0.93, -0.32), (0, 0.96, -0.1), 0.06, 0.035, TRIM)
    b.stick((0, 0.88, 0.33), (0, 1.05, 0.28), 0.02, 0.02, RIM)
    b.stick((-0.28, 1.04, 0.26), (0.28, 1.04, 0.26), 0.022, 0.022, TRIM)
    b.stick((0, 0.72, -0.85), (0, 0.55, -0.8), 0.05, 0.04, TAIL if variant else TRIM)
    if variant:
        b.stick((0, 0.7, -0.8), (0, 0.74, -0.3), 0.1, 0.08, ACCENT)
    return b.build()


@lru_cache(maxsize=4)
def motorcycle(variant: int) -> Template:
    """A motorcycle, or a scooter (odd variants), along z."""
    b = Builder(MOTORCYCLE)
    r = 0.31 if variant % 2 == 0 else 0.24
    for z in (-0.68, 0.68):
        b.disc((0, r, z), r, TYRE, two_sided=True, sides=12)
        b.disc((0.01, r, z), r * 0.55, RIM, sign=1.0, sides=8)
        b.disc((-0.01, r, z), r * 0.55, RIM, sign=-1.0, sides=8)
        b.stick((0, 0.02, z), (0, 2 * r - 0.02, z), 0.065, 0.065, TYRE)
    b.stick((0, 0.45, -0.45), (0, 0.45, 0.3), 0.2, 0.2, LOWER)
    b.stick((0, 0.82, -0.8), (0, 0.74, 0.0), 0.12, 0.14, TRIM)
    b.stick((0, 0.78, -0.05), (0, 0.9, 0.35), 0.16, 0.15, BODY)
    b.stick((0, 0.62, -0.85), (0, 0.72, -0.35), 0.1, 0.15, BODY)
    b.stick((0.05, 0.31, 0.68), (0.05, 0.95, 0.42), 0.045, 0.05, RIM)
    b.stick((-0.34, 1.04, 0.36), (0.34, 1.04, 0.36), 0.03, 0.03, TRIM)
    b.stick((0, 0.95, 0.5), (0, 1.25, 0.38), 0.17, 0.12, GLASS)
    b.ball((0, 0.93, 0.55), 0.11, 0.1, LAMP)
    b.ball((0, 0.72, -0.93), 0.09, 0.05, TAIL)
    b.stick((0, 0.45, -0.92), (0, 0.6, -0.9), 0.1, 0.1, PLATE)
    if variant % 2:
        b.stick((0, 0.3, 0.55), (0, 0.95, 0.42), 0.22, 0.2, BODY)
        b.stick((0, 1.0, -0.72), (0, 1.3, -0.72), 0.2, 0.2, UPPER)
    return b.build()


def cycle_palette(rng: np.random.Generator) -> np.ndarray:
    """Colours of a bicycle or motorcycle, [S, 3] RGB."""
    p = np.zeros((SLOTS, 3))
    body = rng.uniform(20, 210, 3) if rng.random() < 0.6 else np.full(3, rng.uniform(20, 120))
    p[BODY], p[LOWER], p[UPPER] = body, np.full(3, rng.uniform(50, 110)), body * 0.8
    p[TYRE], p[RIM], p[TRIM], p[GLASS] = (26, 26, 28), (130, 130, 132), (40, 38, 38), (84, 86, 88)
    p[LAMP], p[TAIL], p[PLATE], p[ACCENT] = (220, 220, 210), (150, 24, 24), (210, 208, 190), rng.uniform(40, 170, 3)
    return p
