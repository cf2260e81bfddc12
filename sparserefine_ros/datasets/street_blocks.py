"""The static world, block by block: an intersection, then lots with buildings, gardens and street furniture.

Block k covers s in [k L, (k + 1) L) and is a pure function of (style, k), so a drive can be entered anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparserefine_ros.datasets import street_props as props
from sparserefine_ros.datasets.street_lots import FENCE, Lot, LotMaker
from sparserefine_ros.datasets.street_people import make_person, pose
from sparserefine_ros.datasets.street_shapes import Group, Template
from sparserefine_ros.datasets.street_style import BLOCK, Side, Style, generator
from sparserefine_ros.datasets.street_vehicles import CAR_VARIANTS, bus, car, truck, vehicle_palette

CROSSING_MARGIN = 4.0  # metres kept free of parked cars around an intersection


@dataclass
class Block:
    """One finished block."""

    group: Group
    lots: tuple[list[Lot], list[Lot]]  # right, left


class BlockMaker(LotMaker):
    """Fills one block: lots, then furniture, parked vehicles, people who stand about, and its intersection."""

    def make(self) -> Block:
        """The whole block."""
        right = self._lots(1.0, self.style.right)
        left = self._lots(-1.0, self.style.left)
        for sign, side in ((1.0, self.style.right), (-1.0, self.style.left)):
            self._furniture(sign, side)
            self._parking(sign, side)
            self._standing(sign, side)
        self._intersection()
        self._median()
        self._complete()
        return Block(self.group, (right, left))

    # -- street furniture ----------------------------------------------------------------------------------------

    def _furniture(self, sign: float, side: Side) -> None:
        rng, style = self.rng, self.style
        kerb = sign * (side.kerb + 0.55)
        palette = props.furniture_palette(rng)
        light = style.light
        variant, spacing = int(rng.integers(4)), float(rng.uniform(20, 34))
        s = self.first + float(rng.uniform(2, 10))
        while s < self.last:
            self.group.place(props.lamp(variant), style.world(kerb, s), self._yaw(s, sign), palette, light, s)
            self._shadow(kerb, s, 0.15, 6.0)
            s += spacing
        if rng.random() < 0.25 and sign > 0:
            wood = palette.copy()
            wood[0] = (96, 82, 68)
            for s in np.arange(self.first + 6, self.last, 31.0):
                self.group.place(
                    props.utility_pole(int(style.seed)),
                    style.world(sign * (side.line - 0.3), s),
                    self._yaw(s, sign),
                    wood,
                    light,
                    s,
                )
        for _ in range(int(rng.integers(4, 8))):
            s = float(rng.uniform(self.first, self.last))
            kind = int(rng.integers(props.SIGN_KINDS))
            second = int(rng.integers(props.SIGN_KINDS)) if rng.random() < 0.3 else -1
            yaw = style.yaw_at(s) + rng.normal(0, 0.12) + (0.0 if sign > 0 or rng.random() < 0.4 else np.pi)
            at = sign * (side.kerb + rng.uniform(0.35, 0.8))
            self.group.place(
                props.sign_post(kind, second, int(rng.integers(4))),
                style.world(at, s),
                yaw,
                props.furniture_palette(rng),
                light,
                s,
            )
            self._shadow(at, s, 0.08, 2.4)
        if rng.random() < 0.5:
            start = float(rng.uniform(self.first, self.last - 14))
            for s in np.arange(start, start + float(rng.uniform(5, 16)), 1.6):
                self.group.place(
                    props.bollard(variant), style.world(sign * (side.kerb + 0.3), s), 0.0, palette, light, s
                )
        if rng.random() < 0.35:
            s = float(rng.uniform(self.first + 4, self.last - 4))
            self.group.place(
                props.shelter(variant), style.world(sign * (side.line - 1.6), s), self._yaw(s, sign), palette, light, s
            )
        if side.verge > 0 or rng.random() < 0.5:
            row = float(rng.uniform(7, 14)) / max(style.trees, 0.35)
            tall = float(rng.uniform(5, 9))
            place = side.kerb + 0.2 + (side.verge * 0.5 if side.verge > 0 else 0.6)
            for s in np.arange(self.first + float(rng.uniform(3, 9)), self.last, row):
                self._tree(sign * place, float(s), tall * float(rng.uniform(0.8, 1.15)))

    def _parking(self, sign: float, side: Side) -> None:
        rng, style = self.rng, self.style
        if side.parking > 0:
            t = sign * (side.kerb - side.parking / 2)
            s = self.first + CROSSING_MARGIN
            while s < self.last - CROSSING_MARGIN:
                kind, gap = rng.random(), float(rng.uniform(0.6, 1.4))
                if rng.random() > style.parked:
                    s += float(rng.uniform(4, 8))
                    continue
                if kind < 0.07:
                    s = self._cycles(t, s, True)
                    continue
                template, length, width, height = (
                    truck(int(rng.integers(24))) if kind < 0.13 else car(int(rng.integers(CAR_VARIANTS)))
                )
                if s + length > self.last - 3.0:
                    break
                centre = s + length / 2
                yaw = style.yaw_at(centre) + rng.normal(0, 0.015) + (0.0 if sign > 0 or rng.random() < 0.15 else np.pi)
                self.vehicle(
                    template,
                    length,
                    width,
                    height,
                    t + float(rng.normal(0, 0.06)),
                    centre,
                    yaw,
                    vehicle_palette(rng, kind < 0.13),
                )
                s += length + gap
        for _ in range(1 + int(rng.poisson(1.6))):  # bicycles and motorcycles on the pavement
            self._cycles(
                sign * (side.line - 0.6), float(rng.uniform(self.first, self.last - 4)), bool(rng.random() < 0.25)
            )

    def vehicle(
        self,
        template: Template,
        length: float,
        width: float,
        height: float,
        t: float,
        s: float,
        yaw: float,
        palette: np.ndarray,
    ) -> None:
        """A vehicle at (t, s) with its shadow and the dark below it."""
        place_vehicle(self.group, self.style, template, (length, width, height), t, s, yaw, palette)

    def _cycles(self, t: float, s: float, motor: bool) -> float:
        rng, style = self.rng, self.style
        for _ in range(int(rng.integers(1, 3 if motor else 5))):
            yaw = style.yaw_at(s) + float(rng.choice([np.pi / 2, 1.2, 0.1])) + rng.normal(0, 0.1)
            template = props.motorcycle(int(rng.integers(2))) if motor else props.bicycle(False, int(rng.integers(2)))
            self.group.place(template, style.world(t, s), yaw, props.cycle_palette(rng), style.light, s)
            self._blob(style.world(t, s)[[0, 2]], 0.55, 0.25)
            s += float(rng.uniform(0.6, 1.1))
        return s + 1.0

    def _standing(self, sign: float, side: Side) -> None:
        """People who stand on the pavement; the walking ones are part of the traffic."""
        rng, style = self.rng, self.style
        for _ in range(int(rng.poisson(2.2 * style.crowd))):
            s = float(rng.uniform(self.first, self.last))
            t0 = sign * float(rng.uniform(side.line - side.pavement + 0.4, side.line - 0.5))
            for _ in range(int(rng.integers(1, 4))):
                t, s2 = t0 + float(rng.normal(0, 0.35)), s + float(rng.normal(0, 0.35))
                person = make_person(rng)
                at = style.world(t, s2)
                ends, radius, rgb, cls = pose(
                    person,
                    (float(at[0]), float(at[2])),
                    float(rng.uniform(0, 2 * np.pi)),
                    float(rng.uniform(0, 6)),
                    "stand",
                )
                self.group.sticks(ends, radius, rgb * style.light.upright, cls, s2)
                self._blob(at[[0, 2]], 0.28, 0.2)
                self._shadow(t, s2, 0.4, person.height)

    def _intersection(self) -> None:
        """Traffic lights or priority signs, and vehicles that wait in the cross street."""
        rng, style = self.rng, self.style
        light = style.light
        signals = bool(self.k % 2 == 1 or rng.random() < 0.5)
        state = int(rng.integers(3))
        for sign, side in ((1.0, style.right), (-1.0, style.left)):
            for s, near in ((self.s0 - 3.0, True), (self.s0 + style.crossing + 3.4, False)):
                t = sign * (side.kerb + 0.5)
                if signals:
                    yaw = style.yaw_at(s) + (0.0 if sign > 0 or near else np.pi)
                    arm = float(np.clip(side.kerb - 1.0, 2.5, 6.0)) if sign > 0 and not near else 0.0
                    self.group.place(
                        props.traffic_light(round(arm), state, int(rng.integers(2))),
                        style.world(t, s),
                        yaw,
                        props.light_palette(rng),
                        light,
                        s,
                    )
                    self._shadow(t, s, 0.15, 3.5)
                elif near:
                    self.group.place(
                        props.sign_post(int(rng.choice([3, 4, 5])), -1, 0),
                        style.world(t, s),
                        style.yaw_at(s),
                        props.furniture_palette(rng),
                        light,
                        s,
                    )
        for sign, side in ((1.0, style.right), (-1.0, style.left)):
            s = self.s0 + style.crossing * (0.3 if sign > 0 else 0.7)
            t = side.line + float(rng.uniform(1, 4))
            for _ in range(int(rng.integers(0, 4))):
                kind = rng.random()
                template, length, width, height = (
                    bus(int(rng.integers(6)))
                    if kind < 0.08
                    else truck(int(rng.integers(24)))
                    if kind < 0.2
                    else car(int(rng.integers(CAR_VARIANTS)))
                )
                t += length / 2
                self.vehicle(
                    template, length, width, height, sign * t, s, -sign * np.pi / 2, vehicle_palette(rng, kind < 0.2)
                )
                t += length / 2 + float(rng.uniform(1.5, 9))
            for _ in range(int(rng.integers(1, 4))):
                self._tree(
                    sign * float(rng.uniform(side.line + 5, 45)),
                    self.s0 + float(rng.choice([-1.2, style.crossing + 1.4])),
                    float(rng.uniform(4, 8)),
                )

    def _complete(self) -> None:
        """Adds what chance may leave out, so that no drive lacks a class."""
        self.rng = generator(self.style.seed, BLOCK, self.k, 1)
        group, side = self.group, self.style.right
        self._cycles(side.line - 0.6, float(self.rng.uniform(self.first + 3, self.last - 6)), True)
        if FENCE not in {surface.cls for surface in group.surfaces}:  # a railing between pavement and crossing
            texture = ("fence", int(self.rng.integers(1 << 30)), 2, 4.0, 1.0)
            for s in (self.first + 4.0, self.first + 8.0):
                t = side.kerb + 0.25
                self._flat((t, s, 0), (t, s + 4.0, 0), 0.0, 1.0, texture, FENCE, s + 4.0, -1.0)

    def _median(self) -> None:
        rng, style = self.rng, self.style
        if style.median_kind == "none":
            return
        palette = props.furniture_palette(rng)
        for s in np.arange(self.first + 8.0, self.last, 26.0):
            if style.median_kind == "grass" and s + 10.0 < self.last and rng.random() < style.trees:
                self._tree(float(rng.normal(0, 0.15)), float(s) + 6.0, float(rng.uniform(4, 7)))
            self.group.place(
                props.lamp(2 if style.median_kind == "tram" else 0),
                style.world(0.0, s),
                style.yaw_at(s),
                palette,
                style.light,
                s,
            )
        if style.median_kind == "grass":
            self.group.place(
                props.sign_post(1, -1, 1),
                style.world(0.0, self.first + 0.8),
                style.yaw_at(self.first),
                palette,
                style.light,
                self.first,
            )
            if style.seed % 2:
                self._flat(
                    (0.0, self.first + 3, 0),
                    (0.0, self.last - 3, 0),
                    0.0,
                    0.8,
                    ("fence", int(style.seed), 4, 30.0, 0.8),
                    FENCE,
                    self.first + 3.0,
                    -1.0,
                )


def place_vehicle(
    group: Group,
    style: Style,
    template: Template,
    size: tuple[float, float, float],
    t: float,
    s: float,
    yaw: float,
    palette: np.ndarray,
) -> None:
    """Adds a vehicle of (length, width, height) at street position (t, s) with its ground shadow."""
    length, width, height = size
    at = style.world(t, s)
    group.place(template, at, yaw, palette, style.light, s)
    c, n = np.cos(yaw), np.sin(yaw)
    local = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * (width / 2, length / 2)
    corners = local @ np.array([[c, -n], [n, c]]) + at[[0, 2]]
    group.contacts.append(corners)
    if style.light.sun_power > 0.05:
        moved = corners + style.light.shadow_offset(height * 0.92)
        for i in range(4):
            j = (i + 1) % 4
            group.shadows.append(np.array([corners[i], corners[j], moved[j], moved[i]]))
        group.shadows.append(moved)


def make_block(style: Style, k: int) -> Block:
    """Block k of a drive."""
    return BlockMaker(style, k).make()
