"""What a drive is like: light, season, cross-section, and the camera's motion. All drawn from the seed once.

Street coordinates: s metres along the street, t metres to the right of its middle line, height h. The world is
(X, Y, Z) = (t + bend(s), h, s): a gently bending street by shear, so the far end of a bend hides behind its houses.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparserefine_ros.datasets.street_shapes import Light

WORLD, BLOCK, TRAFFIC, FRAME = 1, 2, 3, 4  # stream numbers of the generators


def generator(seed: int, *stream: int) -> np.random.Generator:
    """An independent generator for one purpose: never global state, never shared between objects and frames."""
    return np.random.default_rng([seed, *[int(x) + (1 << 20) for x in stream]])


@dataclass(frozen=True)
class Camera:
    """Pose of a frame. ``rotation`` @ (world - position) has x right, y down, z forward."""

    position: np.ndarray  # [3] (X, Y, Z)
    rotation: np.ndarray  # [3, 3]
    s: float  # street position


@dataclass(frozen=True)
class Side:
    """Cross-section of one half of the street, metres from the middle line outwards."""

    lanes: int
    lane: float  # width of one lane
    parking: float  # width of the parking strip, 0 = none
    kerb: float  # t of the kerb
    verge: float  # width of the grass strip, 0 = none
    pavement: float  # width of the pavement
    line: float  # t of the property line


@dataclass(frozen=True)
class Style:
    """All that stays the same over one drive."""

    seed: int
    light: Light
    overcast: float
    night: float  # share of lit windows; > 0 at dusk
    haze: np.ndarray  # RGB of the horizon and of fog
    zenith: np.ndarray  # RGB of the sky above
    clouds: float
    fog: float  # extinction, 1/m
    leaf: np.ndarray  # [4, 3] foliage colours
    bare: float  # share of leafless trees
    grass: np.ndarray
    asphalt: np.ndarray
    slab: np.ndarray
    slab_kind: int
    own: float  # t of the camera's lane
    median: float  # half width of the median
    median_kind: str  # none, grass, tram
    right: Side
    left: Side
    block: float  # length between intersections
    crossing: float  # width of the cross street
    bend: tuple[float, float, float]  # amplitude, wave number, phase
    speed: float
    height: float  # of the camera
    pitch: float
    traffic: float  # density factors
    crowd: float
    parked: float
    trees: float
    tall: float  # urbanity: closed fronts and tall buildings
    detail: tuple[float, float, float, float]  # exposure, white balance red/blue, contrast
    noise: float
    blur: float
    vignette: float

    def bend_at(self, s: np.ndarray | float) -> np.ndarray:
        """Lateral shift of the middle line, metres."""
        a, k, p = self.bend
        return np.asarray(a * np.sin(k * np.asarray(s) + p))

    def slope_at(self, s: float) -> float:
        """Derivative of :meth:`bend_at`."""
        a, k, p = self.bend
        return float(a * k * np.cos(k * s + p))

    def world(self, t: np.ndarray | float, s: np.ndarray | float, h: np.ndarray | float = 0.0) -> np.ndarray:
        """Street to world coordinates, [..., 3]."""
        t, s, h = np.broadcast_arrays(np.asarray(t, np.float64), np.asarray(s, np.float64), np.asarray(h, np.float64))
        return np.stack([t + self.bend_at(s), h, s], -1)

    def yaw_at(self, s: float) -> float:
        """Heading of the street, radians."""
        return float(np.arctan(self.slope_at(s)))

    def ego_s(self, time: float) -> float:
        """The camera's street position: steady with a slow swell, never backwards."""
        return 60.0 + self.speed * time + 0.9 * float(np.sin(0.7 * time + self.seed))

    def camera(self, time: float) -> Camera:
        """Pose at ``time`` seconds, with a little body motion."""
        s = self.ego_s(time)
        wander = 0.12 * np.sin(0.33 * time + 1.3 * self.seed)
        pitch = self.pitch + 0.0022 * np.sin(2.9 * time + self.seed) + 0.0011 * np.sin(7.1 * time)
        roll = 0.004 * np.sin(1.1 * time + 2.0 * self.seed)
        yaw = self.yaw_at(s + 6.0) + 0.012 * np.sin(0.5 * time + self.seed)
        position = self.world(self.own + wander, s, self.height + 0.012 * np.sin(5.3 * time))
        cy, sy, cp, sp, cr, sr = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch), np.cos(roll), np.sin(roll)
        heading = np.array([[cy, 0, -sy], [0, 1, 0], [sy, 0, cy]])  # rows: right, up, forward
        down = np.array([[1, 0, 0], [0, -1, 0], [0, 0, 1]])
        nod = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
        tilt = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
        return Camera(position, tilt @ nod @ down @ heading, s)


def _side(rng: np.random.Generator, median: float, lanes: int, lane: float) -> Side:
    parking = float(rng.choice([0.0, 2.1, 2.3], p=[0.42, 0.33, 0.25]))
    kerb = median + lanes * lane + parking + (0.3 if parking == 0 else 0.0)
    verge = float(rng.choice([0.0, 1.3, 2.2], p=[0.5, 0.3, 0.2]))
    pavement = float(rng.uniform(2.3, 5.5))
    return Side(lanes, lane, parking, kerb, verge, pavement, kerb + 0.2 + verge + pavement)


def _jitter(rng: np.random.Generator, colour: tuple[float, float, float], spread: float) -> np.ndarray:
    return np.clip(np.asarray(colour) + rng.normal(0, spread * 0.6) + rng.normal(0, spread * 0.5, 3), 5, 250)


