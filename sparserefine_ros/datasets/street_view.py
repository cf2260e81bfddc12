"""From the world to the screen: the pinhole camera, and faces, sticks and surfaces as screen polygons.

Shape shorthand: P polygons, V vertices, M sticks, N surfaces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sparserefine_ros.datasets.street_raster import NEAR, clip_near, gather, starts
from sparserefine_ros.datasets.street_shapes import Group, Surface
from sparserefine_ros.datasets.street_style import Camera, Style, generator
from sparserefine_ros.datasets.street_textures import fractal

FOCAL = 1.1  # of the image width: 49 degrees across, as in Cityscapes
HORIZON = 0.46  # of the image height, for a level camera
FAR = 260.0  # metres


class View(NamedTuple):
    """Pinhole of one image size."""

    camera: Camera
    height: int
    width: int
    focal: float
    cx: float
    cy: float

    def to_camera(self, world: np.ndarray) -> np.ndarray:
        """World [..., 3] to camera coordinates (right, down, forward)."""
        return (world - self.camera.position) @ self.camera.rotation.T

    def to_pixels(self, points: np.ndarray) -> np.ndarray:
        """Camera coordinates [..., 3] in front of the camera to pixels [..., 2] (x, y)."""
        return points[..., :2] * (self.focal / points[..., 2:]) + (self.cx, self.cy)


def make_view(style: Style, time: float, size: tuple[int, int]) -> View:
    """The view of a drive at ``time`` seconds for an image of (height, width)."""
    height, width = size
    return View(style.camera(time), height, width, FOCAL * width, width / 2, height * HORIZON)


class Screen(NamedTuple):
    """Everything drawable of a frame, as screen polygons."""

    xy: np.ndarray  # [V, 2]
    sides: np.ndarray  # [P]
    rgb: np.ndarray  # [P, 3] lit
    cls: np.ndarray  # [P]
    key: np.ndarray  # [P]
    depth: np.ndarray  # [P]
    surface: np.ndarray  # [P] index of a Surface or -1


def screen_faces(view: View, group: Group) -> Screen | None:
    """Flat faces: back faces dropped, the rest projected and cut at the near plane."""
    if not group.verts:
        return None
    verts = np.concatenate(group.verts)
    count = np.concatenate(group.sides)
    normal, rgb = np.concatenate(group.normal), np.concatenate(group.rgb)
    cls, key, both = np.concatenate(group.cls), np.concatenate(group.key), np.concatenate(group.two_sided)
    first = starts(count)
    points = view.to_camera(verts)
    to_eye = view.camera.position - verts[first]
    near = np.minimum.reduceat(points[:, 2], first)
    far = np.maximum.reduceat(points[:, 2], first)
    facing = both | (np.einsum("ij,ij->i", normal, to_eye) > 0)
    keep = facing & (far > NEAR) & (near < FAR)
    whole = np.flatnonzero(keep & (near >= NEAR))
    index = gather(first[whole], count[whole])
    pixels = [view.to_pixels(points[index])]
    counts, chosen = [count[whole]], [whole]
    for f in np.flatnonzero(keep & (near < NEAR)):
        cut = clip_near(points[first[f] : first[f] + count[f]])
        if len(cut) >= 3:
            pixels.append(view.to_pixels(cut))
            counts.append(np.array([len(cut)]))
            chosen.append(np.array([f]))
    order = np.concatenate(chosen)
    middle = np.clip((near + far) / 2, 1.0, None)
    return Screen(
        np.concatenate(pixels),
        np.concatenate(counts),
        rgb[order],
        cls[order],
        key[order],
        middle[order],
        np.full(len(order), -1),
    )


_CIRCLE = np.stack([np.cos(np.arange(10) * (np.pi / 5)), np.sin(np.arange(10) * (np.pi / 5))], 1)


def screen_sticks(view: View, group: Group) -> list[Screen]:
    """Sticks become quadrilaterals of their projected thickness, balls ten-sided ellipses."""
    if not group.stick_ends:
        return []
    ends, radius = np.concatenate(group.stick_ends), np.concatenate(group.stick_radius)
    rgb, cls, key = np.concatenate(group.stick_rgb), np.concatenate(group.stick_cls), np.concatenate(group.stick_key)
    order = np.arange(len(key))
    points = view.to_camera(ends)
    z = points[..., 2]
    keep = (z.min(1) > NEAR) & (z.max(1) < FAR)
    ends, points, radius, rgb, cls, key, z, order = (
        ends[keep],
        points[keep],
        radius[keep],
        rgb[keep],
        cls[keep],
        key[keep],
        z[keep],
        order[keep],
    )
    pixels = view.to_pixels(points)
    thick = radius * (view.focal / z)
    ball = (ends[:, 0] == ends[:, 1]).all(1)
    along = pixels[:, 1] - pixels[:, 0]
    length = np.hypot(along[:, 0], along[:, 1])
    along = along / np.maximum(length, 1e-9)[:, None]
    across = np.stack([-along[:, 1], along[:, 0]], 1)
    a, b = pixels[:, 0] - along * (0.3 * thick[:, :1]), pixels[:, 1] + along * (0.3 * thick[:, 1:])
    quads = np.stack(
        [a - across * thick[:, :1], a + across * thick[:, :1], b + across * thick[:, 1:], b - across * thick[:, 1:]], 1
    )
    out = []
    for pick, shape in ((~ball, quads), (ball, None)):
        n = int(pick.sum())
        if shape is None:
            shape = pixels[:, :1] + thick[:, None, :] * _CIRCLE
        xy = shape[pick].reshape(-1, 2)
        sides = shape.shape[1]
        # sticks of one object keep their order through a tiny step of the key
        step = key[pick] - order[pick] * 1e-7
        out.append(Screen(xy, np.full(n, sides), rgb[pick], cls[pick], step, z[pick].mean(1), np.full(n, -1)))
    return out


def corners(view: View, surfaces: Sequence[Surface]) -> np.ndarray:
    """Camera-space corners [N, 4, 3] of surfaces: top left, top right, bottom right, bottom left of their textures."""
    origin = np.array([s.origin for s in surfaces])
    along = np.array([s.along for s in surfaces])
    down = np.array([s.down for s in surfaces])
    board = np.array([s.board for s in surfaces])
    world = np.stack([origin, origin + along, origin + along + down, origin + down], 1)
    out = view.to_camera(world)
    half, height, zero = along[board, 0] / 2, along[board, 1], np.zeros(int(board.sum()))
    offset = [(-half, -height, zero), (half, -height, zero), (half, zero, zero), (-half, zero, zero)]
    out[board] = view.to_camera(origin[board])[:, None] + np.stack([np.stack(o, 1) for o in offset], 1)
    return out


def screen_surfaces(view: View, points: np.ndarray, group: Group) -> Screen:
    """Textured surfaces in view, given their camera-space corners [N, 4, 3]."""
    z = points[..., 2]
    low, high = z.min(1), z.max(1)
    side = 0.75 * z + 1
    keep = (high > NEAR) & (low < FAR) & ~(points[..., 0] > side).all(1) & ~(points[..., 0] < -side).all(1)
    xy, count, chosen = [], [], np.flatnonzero(keep)
    for n in chosen:
        cut = clip_near(points[n]) if low[n] < NEAR else points[n]
        xy.append(cut)
        count.append(len(cut))
    pixels = view.to_pixels(np.concatenate(xy)) if xy else np.zeros((0, 2))
    cls = np.array([group.surfaces[n].cls for n in chosen], np.int64)
    key = np.asarray(group.surface_key)[chosen]
    depth = np.maximum(z[chosen].mean(1), 1.0)
    return Screen(pixels, np.array(count, np.int64), np.zeros((len(chosen), 3)), cls, key, depth, chosen)


def visible(view: View, screen: Screen) -> Screen:
    """Drops polygons outside the image, sorts the rest far to near (stable)."""
    first = starts(screen.sides)
    x, y = screen.xy[:, 0], screen.xy[:, 1]
    low_x, high_x = np.minimum.reduceat(x, first), np.maximum.reduceat(x, first)
    low_y, high_y = np.minimum.reduceat(y, first), np.maximum.reduceat(y, first)
    inside = (high_x > 0) & (low_x < view.width) & (high_y > 0) & (low_y < view.height)
    chosen = np.flatnonzero(inside)
    chosen = chosen[np.argsort(-screen.key[chosen], kind="stable")]
    count = screen.sides[chosen]
    return Screen(
        screen.xy[gather(first[chosen], count)],
        count,
        screen.rgb[chosen],
        screen.cls[chosen],
        screen.key[chosen],
        screen.depth[chosen],
        screen.surface[chosen],
    )


def skyline(style: Style, view: View) -> Screen:
    """Roofs and trees on the horizon: closes the view at the end of the street."""
    rng = generator(style.seed, 99)
    n = 420
    angle = np.linspace(-np.pi, np.pi, n + 1)
    height = 5 + 14 * np.abs(fractal(rng, 1, n, 24, 3)[0]) * rng.uniform(0.4, 1.0)
    kind = fractal(rng, 1, n, 16, 2)[0] > 0.2
    height = np.where(kind, np.repeat(rng.uniform(8, 26, n // 3), 3), height)
    yaw = np.arctan2(view.camera.rotation[2, 0], view.camera.rotation[2, 2])
    near = np.flatnonzero(np.abs((angle[:-1] - yaw + np.pi) % (2 * np.pi) - np.pi) < 0.6)
    distance = 240.0
    xy, cls, rgb = [], [], []
    for i in near:
        a0, a1 = angle[i], angle[i + 1]
        top0, top1 = (height[i], height[i]) if kind[i] else (height[i], height[(i + 1) % n])
        offset = (
            np.array(
                [
                    (np.sin(a0), 0, np.cos(a0)),
                    (np.sin(a1), 0, np.cos(a1)),
                    (np.sin(a1), 0, np.cos(a1)),
                    (np.sin(a0), 0, np.cos(a0)),
                ]
            )
            * distance
        )
        offset[:, 1] = (-2.0, -2.0, top1 - 1.4, top0 - 1.4)
        xy.append(view.to_pixels(offset @ view.camera.rotation.T))
        cls.append(2 if kind[i] else 8)
        shade = style.light.ambient + 0.3 * style.light.sun_power
        rgb.append((np.array((150, 140, 132)) if kind[i] else style.leaf[i % 4] * 0.8) * shade)
    m = len(xy)
    return Screen(
        np.concatenate(xy),
        np.full(m, 4),
        np.array(rgb),
        np.array(cls),
        np.full(m, 1e9),
        np.full(m, distance),
        np.full(m, -1),
    )


def join(parts: list[Screen]) -> Screen:
    """One screen of several."""
    return Screen(*(np.concatenate(column) for column in zip(*parts, strict=True)))
