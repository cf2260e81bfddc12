"""Cars, trucks, buses and trams as templates. Sizes in metres, front towards +z."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from sparserefine_ros.datasets.street_shapes import (
    ACCENT,
    BODY,
    EXTRA,
    GLASS,
    GLOSS,
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

CAR, TRUCK, BUS, TRAIN = 13, 14, 15, 16
CAR_VARIANTS = 14


def _wheels(b: Builder, zs: list[float], half: float, radius: float, arch: bool = True) -> None:
    for z in zs:
        for sign in (1.0, -1.0):
            x = sign * half
            if arch:
                b.disc((x + sign * 0.006, radius * 1.05, z), radius * 1.2, TRIM, sign=sign)
            b.disc((x + sign * 0.012, radius, z), radius, TYRE, sign=sign)
            b.disc((x + sign * 0.018, radius, z), radius * 0.62, RIM, sign=sign, sides=10)
            b.disc((x + sign * 0.02, radius, z), radius * 0.2, TRIM, sign=sign, sides=6)


@lru_cache(maxsize=64)
def car(variant: int) -> tuple[Template, float, float, float]:
    """A car: template, length, width, height. Kinds: hatchback, saloon, estate, SUV, van."""
    rng = np.random.default_rng(9000 + variant)
    kind = variant % 5
    length = (4.0, 4.7, 4.7, 4.5, 4.9)[kind] * rng.uniform(0.95, 1.05)
    half = (0.86, 0.9, 0.9, 0.93, 0.97)[kind]
    top = (1.47, 1.42, 1.48, 1.68, 1.95)[kind] * rng.uniform(0.97, 1.03)
    belt = (0.92, 0.9, 0.92, 1.05, 1.1)[kind]
    front, rear = length / 2, -length / 2
    hood = (0.95, 1.15, 1.15, 1.1, 0.7)[kind]  # from the nose to the foot of the windscreen
    screen = (0.75, 0.8, 0.8, 0.65, 0.55)[kind]  # length of the windscreen, seen from above
    boot = (0.05, 0.85, 0.05, 0.08, 0.03)[kind]
    rake = (0.5, 0.7, 0.35, 0.3, 0.1)[kind]  # of the rear window
    b = Builder(CAR)
    nose = belt - 0.22 if kind != 4 else belt - 0.1
    b.prism(
        [
            (rear, 0.25),
            (front - 0.05, 0.26),
            (front, 0.5),
            (front - 0.08, nose),
            (front - hood, belt),
            (rear + 0.06, belt + 0.03),
            (rear, belt - 0.25),
        ],
        (half - 0.04, half - 0.04, half, half - 0.03, half - 0.03, half - 0.04, half),
        BODY,
        [TRIM, LOWER, BODY, UPPER, UPPER, UPPER, BODY],
        skip=(0,),
    )
    # flanks: dark sill, light shoulder
    b.sides(half + 0.002, [(rear + 0.05, 0.25), (front - 0.06, 0.26), (front - 0.02, 0.44), (rear + 0.02, 0.46)], LOWER)
    b.sides(
        half + 0.003,
        [(rear + 0.1, belt - 0.2), (front - 0.35, nose - 0.05), (front - hood, belt - 0.04), (rear + 0.1, belt)],
        UPPER,
        half - 0.03,
    )
    for z in (front - hood - screen * 0.5, front - hood - screen - 0.75):
        b.sides(half + 0.005, [(z, 0.36), (z + 0.018, 0.36), (z + 0.018, belt), (z, belt)], TRIM)
    # cabin
    z0, z1 = rear + boot + 0.04, front - hood
    z2, z3 = z0 + rake, z1 - screen
    wide, narrow = half - 0.06, half - (0.24 if kind < 3 else 0.18 if kind == 3 else 0.1)
    b.prism(
        [(z0, belt), (z1, belt), (z3, top), (z2, top)],
        (wide, wide, narrow, narrow),
        BODY,
        [BODY, TRIM, UPPER, BODY],
        skip=(0,),
    )
    low, high = belt + 0.05, top - 0.09
    height = top - belt

    def inset(y: float) -> tuple[float, float]:
        f = (y - belt) / height
        return z0 + f * rake, z1 - f * screen

    (ra, fa), (rb, fb) = inset(low), inset(high)
    wa = wide + (narrow - wide) * (low - belt) / height + 0.006
    wb = wide + (narrow - wide) * (high - belt) / height + 0.006
    pillar = ra + (fa - ra) * 0.47
    b.sides(
        wa,
        [(ra + 0.25, low), (pillar - 0.05, low), (pillar - 0.05, high), (rb + 0.12, high)],
        TRIM if kind == 4 and variant % 2 else GLASS,
        wb,
    )
    b.sides(wa, [(pillar + 0.05, low), (fa - 0.22, low), (fb - 0.12, high), (pillar + 0.05, high)], GLASS, wb)
    b.face(
        [
            (-wa + 0.12, low, fa + 0.01),
            (wa - 0.12, low, fa + 0.01),
            (wb - 0.1, high, fb + 0.01),
            (-wb + 0.1, high, fb + 0.01),
        ],
        GLASS,
    )
    b.face(
        [
            (-wa + 0.14, low, ra - 0.01),
            (wa - 0.14, low, ra - 0.01),
            (wb - 0.12, high, rb - 0.01),
            (-wb + 0.12, high, rb - 0.01),
        ],
        GLASS,
    )
    for f0, f1 in ((0.5, 0.8), (0.8, 0.97)):  # the sky in the windows
        for z_low, z_high, dz in ((fa, fb, 0.015), (ra, rb, -0.015)):
            y0, y1, u0, u1 = (
                low + (high - low) * f0,
                low + (high - low) * f1,
                z_low + (z_high - z_low) * f0 + dz,
                z_low + (z_high - z_low) * f1 + dz,
            )
            x0, x1 = wa + (wb - wa) * f0 - 0.15, wa + (wb - wa) * f1 - 0.15
            if f0 == 0.8 or variant % 3:
                b.face(
                    [(-x0, y0, u0), (x0 * (0.9 - 0.5 * f0), y0, u0), (x1 * (0.8 - 0.5 * f0), y1, u1), (-x1, y1, u1)],
                    GLOSS,
                )
    # rear
    for sign in (1, -1):
        x = sorted((sign * (half - 0.25), sign * (half - 0.03)))
        b.across((x[0], x[1]), (0.0, 0.33), rear + 0.02, TYRE, False)
        b.across((x[0], x[1]), (0.0, 0.3), front - 0.06, TYRE, True)
    b.across((-half + 0.05, half - 0.05), (0.25, 0.46), rear - 0.012, LOWER, False)
    b.across((-0.27, 0.27), (0.52, 0.64) if kind != 1 else (0.6, 0.72), rear - 0.015, PLATE, False)
    tall = (0.3, 0.17, 0.35, 0.3, 0.5)[kind]
    for sign in (1, -1):
        x = sorted((sign * (half - 0.06), sign * (half - (0.2 if kind != 1 else 0.4))))
        b.across((x[0], x[1]), (belt - 0.08 - tall, belt - 0.08), rear - 0.016, TAIL, False)
        x = sorted((sign * (half - 0.08), sign * (half - 0.42)))
        b.across((x[0], x[1]), (nose - 0.22, nose - 0.06), front + 0.012, LAMP, True, front - 0.03)
    # front
    b.across((-half + 0.45, half - 0.45), (nose - 0.24, nose - 0.08), front + 0.01, TRIM, True, front - 0.03)
    b.across((-half + 0.12, half - 0.12), (0.3, 0.46), front + 0.008, LOWER, True)
    b.across((-0.26, 0.26), (0.42, 0.53), front + 0.014, PLATE, True)
    _wheels(b, [rear + length * 0.19, front - length * 0.2], half, 0.32 if kind < 3 else 0.36)
    for sign in (1, -1):
        x = sorted((sign * half, sign * (half + 0.17)))
        b.box((x[0], x[1]), (belt + 0.02, belt + 0.14), (z1 - 0.45, z1 - 0.36), BODY)
    return b.build(), length, 2 * half, top


@lru_cache(maxsize=32)
def truck(variant: int) -> tuple[Template, float, float, float]:
    """A box truck: cab, cargo body in parts, rear doors."""
    rng = np.random.default_rng(9100 + variant)
    cargo, half, top = rng.uniform(4.2, 7.5), rng.uniform(1.1, 1.25), rng.uniform(2.8, 3.7)
    cab = rng.uniform(2.4, 2.9)
    length = cargo + 2.1
    rear, front = -length / 2, length / 2
    b = Builder(TRUCK)
    parts = max(2, round(cargo / 2.5))
    edges = np.linspace(rear, rear + cargo, parts + 1)
    for i in range(parts):
        b.part = float(edges[i] + edges[i + 1]) / 2
        z = (float(edges[i]), float(edges[i + 1]))
        b.box((-half + 0.12, half - 0.12), (0.45, 0.8), z, TRIM)
        b.box((-half, half), (0.8, top), z, ACCENT)
        b.sides(half + 0.004, [(z[0], 0.8), (z[1], 0.8), (z[1], 0.92), (z[0], 0.92)], LOWER)
        b.sides(half + 0.006, [(z[0], top - 0.12), (z[1], top - 0.12), (z[1], top), (z[0], top)], LOWER)
        b.sides(half + 0.005, [(z[0], 1.35), (z[1], 1.35), (z[1], 1.9), (z[0], 1.9)], EXTRA)
        if i == 0:
            b.across((-half + 0.06, half - 0.06), (0.86, top - 0.1), rear - 0.01, UPPER, False)
            b.across((-0.02, 0.02), (0.86, top - 0.1), rear - 0.02, TRIM, False)
            for x in (-half * 0.55, half * 0.55):
                b.across((x - 0.02, x + 0.02), (0.9, top - 0.15), rear - 0.02, RIM, False)
            b.across((-half, half), (0.48, 0.66), rear - 0.03, TRIM, False)
            for sign in (1, -1):
                x2 = sorted((sign * (half - 0.05), sign * (half - 0.35)))
                b.across((x2[0], x2[1]), (0.5, 0.63), rear - 0.04, TAIL, False)
            b.across((-0.27, 0.27), (0.5, 0.62), rear - 0.04, PLATE, False)
            for sign in (1, -1):
                x2 = sorted((sign * (half - 0.08), sign * (half - 0.6)))
                b.across((x2[0], x2[1]), (0.0, 0.5), rear + 0.9, TYRE, False)
            _wheels(b, [rear + 1.3], half - 0.03, 0.46, False)
    b.part = front - 1.0
    hw = half - 0.06
    z0 = rear + cargo + 0.15
    b.prism(
        [(z0, 0.45), (front, 0.4), (front, 1.25), (front - 0.25, cab), (z0, cab)],
        hw,
        BODY,
        [TRIM, BODY, BODY, UPPER, BODY],
        skip=(0,),
    )
    b.sides(
        hw + 0.006,
        [(front - 1.15, 1.35), (front - 0.14, 1.3), (front - 0.3, cab - 0.25), (front - 1.15, cab - 0.25)],
        GLASS,
    )
    b.across((-hw + 0.1, hw - 0.1), (1.32, cab - 0.2), front + 0.005, GLASS, True, front - 0.2)
    b.across((-hw + 0.05, hw - 0.05), (0.42, 0.7), front + 0.01, TRIM, True)
    b.across((-hw + 0.5, hw - 0.5), (0.8, 1.15), front + 0.01, TRIM, True)
    for sign in (1, -1):
        x2 = sorted((sign * (hw - 0.05), sign * (hw - 0.4)))
        b.across((x2[0], x2[1]), (0.72, 0.9), front + 0.015, LAMP, True)
        x2 = sorted((sign * hw, sign * (hw + 0.25)))
        b.box((x2[0], x2[1]), (1.6, 2.1), (front - 0.35, front - 0.22), TRIM)
    _wheels(b, [front - 1.1], hw, 0.46, True)
    return b.build(), length, 2 * half, top


def _coach(
    cls: int,
    length: float,
    half: float,
    top: float,
    part_length: float,
    sill: float,
    waist: float,
    head: float,
    doors: bool,
) -> Builder:
    """Body shared by buses and trams: parts with a window band, pillars, skirts and a roof edge."""
    b = Builder(cls)
    parts = max(2, round(length / part_length))
    edges = np.linspace(-length / 2, length / 2, parts + 1)
    for i in range(parts):
        z0, z1 = float(edges[i]), float(edges[i + 1])
        b.part = (z0 + z1) / 2
        b.box((-half, half), (sill, top), (z0, z1), BODY)
        b.sides(half + 0.004, [(z0, sill), (z1, sill), (z1, sill + 0.35), (z0, sill + 0.35)], LOWER)
        b.sides(half + 0.004, [(z0, sill + 0.35), (z1, sill + 0.35), (z1, sill + 0.6), (z0, sill + 0.6)], ACCENT)
        b.sides(half + 0.004, [(z0, head + 0.12), (z1, head + 0.12), (z1, top), (z0, top)], UPPER)
        b.sides(half + 0.006, [(z0, waist), (z1, waist), (z1, head), (z0, head)], GLASS)
        for z in (z0, (z0 + z1) / 2):
            b.sides(half + 0.008, [(z, waist), (z + 0.07, waist), (z + 0.07, head), (z, head)], TRIM)
        if doors and i % 2 == 0:
            z = z0 + (z1 - z0) * 0.3
            w = 1.25
            x = half + 0.01
            b.face([(x, sill + 0.05, z), (x, sill + 0.05, z + w), (x, head + 0.05, z + w), (x, head + 0.05, z)], TRIM)
            for k in (0.06, w / 2 + 0.03):
                zz = z + k
                b.face([(x + 0.004, sill + 0.2, zz), (x + 0.004, sill + 0.2, zz + w / 2 - 0.09),
                        (x + 0.004, head - 0.05, zz + w / 2 - 0.09), (x + 0.004, head - 0.05, zz)], GLASS)  # fmt: skip
    return b


@lru_cache(maxsize=16)
def bus(variant: int) -> tuple[Template, float, float, float]:
    """A city bus, single or (odd variants) longer."""
    length, half, top = (11.8 if variant % 3 else 9.0), 1.26, 3.05 + 0.1 * (variant % 2)
    b = _coach(BUS, length, half, top, 2.9, 0.32, 1.15, 2.45, True)
    rear, front = -length / 2, length / 2
    parts = max(2, round(length / 2.9))
    half_part = length / parts / 2
    b.part = rear + half_part
    b.across((-half + 0.15, half - 0.15), (1.5, 2.5), rear - 0.01, GLASS, False)
    b.across((-half + 0.2, half - 0.2), (0.7, 1.3), rear - 0.01, LOWER, False)
    b.across((-0.5, 0.3), (2.58, 2.8), rear - 0.015, TRIM, False)
    b.across((-0.27, 0.27), (0.5, 0.62), rear - 0.015, PLATE, False)
    for sign in (1, -1):
        x = sorted((sign * (half - 0.04), sign * (half - 0.2)))
        b.across((x[0], x[1]), (0.65, 1.2), rear - 0.015, TAIL, False)
        x = sorted((sign * (half - 0.05), sign * (half - 0.5)))
        b.across((x[0], x[1]), (0.0, 0.34), rear + 0.6, TYRE, False)
        b.across((x[0], x[1]), (0.0, 0.34), front - 0.6, TYRE, True)
    _wheels(b, [rear + half_part * 1.35], half, 0.48)
    b.part = front - half_part
    b.across((-half + 0.06, half - 0.06), (1.0, 2.5), front + 0.01, GLASS, True)
    b.across((-half + 0.1, half - 0.1), (2.55, 2.9), front + 0.012, TRIM, True)
    b.across((-half + 0.35, half - 0.4), (2.62, 2.82), front + 0.015, LAMP, True)
    b.across((-half, half), (0.32, 0.55), front + 0.012, LOWER, True)
    for sign in (1, -1):
        x = sorted((sign * (half - 0.08), sign * (half - 0.4)))
        b.across((x[0], x[1]), (0.6, 0.8), front + 0.015, LAMP, True)
        x = sorted((sign * half, sign * (half + 0.22)))
        b.box((x[0], x[1]), (1.9, 2.4), (front - 0.05, front + 0.12), TRIM)
    _wheels(b, [front - half_part * 0.95], half, 0.48)
    return b.build(), length, 2 * half, top


@lru_cache(maxsize=16)
def tram(variant: int) -> tuple[Template, float, float, float]:
    """A low-floor tram with rounded ends, roof boxes and a pantograph."""
    length, half, top = (21.0, 27.0)[variant % 2], 1.2, 3.35
    b = _coach(TRAIN, length, half, top, 3.4, 0.22, 1.05, 2.55, variant % 3 != 2)
    rear, front = -length / 2, length / 2
    parts = max(2, round(length / 3.4))
    half_part = length / parts / 2
    for end, forward in ((rear, False), (front, True)):
        sign = 1.0 if forward else -1.0
        b.part = end - sign * half_part
        z = end + sign * 0.01
        b.across((-half + 0.12, half - 0.12), (1.15, 2.6), z, GLASS, forward)
        b.across((-half + 0.2, half - 0.2), (2.7, 3.0), z, TRIM, forward)
        b.across((-0.6, 0.6), (2.76, 2.94), z + sign * 0.005, LAMP, forward)
        b.across((-half, half), (0.22, 0.6), z, LOWER, forward)
        for side in (1, -1):
            x = sorted((side * (half - 0.1), side * (half - 0.4)))
            b.across((x[0], x[1]), (0.75, 0.92), z + sign * 0.005, LAMP if forward else TAIL, forward)
    for roof in (-length * 0.3, length * 0.12):
        b.part = roof
        b.box((-0.8, 0.8), (top, top + 0.35), (roof - 1.3, roof + 1.3), RIM)
    zc = -length * 0.08
    for bar in (-0.5, 0.5):
        b.stick((bar, top, zc), (bar, top + 0.7, zc + 0.6), 0.03, 0.03, TRIM)
        b.stick((bar, top + 0.7, zc + 0.6), (bar, top + 1.3, zc), 0.03, 0.03, TRIM)
    b.stick((-0.7, top + 1.32, zc), (0.7, top + 1.32, zc), 0.03, 0.03, TRIM)
    return b.build(), length, 2 * half, top + 0.3


_CAR_PAINT = np.array(
    [(196, 198, 200), (150, 153, 156), (96, 99, 103), (52, 54, 58), (28, 29, 32), (232, 232, 228), (60, 72, 96),
     (38, 52, 84), (128, 34, 32), (160, 152, 138), (72, 84, 72), (176, 178, 178), (205, 60, 40), (96, 74, 56),
     (214, 196, 120), (88, 120, 150)],
    float,
)  # fmt: skip
_BRIGHT = np.array(
    [
        (196, 44, 40),
        (224, 186, 52),
        (60, 96, 150),
        (228, 228, 222),
        (176, 178, 180),
        (70, 120, 84),
        (232, 130, 40),
        (120, 40, 60),
    ],
    float,
)


def vehicle_palette(rng: np.random.Generator, bright: bool) -> np.ndarray:
    """Colours of one vehicle, [S, 3] RGB; ``bright`` for liveries of buses, trams and trucks."""
    paints = _BRIGHT if bright else _CAR_PAINT
    body = np.clip(paints[rng.integers(len(paints))] + rng.normal(0, 8, 3), 8, 245)
    if bright and rng.random() < 0.35:
        body = np.clip(_CAR_PAINT[rng.integers(len(_CAR_PAINT))] + 20, 0, 250)
    p = np.zeros((SLOTS, 3))
    p[BODY], p[LOWER], p[UPPER] = body, body * rng.uniform(0.35, 0.7), np.clip(body * 1.13 + 8, 0, 250)
    glass = rng.uniform(25, 70)
    p[GLASS] = (glass * 0.9, glass, glass * 1.12)
    p[GLOSS] = p[GLASS] * 0.5 + np.array((88, 96, 108)) * rng.uniform(0.4, 1.2)
    p[TYRE], p[RIM], p[TRIM] = (26, 26, 28), np.full(3, rng.uniform(70, 190)), (34, 35, 38)
    p[LAMP], p[TAIL], p[PLATE] = (225, 225, 215), np.array((146, 22, 20)) * rng.uniform(0.6, 1.1), (216, 214, 196)
    p[ACCENT] = paints[rng.integers(len(paints))] * 0.9 + 15
    p[EXTRA] = p[ACCENT] if rng.random() < 0.5 else _BRIGHT[rng.integers(len(_BRIGHT))]
    if bright and rng.random() < 0.5:
        p[ACCENT] = body * 0.8
    return p
