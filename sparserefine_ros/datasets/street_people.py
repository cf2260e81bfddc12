"""People as articulated sticks: walking, standing, riding. Sizes as fractions of body height."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

PERSON, RIDER = 11, 12

_SKIN = np.array([(224, 184, 158), (198, 150, 120), (150, 106, 80), (104, 72, 54)], float)
_HAIR = np.array([(40, 32, 28), (84, 62, 44), (26, 24, 24), (170, 140, 96), (150, 148, 146)], float)
_CLOTH = np.array(
    [
        (38, 40, 46),
        (58, 62, 76),
        (34, 44, 70),
        (120, 118, 114),
        (176, 174, 168),
        (110, 42, 42),
        (70, 84, 60),
        (150, 120, 84),
        (200, 196, 190),
        (60, 92, 130),
        (176, 60, 50),
        (90, 70, 60),
        (196, 160, 60),
        (96, 60, 96),
    ],
    float,
)


class Person(NamedTuple):
    """How somebody looks; drawn once from a generator, posed in every frame."""

    height: float  # metres
    skin: np.ndarray
    hair: np.ndarray
    top: np.ndarray
    trousers: np.ndarray
    shoes: np.ndarray
    build: float  # width factor
    extra: int  # 0 nothing, 1 backpack, 2 skirt, 3 coat, 4 bag, 5 umbrella
    pace: float  # strides per second


def make_person(rng: np.random.Generator) -> Person:
    """A person of random build and clothes; one in eight is a child."""
    height = rng.normal(1.73, 0.08) if rng.random() > 0.12 else rng.uniform(1.05, 1.4)
    top, trousers = _CLOTH[rng.integers(len(_CLOTH))], _CLOTH[rng.integers(8)]
    return Person(
        float(np.clip(height, 1.0, 1.98)),
        _SKIN[rng.integers(4)],
        _HAIR[rng.integers(5)],
        np.clip(top + rng.normal(0, 10, 3), 5, 245),
        np.clip(trousers + rng.normal(0, 8, 3), 5, 245),
        np.full(3, rng.uniform(20, 120)),
        rng.uniform(0.9, 1.2),
        int(rng.choice(6, p=[0.4, 0.16, 0.14, 0.16, 0.11, 0.03])),
        rng.uniform(0.8, 1.05),
    )


def pose(
    person: Person, at: tuple[float, float], yaw: float, phase: float, mode: str = "walk"
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Sticks of one person: ends [M, 2, 3], radii [M, 2], RGB [M, 3], classes [M]; balls have equal ends.

    ``at`` = (X, Z) on the ground, ``yaw`` the heading, ``phase`` the gait in radians, ``mode`` walk, stand, ride (a
    bicycle) or drive (a motorcycle).
    """
    h, w = person.height, person.build
    limbs: list[tuple[tuple[float, float, float], tuple[float, float, float], float, float, np.ndarray]] = []
    swing = np.sin(phase) * (0.37 if mode == "walk" else 0.06)
    wide = w * (0.68 + 0.32 * abs(np.cos(yaw)))
    if mode in ("walk", "stand"):
        lean, hip, shoulder = 0.0, 0.5, 0.81
        for side, a in ((-1.0, -swing), (1.0, swing)):
            knee_bend = max(0.0, -a) * 0.9
            knee = (side * 0.05, hip - 0.245 * np.cos(a), 0.245 * np.sin(a))
            foot = (
                side * 0.052,
                max(0.03, knee[1] - 0.235 * np.cos(a - knee_bend)),
                knee[2] + 0.235 * np.sin(a - knee_bend),
            )
            limbs.append(
                (
                    (side * 0.045, hip + 0.02, 0.0),
                    knee,
                    0.052 * w,
                    0.042 * w,
                    person.trousers * (0.86 if side < 0 else 1.0),
                )
            )
            limbs.append((knee, foot, 0.042 * w, 0.028, person.trousers * (0.8 if side < 0 else 0.95)))
            limbs.append((foot, (foot[0], 0.02, foot[2] + 0.075), 0.026, 0.022, person.shoes))
        neck_z = 0.0
    else:
        upright = 0.12 if mode == "ride" else 0.05
        hip, lean = (0.55, -0.12) if mode == "ride" else (0.5, -0.14)
        shoulder, neck_z = hip + 0.3, lean + upright
        for side in (-1.0, 1.0):
            a = phase + (np.pi if side > 0 else 0.0)
            foot = (
                (side * 0.06, 0.17 + 0.09 * np.sin(a), 0.0 + 0.09 * np.cos(a))
                if mode == "ride"
                else (side * 0.11, 0.16, 0.02)
            )
            knee = (side * 0.075, (hip + foot[1]) / 2 + 0.1, 0.16 + 0.02 * np.cos(a))
            limbs.append(
                ((side * 0.05, hip, lean), knee, 0.055 * w, 0.042 * w, person.trousers * (0.86 if side < 0 else 1.0))
            )
            limbs.append((knee, foot, 0.042 * w, 0.03, person.trousers * 0.92))
            limbs.append((foot, (foot[0], foot[1] - 0.015, foot[2] + 0.07), 0.026, 0.022, person.shoes))
    z_top = neck_z
    for side in (-1.0, 1.0):
        root = (side * 0.105 * wide, shoulder - 0.01, z_top)
        if mode in ("walk", "stand"):
            a = side * -swing * 0.8
            elbow = (side * 0.13 * wide, shoulder - 0.17, 0.16 * np.sin(a))
            hand = (side * 0.125 * wide, shoulder - 0.32, elbow[2] + 0.16 * np.sin(a + 0.35))
        else:
            elbow = (side * 0.16, shoulder - 0.15, z_top + 0.1)
            hand = (side * 0.14, shoulder - 0.2, z_top + 0.26)
        limbs.append((root, elbow, 0.034 * w, 0.028, person.top * (0.82 if side < 0 else 0.94)))
        limbs.append((elbow, hand, 0.028, 0.02, person.top * 0.9))
        limbs.append((hand, hand, 0.022, 0.026, person.skin))
    limbs.append(
        (
            (0.0, hip - 0.01, lean),
            (0.0, hip + 0.14, (lean * 2 + z_top) / 3),
            0.088 * wide,
            0.086 * wide,
            person.top * 0.92,
        )
    )
    limbs.append(
        (
            (0.0, hip + 0.12, (lean * 2 + z_top) / 3),
            (0.0, shoulder + 0.005, z_top),
            0.088 * wide,
            0.108 * wide,
            person.top,
        )
    )
    if mode in ("walk", "stand"):
        if person.extra == 2:
            limbs.append(((0.0, hip + 0.1, 0.0), (0.0, hip - 0.2, 0.0), 0.08 * wide, 0.125 * wide, person.trousers))
        elif person.extra == 3:
            limbs.append(
                ((0.0, shoulder - 0.1, 0.0), (0.0, hip - 0.14, 0.0), 0.1 * wide, 0.112 * wide, person.top * 0.96)
            )
        elif person.extra == 4:
            limbs.append(
                ((0.15 * wide, hip - 0.02, 0.0), (0.15 * wide, hip - 0.13, 0.0), 0.05, 0.06, person.shoes * 1.2)
            )
    if person.extra == 1:
        limbs.append(
            ((0.0, hip + 0.1, lean - 0.09), (0.0, shoulder - 0.02, z_top - 0.08), 0.08, 0.07, person.shoes + 30.0)
        )
    limbs.append(((0.0, shoulder, z_top), (0.0, shoulder + 0.05, z_top + 0.005), 0.034, 0.03, person.skin * 0.85))
    head_y = shoulder + 0.115
    head = (0.0, head_y, z_top + 0.012)
    limbs.append((head, head, 0.05, 0.066, person.skin))
    up = (0.0, head_y + 0.018, z_top + 0.002)
    cover = person.hair if mode in ("walk", "stand") else person.top * 0.5 + 40.0
    away = np.cos(yaw) > 0.0  # we see the back of the head
    limbs.append((up, up, 0.053, 0.056 if away else 0.045, cover))
    if mode == "drive":
        limbs.append((head, head, 0.068, 0.078, cover))
    if person.extra == 5 and mode == "walk":
        top = (0.0, 1.17, 0.05)
        limbs.append(((0.1, 0.62, 0.08), top, 0.008, 0.008, person.shoes))
        limbs.append(((0.0, 1.08, 0.05), (0.0, 1.2, 0.05), 0.32, 0.06, person.trousers * 0.7 + 40.0))
    m = len(limbs)
    ends = np.array([(a, b) for a, b, _, _, _ in limbs]).reshape(m, 2, 3) * h
    c, s = np.cos(yaw), np.sin(yaw)
    turn = np.array([[c, 0.0, -s], [0.0, 1.0, 0.0], [s, 0.0, c]])
    ends = ends @ turn + np.array([at[0], 0.0, at[1]])
    radius = np.array([(ra, rb) for _, _, ra, rb, _ in limbs]) * h
    rgb = np.array([colour for _, _, _, _, colour in limbs])
    return ends, radius, rgb, np.full(m, PERSON if mode in ("walk", "stand") else RIDER)