def make_style(seed: int) -> Style:
    """The drive of a seed."""
    rng = generator(seed, WORLD)
    weather = rng.choice(["sun", "hazy", "overcast", "fog", "dusk"], p=[0.38, 0.2, 0.25, 0.07, 0.1])
    overcast = {"sun": 0.0, "hazy": 0.45, "overcast": 1.0, "fog": 1.0, "dusk": 0.8}[str(weather)]
    elevation = rng.uniform(0.32, 1.0) if weather != "dusk" else rng.uniform(0.2, 0.35)
    azimuth = rng.uniform(-np.pi, np.pi)
    sun = (
        float(np.cos(elevation) * np.sin(azimuth)),
        float(np.sin(elevation)),
        float(np.cos(elevation) * np.cos(azimuth)),
    )
    dim = 0.62 if weather == "dusk" else 1.0
    light = Light(
        sun, (1 - overcast) * rng.uniform(0.55, 0.8), dim * (0.55 + 0.38 * overcast) * rng.uniform(0.92, 1.05), 1.15
    )
    if weather == "dusk":
        haze, zenith = _jitter(rng, (196, 164, 150), 18), _jitter(rng, (92, 104, 136), 14)
    elif overcast > 0.9:
        haze, zenith = _jitter(rng, (208, 210, 212), 10), _jitter(rng, (186, 190, 196), 12)
    else:
        haze, zenith = _jitter(rng, (206, 216, 226), 10), _jitter(rng, (112, 152, 206), 20)
    season = rng.choice(["spring", "summer", "autumn", "winter"], p=[0.22, 0.4, 0.23, 0.15])
    greens = [(86, 108, 52), (70, 92, 48), (98, 112, 64), (60, 80, 52)]
    leaves = {
        "spring": [(116, 134, 66), (98, 122, 58), (128, 140, 84), (150, 130, 124)],
        "summer": greens,
        "autumn": [(150, 112, 48), (132, 84, 44), (106, 104, 54), (160, 132, 60)],
        "winter": [(66, 82, 54), (80, 84, 62), (92, 84, 66), (60, 72, 52)],
    }[str(season)]
    leaf = np.array([_jitter(rng, c, 9) for c in leaves])
    grass = _jitter(rng, {"winter": (112, 108, 78), "autumn": (110, 112, 64)}.get(str(season), (92, 114, 58)), 10)
    grey = rng.uniform(84, 138)
    warm = rng.uniform(-4, 7)
    asphalt = np.array([grey + warm, grey + warm * 0.4, grey - warm * 0.3])
    slab_kind = int(rng.integers(3))
    slab = _jitter(rng, ((162, 158, 152), (146, 142, 138), (150, 116, 100))[slab_kind], 12)
    median_kind = str(rng.choice(["none", "grass", "tram"], p=[0.5, 0.17, 0.33]))
    median = {"none": 0.0, "grass": float(rng.uniform(1.0, 2.2)), "tram": 3.3}[median_kind]
    lanes = 1 if median_kind == "tram" else int(rng.choice([1, 2], p=[0.72, 0.28]))
    lane = float(rng.uniform(3.0, 3.6))
    wave = 2 * np.pi / rng.uniform(240, 800)
    bend = (float(rng.uniform(0.0, 0.13) / wave), float(wave), float(rng.uniform(0, 2 * np.pi)))
    wb = rng.normal(0, 0.045)
    gain = float(np.clip((1.0 / (light.ambient + 0.6 * light.sun_power)) ** 0.6, 0.8, 1.5))  # auto exposure, not quite
    own = median + lane * (0.5 if lanes == 1 or rng.random() < 0.35 else 1.5)
    return Style(
        seed=seed,
        light=light,
        overcast=overcast,
        night=0.4 if weather == "dusk" else 0.03,
        haze=haze * (dim * 0.25 + 0.75),
        zenith=zenith,
        clouds=float(rng.uniform(0, 1)) if overcast < 0.9 else 0.35,
        fog=float(rng.uniform(0.016, 0.03) if weather == "fog" else rng.uniform(0.0012, 0.0065)),
        leaf=leaf,
        bare={"winter": 0.75, "autumn": 0.2, "spring": 0.08}.get(str(season), 0.0),
        grass=grass,
        asphalt=asphalt,
        slab=slab,
        slab_kind=slab_kind,
        own=own,
        median=median,
        median_kind=median_kind,
        right=_side(rng, median, lanes, lane),
        left=_side(rng, median, lanes, lane),
        block=float(rng.uniform(95, 150)),
        crossing=float(rng.uniform(7, 13)),
        bend=bend,
        speed=float(rng.uniform(6, 13)),
        height=float(rng.uniform(1.25, 1.6)),
        pitch=float(rng.uniform(0.01, 0.045)),
        traffic=float(rng.uniform(0.5, 1.5)),
        crowd=float(rng.uniform(0.5, 1.8)),
        parked=float(rng.uniform(0.35, 0.9)),
        trees=float(rng.uniform(0.3, 1.4)),
        tall=float(rng.uniform(0, 1)),
        detail=(
            float(gain * np.exp(rng.normal(0, 0.13))),
            float(1 + wb),
            float(1 - wb * 0.9),
            float(rng.uniform(0.85, 1.15)),
        ),
        noise=float(rng.uniform(0.5, 1.4) * (1.6 if weather == "dusk" else 1.0)),
        blur=float(rng.uniform(0.45, 0.8)),
        vignette=float(rng.uniform(0.08, 0.3)),
    )
