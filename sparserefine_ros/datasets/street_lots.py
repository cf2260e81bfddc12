"""Lots along the street: rows of buildings, houses with gardens, parks and yards, and what stands on them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparserefine_ros.datasets.street_shapes import Group, Surface
from sparserefine_ros.datasets.street_style import BLOCK, Side, Style, generator

BUILDING, WALL, FENCE, POLE, VEGETATION = 2, 3, 4, 5, 8


@dataclass
class Lot:
    """Ground between the property line and whatever stands behind it, on one side."""

    s0: float
    s1: float
    ground: str  # grass, pavement, gravel


class LotMaker:
    """Places what lines one block; ``sign`` is +1 on the right, -1 on the left."""

    def __init__(self, style: Style, k: int) -> None:
        self.style, self.k = style, k
        self.rng = generator(style.seed, BLOCK, k)
        self.group = Group()
        self.s0 = k * style.block
        self.s1 = self.s0 + style.block
        self.first = self.s0 + style.crossing + 2.5  # end of the intersection and its cross pavements
        self.last = self.s1 - 2.5

    # -- helpers -------------------------------------------------------------------------------------------------

    def _yaw(self, s: float, sign: float) -> float:
        """Heading that makes local -x of a piece of furniture point to the road's middle."""
        return self.style.yaw_at(s) + (0.0 if sign > 0 else np.pi)

    def _shadow(self, t: float, s: float, width: float, height: float, length: float = 0.3) -> None:
        """The shadow of an upright thing on the ground, as a quadrilateral."""
        base = self.style.world(t, s)[[0, 2]]
        tip = base + self.style.light.shadow_offset(height)
        along = tip - base
        norm = max(float(np.hypot(*along)), 1e-6)
        side = np.array([-along[1], along[0]]) / norm * (width / 2)
        self.group.shadows.append(np.array([base - side, base + side, tip + side, tip - side]))

    def _blob(self, centre: np.ndarray, rx: float, rz: float) -> None:
        angle = np.arange(12) * (np.pi / 6)
        self.group.shadows.append(centre + np.stack([rx * np.cos(angle), rz * np.sin(angle)], 1))

    def _box_shadow(self, t0: float, t1: float, s0: float, s1: float, height: float) -> None:
        corners = self.style.world(np.array([t0, t1, t1, t0]), np.array([s0, s0, s1, s1]))[:, [0, 2]]
        moved = corners + self.style.light.shadow_offset(height)
        for i in range(4):
            j = (i + 1) % 4
            self.group.shadows.append(np.array([corners[i], corners[j], moved[j], moved[i]]))
        self.group.shadows.append(moved)

    def _flat(
        self,
        a: tuple[float, float, float],
        b: tuple[float, float, float],
        low: float,
        high: float,
        texture: tuple[object, ...],
        cls: int,
        key: float,
        normal_t: float,
    ) -> None:
        """An upright textured surface from (t, s) a to b, standing between the heights low and high."""
        wa, wb = self.style.world(a[0], a[1], high), self.style.world(b[0], b[1], high)
        along = wb - wa
        normal = np.array([along[2], 0.0, -along[0]])
        normal /= max(float(np.linalg.norm(normal)), 1e-9)
        if normal[0] * normal_t < 0 or (normal_t == 0 and normal[2] > 0):
            normal = -normal
        shade = float(self.style.light.shade(normal[None])[0])
        self.group.surface(Surface(wa, along, np.array([0.0, low - high, 0.0]), texture, cls, shade), key)

    # -- lots ----------------------------------------------------------------------------------------------------

    def _lots(self, sign: float, side: Side) -> list[Lot]:
        lots: list[Lot] = []
        s, style, rng = self.first, self.style, self.rng
        kinds = ["row", "house", "park", "yard"]
        weight = np.array([0.35 + 0.6 * style.tall, 0.6 - 0.5 * style.tall, 0.14, 0.2])
        while s < self.last - 4.0:
            kind = str(rng.choice(kinds, p=weight / weight.sum()))
            length = float(
                {
                    "row": rng.uniform(9, 22),
                    "house": rng.uniform(13, 20),
                    "park": rng.uniform(14, 30),
                    "yard": rng.uniform(10, 22),
                }[kind]
            )
            end = min(s + length, self.last)
            if self.last - end < 5.0:
                end = self.last
            if len(lots) == 1 and sign > 0:
                kind = "yard"  # every block has a wall
            lots.append(getattr(self, f"_{kind}")(sign, side.line, s, end))
            s = end
        return lots

    def _front(
        self, sign: float, t: float, s0: float, s1: float, height_floors: int, ground: float, shop: bool
    ) -> None:
        """A building from (t, s0) to (t, s1) with depth, roof and its textured front."""
        rng, style = self.rng, self.style
        bay, floor = float(rng.uniform(2.2, 3.4)), float(rng.uniform(2.8, 3.4))
        bays = max(1, round((s1 - s0) / bay))
        bay = (s1 - s0) / bays
        glassy = bool(style.tall > 0.5 and rng.random() < 0.22)
        height = ground + height_floors * floor
        texture = (
            "facade",
            int(rng.integers(1 << 30)),
            bays,
            height_floors,
            round(bay, 3),
            round(floor, 3),
            round(ground, 3),
            shop,
            glassy,
            style.night,
        )
        depth = float(rng.uniform(8, 13))
        back = t + sign * depth
        side_bays = max(1, round(depth / 3.2))
        flank = (
            "facade",
            int(rng.integers(1 << 30)) if rng.random() < 0.4 else texture[1],
            side_bays,
            height_floors,
            round(depth / side_bays, 3),
            round(floor, 3),
            round(ground, 3),
            False,
            glassy,
            style.night,
        )
        self._flat((t, s0, 0), (back, s0, 0), 0.0, height, flank, BUILDING, s1, 0.0)
        roof = np.array([(132, 76, 60), (98, 92, 90), (118, 104, 96), (78, 74, 78)][int(rng.integers(4))]) + rng.normal(
            0, 10, 3
        )
        if height_floors < 6 and rng.random() < 0.8:
            rise = float(rng.uniform(1.8, 3.6))
            w = style.world
            mid = (t + back) / 2
            eave = t - sign * 0.35
            slope = np.array(
                [w(eave, s0, height), w(eave, s1, height), w(mid, s1, height + rise), w(mid, s0, height + rise)]
            )
            normal = np.array([-sign * rise, depth / 2, 0.0])
            normal /= np.linalg.norm(normal)
            gable = np.array([w(t, s0, height), w(back, s0, height), w(mid, s0, height + rise)])
            shade = style.light.shade(np.array([normal, (0.0, 0.0, -1.0)]))
            self.group.polygon(gable, (0, 0, -1), (roof * 0.5 + 80) * shade[1], BUILDING, s1)
            self.group.polygon(slope, normal, roof * shade[0], BUILDING, s1, True)
            for _ in range(int(rng.integers(0, 3))):  # chimneys and dormers
                c = (s0 + s1) / 2 + float(rng.uniform(-0.35, 0.35)) * (s1 - s0)
                tt, hh = t + sign * depth * 0.28, height + rise * 0.4
                a, b = w(tt, c - 0.5, hh), w(tt, c + 0.5, hh)
                up = np.array([0, 1.5, 0])
                self.group.polygon(
                    np.array([a, b, b + up, a + up]),
                    (-sign, 0, 0),
                    (roof * 0.6 + 50) * float(style.light.shade(np.array([[-sign, 0.0, 0.0]]))[0]),
                    BUILDING,
                    s1,
                    True,
                )
                e = w(tt + sign * 0.8, c - 0.5, hh)
                self.group.polygon(
                    np.array([a, e, e + up, a + up]), (0, 0, -1), (roof * 0.6 + 50) * shade[1], BUILDING, s1
                )
        self._flat((t, s0, 0), (t, s1, 0), 0.0, height, texture, BUILDING, s1, -sign)
        if style.light.sun_power > 0.05:
            self._box_shadow(t, back, s0, s1, height)

    def _row(self, sign: float, line: float, s0: float, s1: float) -> Lot:
        rng, style = self.rng, self.style
        floors = int(np.clip(rng.normal(1.5 + 4 * style.tall, 1.1), 1, 9))
        shop = bool(rng.random() < 0.3 + 0.4 * style.tall)
        self._front(
            sign, sign * line, s0, s1 - (0.0 if rng.random() < 0.8 else 1.2), floors, float(rng.uniform(3.2, 4.2)), shop
        )
        return Lot(s0, s1, "pavement")

    def _house(self, sign: float, line: float, s0: float, s1: float) -> Lot:
        rng = self.rng
        setback = float(rng.uniform(3.0, 6.0))
        self._boundary(sign, line, s0, s1, int(rng.integers(5)))
        self._front(
            sign,
            sign * (line + setback),
            s0 + rng.uniform(1, 2.5),
            s1 - rng.uniform(1, 2.5),
            int(rng.integers(1, 3)),
            3.0,
            False,
        )
        for _ in range(int(rng.integers(0, 3))):
            self._tree(
                sign * (line + rng.uniform(1.0, setback - 0.8)),
                float(rng.uniform(s0 + 1, s1 - 1)),
                float(rng.uniform(2.0, 4.5)),
            )
        return Lot(s0, s1, "grass" if rng.random() < 0.7 else "gravel")

    def _park(self, sign: float, line: float, s0: float, s1: float) -> Lot:
        rng = self.rng
        if rng.random() < 0.65:
            self._boundary(sign, line, s0, s1, int(rng.integers(5)))
        for _ in range(int((s1 - s0) / 2.6)):
            self._tree(sign * (line + rng.uniform(1.5, 16)), float(rng.uniform(s0, s1)), float(rng.uniform(4.5, 10)))
        self._hedge(sign * (line + 18), s0, s1, 4.0)
        return Lot(s0, s1, "grass")

    def _yard(self, sign: float, line: float, s0: float, s1: float) -> Lot:
        rng = self.rng
        self._boundary(sign, line, s0, s1, int(rng.choice([1, 2, 3])) if sign < 0 else 3)
        if rng.random() < 0.7:
            self._front(sign, sign * (line + rng.uniform(9, 14)), s0, s1, int(rng.integers(1, 4)), 3.4, False)
        else:
            self._hedge(sign * (line + 14), s0, s1, 5.0)
        for _ in range(int(rng.integers(1, 4))):
            self._tree(
                sign * (line + rng.uniform(1.5, 8)), float(rng.uniform(s0 + 1, s1 - 1)), float(rng.uniform(3.5, 8))
            )
        return Lot(s0, s1, "gravel" if rng.random() < 0.5 else "grass")

    def _boundary(self, sign: float, line: float, s0: float, s1: float, kind: int) -> None:
        """Hedge (0), fence (1, 2), wall (3) or wall with a fence on it (4) along the property line, with a gate gap."""
        rng, t = self.rng, sign * line
        seed = int(rng.integers(1 << 30))
        height = float(rng.uniform(0.9, 1.9))
        fence = int(rng.choice(6, p=[0.24, 0.22, 0.22, 0.14, 0.08, 0.1]))
        wall = int(rng.integers(4))
        gap = float(rng.uniform(s0 + 1, max(s1 - 4, s0 + 1.5))) if kind != 3 or rng.random() < 0.5 else 1e9
        a = s0
        while a < s1 - 0.2:
            b = min(a + 5.5, s1, gap if gap > a + 0.2 else 1e9)
            if kind == 0:
                self._hedge(t, a, b, height)
            elif kind in (1, 2):
                high = 0.85 if fence == 4 else 2.0 if fence == 5 else height
                self._flat(
                    (t, a, 0),
                    (t, b, 0),
                    0.0,
                    high,
                    ("fence", seed, fence, round(b - a, 2), round(high, 2)),
                    FENCE,
                    b,
                    -sign,
                )
            else:
                high = height * 1.15 if kind == 3 else 0.7
                self._flat(
                    (t, a, 0),
                    (t, b, 0),
                    0.0,
                    high,
                    ("wall", seed, wall, round(b - a, 2), round(high, 2)),
                    WALL,
                    b,
                    -sign,
                )
                if kind == 4:
                    self._flat(
                        (t, a, 0),
                        (t, b, 0),
                        0.7,
                        1.7,
                        ("fence", seed, int(fence % 3), round(b - a, 2), 1.0),
                        FENCE,
                        b,
                        -sign,
                    )
                else:  # the end that faces the camera
                    self._flat(
                        (t, a, 0),
                        (t + sign * 0.3, a, 0),
                        0.0,
                        high,
                        ("wall", seed, wall, 0.5, round(high, 2)),
                        WALL,
                        b,
                        0.0,
                    )
            if self.style.light.sun_power > 0.05:
                self._box_shadow(t, t + sign * 0.2, a, b, height)
            a = b
            if abs(a - gap) < 1e-6:
                a += 2.2

    def _hedge(self, t: float, s0: float, s1: float, height: float) -> None:
        colour = tuple(
            float(round(c, 1))
            for c in self.style.leaf[int(self.rng.integers(4))] * float(self.rng.choice([0.78, 0.92, 1.05]))
        )
        texture = ("hedge", int(self.rng.integers(8)), colour, round(s1 - s0, 2), round(height, 2))
        sign = 1.0 if t > 0 else -1.0
        self._flat(
            (t, s0, 0),
            (t + sign * 0.9, s0, 0),
            0.0,
            height,
            ("hedge", 3, colour, 0.9, round(height, 2)),
            VEGETATION,
            s1,
            0.0,
        )
        self._flat((t, s0, 0), (t, s1, 0), 0.0, height, texture, VEGETATION, s1, -sign)

    def _tree(self, t: float, s: float, height: float) -> None:
        rng, style = self.rng, self.style
        bare = bool(rng.random() < style.bare)
        trunk = height * float(rng.uniform(0.22, 0.36)) if height > 3 else 0.15
        variant = int(rng.integers(10))
        crown = height - trunk * 0.85
        width = crown * float(rng.uniform(0.75, 1.15)) * (0.55 if variant % 5 == 3 else 1.0)
        tone = style.leaf[int(rng.integers(4))] * float(rng.choice([0.84, 1.0, 1.12]))
        bark = np.array([(84, 72, 60), (104, 98, 88), (70, 62, 54)][int(rng.integers(3))]) + rng.normal(0, 6, 3)
        colour = tuple(float(round(c, 1)) for c in (bark if bare else tone))
        foot, radius = style.world(t, s), 0.02 * height + 0.03
        top = foot + np.array([rng.normal(0, 0.1), trunk + (0.4 if bare else crown * 0.35), 0.0])
        fork = foot + (top - foot) * 0.75
        ends = np.array(
            [
                (foot, top),
                (fork, top + np.array([0.12 * width, crown * 0.1, 0])),
                (fork, top + np.array([-0.12 * width, crown * 0.12, 0])),
            ]
        )
        radii = np.array([(radius * 1.2, radius * 0.8), (radius * 0.6, radius * 0.3), (radius * 0.6, radius * 0.3)])
        n = 1 if bare else 3
        self.group.sticks(ends[:n], radii[:n], np.tile(bark * style.light.upright, (n, 1)), np.full(n, VEGETATION), s)
        texture = ("tree", variant, bare, colour, bool(rng.random() < 0.5))
        bottom = foot + np.array([0.0, trunk * 0.85, 0.0])
        light = style.light.ambient + style.light.sun_power * (0.6 - 0.35 * style.light.sun[2])
        self.group.surface(
            Surface(bottom, np.array([width, crown, 0.0]), np.zeros(3), texture, VEGETATION, float(light), True),
            s - 0.01,
        )
        if style.light.sun_power > 0.05:
            centre = foot[[0, 2]] + style.light.shadow_offset(trunk + crown * 0.5)
            self._blob(centre, width * 0.5, width * 0.62)
            self._shadow(t, s, radius * 2.4, trunk + crown * 0.4)
