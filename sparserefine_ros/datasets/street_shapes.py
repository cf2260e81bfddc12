"""Building blocks of the procedural street: templates of convex faces and sticks, and their placed instances.

Local axes of a template, in metres: x to the right, y up, z forward. A template is geometry only; colours are
*slots* that every instance fills from its own palette, so one cached shape serves many objects.

Shape shorthand: N vertices, F faces, M sticks, B balls, S colour slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

SLOTS = 13
(BODY, LOWER, GLASS, TYRE, RIM, LAMP, TAIL, PLATE, TRIM, ACCENT, UPPER, EXTRA, GLOSS) = range(SLOTS)
SELF_LIT = frozenset((LAMP, TAIL))


class Template(NamedTuple):
    """Faces in drawing order (back to front inside one object), then sticks and balls."""

    verts: np.ndarray  # [N, 3]
    sides: np.ndarray  # [F] vertices of each face
    normal: np.ndarray  # [F, 3] outward, unit length
    slot: np.ndarray  # [F]
    cls: np.ndarray  # [F]
    part: np.ndarray  # [F] z of the part that a face belongs to: long objects are sorted part by part
    two_sided: np.ndarray  # [F] bool
    stick_ends: np.ndarray  # [M, 2, 3]; a ball has equal ends
    stick_radius: np.ndarray  # [M, 2]; of a ball: half width, half height
    stick_slot: np.ndarray  # [M]
    stick_cls: np.ndarray  # [M]
    sticks_first: bool  # posts stand behind the plates they carry


class Builder:
    """Collects the faces and sticks of one template."""

    def __init__(self, cls: int, sticks_first: bool = False) -> None:
        self.cls = cls
        self.sticks_first = sticks_first
        self.part = 0.0
        self.faces: list[tuple[np.ndarray, np.ndarray, int, int, float, bool]] = []
        self.sticks: list[tuple[Sequence[float], Sequence[float], float, float, int, int]] = []

    def face(
        self,
        points: Sequence[Sequence[float]] | np.ndarray,
        slot: int,
        inside: Sequence[float] = (0.0, 0.6, 0.0),
        cls: int | None = None,
        two_sided: bool = False,
    ) -> None:
        """A convex, planar polygon; its normal is turned away from the point ``inside``."""
        verts = np.asarray(points, np.float64)
        normal = np.cross(verts[1] - verts[0], verts[2] - verts[0])
        normal /= max(float(np.linalg.norm(normal)), 1e-9)
        if normal @ (verts.mean(0) - np.asarray(inside)) < 0:
            normal = -normal
        self.faces.append((verts, normal, slot, self.cls if cls is None else cls, self.part, two_sided))

    def prism(
        self,
        profile: Sequence[tuple[float, float]],
        half_width: float | Sequence[float],
        side: int,
        strips: int | Sequence[int],
        skip: Sequence[int] = (),
    ) -> None:
        """Extrudes a convex (z, y) profile across x; strip i joins profile points i and i + 1."""
        n = len(profile)
        half = np.full(n, half_width) if np.isscalar(half_width) else np.asarray(half_width, np.float64)
        slots = [strips] * n if isinstance(strips, int) else list(strips)
        right = np.array([[half[i], y, z] for i, (z, y) in enumerate(profile)])
        left = right * (-1.0, 1.0, 1.0)
        inside = right.mean(0) * (0.0, 1.0, 1.0)
        for i in range(n):
            if i not in skip:
                j = (i + 1) % n
                self.face([left[i], right[i], right[j], left[j]], slots[i], inside)
        self.face(right, side, inside)
        self.face(left, side, inside)

    def box(
        self, x: tuple[float, float], y: tuple[float, float], z: tuple[float, float], slot: int, cls: int | None = None
    ) -> None:
        """An axis-aligned box without its bottom."""
        inside = ((x[0] + x[1]) / 2, (y[0] + y[1]) / 2, (z[0] + z[1]) / 2)
        for zz in z:
            self.face([(x[0], y[0], zz), (x[1], y[0], zz), (x[1], y[1], zz), (x[0], y[1], zz)], slot, inside, cls)
        for xx in x:
            self.face([(xx, y[0], z[0]), (xx, y[0], z[1]), (xx, y[1], z[1]), (xx, y[1], z[0])], slot, inside, cls)
        self.face([(x[0], y[1], z[0]), (x[1], y[1], z[0]), (x[1], y[1], z[1]), (x[0], y[1], z[1])], slot, inside, cls)

    def sides(self, half: float, zy: Sequence[tuple[float, float]], slot: int, half_top: float | None = None) -> None:
        """The same (z, y) polygon on both flanks; ``half_top`` leans its upper half inwards."""
        top = half if half_top is None else half_top
        ys = [y for _, y in zy]
        low, high = min(ys), max(ys)
        for sign in (1.0, -1.0):
            points = [(sign * (half + (top - half) * (y - low) / max(high - low, 1e-6)), y, z) for z, y in zy]
            self.face(points, slot, (0.0, points[0][1], points[0][2]))

    def across(
        self,
        x: tuple[float, float],
        y: tuple[float, float],
        z: float,
        slot: int,
        forward: bool,
        z_top: float | None = None,
    ) -> None:
        """A rectangle that looks forward or backward."""
        top = z if z_top is None else z_top
        inside = (0.0, y[0], z - 1.0 if forward else z + 1.0)
        self.face([(x[0], y[0], z), (x[1], y[0], z), (x[1], y[1], top), (x[0], y[1], top)], slot, inside)

    def disc(
        self,
        centre: tuple[float, float, float],
        radius: float,
        slot: int,
        axis: str = "x",
        sides: int = 12,
        cls: int | None = None,
        sign: float = 1.0,
        two_sided: bool = False,
        turn: float = 0.0,
    ) -> None:
        """A regular polygon whose normal is ``sign`` times ``axis`` ("x" or "z")."""
        angle = (np.arange(sides) + 0.5) * (2 * np.pi / sides) + turn
        u, v, zero = radius * np.cos(angle), radius * np.sin(angle), np.zeros(sides)
        points = np.stack([zero, v, u] if axis == "x" else [u, v, zero], 1) + np.asarray(centre)
        inside = np.asarray(centre) - (np.array([sign, 0, 0]) if axis == "x" else np.array([0, 0, sign]))
        self.face(points, slot, inside, cls, two_sided)

    def stick(
        self, a: Sequence[float], b: Sequence[float], ra: float, rb: float, slot: int, cls: int | None = None
    ) -> None:
        """A round bar from a to b."""
        self.sticks.append((a, b, ra, rb, slot, self.cls if cls is None else cls))

    def ball(self, centre: Sequence[float], rx: float, ry: float, slot: int, cls: int | None = None) -> None:
        """An ellipse that always faces the camera."""
        self.stick(centre, centre, rx, ry, slot, cls)

    def build(self) -> Template:
        faces, sticks = self.faces, self.sticks
        return Template(
            np.concatenate([f[0] for f in faces]) if faces else np.zeros((0, 3)),
            np.array([len(f[0]) for f in faces], np.int64),
            np.array([f[1] for f in faces]).reshape(-1, 3),
            np.array([f[2] for f in faces], np.int64),
            np.array([f[3] for f in faces], np.int64),
            np.array([f[4] for f in faces]),
            np.array([f[5] for f in faces], bool),
            np.array([(s[0], s[1]) for s in sticks], np.float64).reshape(-1, 2, 3),
            np.array([(s[2], s[3]) for s in sticks], np.float64).reshape(-1, 2),
            np.array([s[4] for s in sticks], np.int64),
            np.array([s[5] for s in sticks], np.int64),
            self.sticks_first,
        )


class Surface(NamedTuple):
    """A textured parallelogram: ``origin + u * along + v * down`` with (u, v) in [0, 1]^2 across the texture.

    Where ``board`` is set, it is a billboard instead: ``origin`` is its bottom centre, ``along`` = (width, height, 0).
    """

    origin: np.ndarray  # [3]
    along: np.ndarray  # [3]
    down: np.ndarray  # [3]
    texture: tuple[object, ...]  # key for textures.make
    cls: int
    light: float
    board: bool = False


@dataclass
class Group:
    """Placed primitives as structure of arrays. ``key`` sorts far to near, ``seq`` orders inside one key."""

    verts: list[np.ndarray] = field(default_factory=list)
    sides: list[np.ndarray] = field(default_factory=list)
    normal: list[np.ndarray] = field(default_factory=list)
    rgb: list[np.ndarray] = field(default_factory=list)
    cls: list[np.ndarray] = field(default_factory=list)
    key: list[np.ndarray] = field(default_factory=list)
    two_sided: list[np.ndarray] = field(default_factory=list)
    stick_ends: list[np.ndarray] = field(default_factory=list)
    stick_radius: list[np.ndarray] = field(default_factory=list)
    stick_rgb: list[np.ndarray] = field(default_factory=list)
    stick_cls: list[np.ndarray] = field(default_factory=list)
    stick_key: list[np.ndarray] = field(default_factory=list)
    surfaces: list[Surface] = field(default_factory=list)
    surface_key: list[float] = field(default_factory=list)
    shadows: list[np.ndarray] = field(default_factory=list)  # each [n, 2]: a convex polygon (X, Z) on the ground
    contacts: list[np.ndarray] = field(default_factory=list)  # the same, for the dark below a body

    def place(
        self,
        template: Template,
        at: Sequence[float] | np.ndarray,
        yaw: float,
        palette: np.ndarray,
        light: Light,
        key: float,
        scale: float = 1.0,
    ) -> None:
        """Adds an instance: rotated by ``yaw`` (radians, from +z towards +x), scaled, moved to ``at`` (X, Y, Z).

        ``palette`` [S, 3] RGB 0..255. ``key`` is the street position that sorts the object, parts relative to it.
        """
        c, s = float(np.cos(yaw)), float(np.sin(yaw))
        turn = np.array([[c, 0.0, -s], [0.0, 1.0, 0.0], [s, 0.0, c]])
        base = np.asarray(at, np.float64)
        if len(template.sides):
            normal = template.normal @ turn
            shade = light.shade(normal)
            shade[np.isin(template.slot, tuple(SELF_LIT))] = light.lamp
            self.verts.append((template.verts * scale) @ turn + base)
            self.sides.append(template.sides)
            self.normal.append(normal)
            self.rgb.append(palette[template.slot] * shade[:, None])
            self.cls.append(template.cls)
            self.key.append(key + template.part * (c * scale))
            self.two_sided.append(template.two_sided)
        if len(template.stick_slot):
            self.sticks(
                (template.stick_ends * scale) @ turn + base,
                template.stick_radius * scale,
                palette[template.stick_slot] * light.upright,
                template.stick_cls,
                key + (0.001 if template.sticks_first else 0.0),
            )

    def sticks(self, ends: np.ndarray, radius: np.ndarray, rgb: np.ndarray, cls: np.ndarray, key: float) -> None:
        """Adds sticks in world coordinates, colours already lit."""
        self.stick_ends.append(ends)
        self.stick_radius.append(radius)
        self.stick_rgb.append(rgb)
        self.stick_cls.append(cls)
        self.stick_key.append(np.full(len(cls), key))

    def polygon(
        self,
        points: np.ndarray,
        normal: Sequence[float] | np.ndarray,
        rgb: np.ndarray,
        cls: int,
        key: float,
        two_sided: bool = False,
    ) -> None:
        """Adds one convex polygon in world coordinates, colour already lit."""
        self.verts.append(np.asarray(points, np.float64))
        self.sides.append(np.array([len(points)]))
        self.normal.append(np.asarray(normal, np.float64).reshape(1, 3))
        self.rgb.append(np.asarray(rgb, np.float64).reshape(1, 3))
        self.cls.append(np.array([cls]))
        self.key.append(np.array([key]))
        self.two_sided.append(np.array([two_sided]))

    def surface(self, surface: Surface, key: float) -> None:
        """Adds a textured surface."""
        self.surfaces.append(surface)
        self.surface_key.append(key)


@dataclass(frozen=True)
class Light:
    """Sun and sky of a drive: Lambert's law with an ambient part, in units where 1 leaves a colour as it is."""

    sun: tuple[float, float, float]  # unit vector towards the sun (X, Y, Z)
    sun_power: float
    ambient: float
    lamp: float  # of self-lit faces

    def shade(self, normal: np.ndarray) -> np.ndarray:
        """Brightness [F] of faces with unit normals [F, 3]."""
        lambert = np.clip(normal @ np.asarray(self.sun), 0.0, 1.0)
        return self.ambient * (0.8 + 0.2 * normal[:, 1]) + self.sun_power * lambert

    @property
    def upright(self) -> float:
        """Brightness of thin round things."""
        return self.ambient + 0.45 * self.sun_power

    def shadow_offset(self, height: float) -> np.ndarray:
        """Where on the ground (dX, dZ) the shadow of a point at ``height`` falls."""
        x, y, z = self.sun
        return np.array([-x, -z]) * (height / max(y, 0.2))
