"""What moves: vehicles in lanes, cyclists, walkers, people who cross. A pure function of (style, time)."""

from __future__ import annotations

import numpy as np

from sparserefine_ros.datasets import street_props as props
from sparserefine_ros.datasets.street_blocks import place_vehicle
from sparserefine_ros.datasets.street_people import Person, make_person, pose
from sparserefine_ros.datasets.street_shapes import Group
from sparserefine_ros.datasets.street_style import TRAFFIC, Style, generator
from sparserefine_ros.datasets.street_vehicles import CAR_VARIANTS, bus, car, tram, truck, vehicle_palette

RANGE = 210.0  # metres ahead in which things are drawn
PEOPLE_RANGE = 140.0
OWN, ONCOMING, CYCLES, WALK, CROSS, TRAM, SECOND = range(7)


def make_traffic(style: Style, time: float) -> Group:
    """Everything that moves, at ``time`` seconds."""
    group = Group()
    ego = style.ego_s(time)
    _lanes(group, style, time, ego)
    _cycles(group, style, time, ego)
    _walkers(group, style, time, ego)
    _crossers(group, style, time, ego)
    if style.median_kind == "tram":
        _trams(group, style, time, ego)
    else:
        _crossing_tram(group, style, ego)
    return group


def _slots(ego: float, low: float, high: float, offset: float, gap: float) -> range:
    """Indices j for which j * gap + offset lies between ego + low and ego + high, with one to spare."""
    return range(int(np.floor((ego + low - offset) / gap)) - 1, int(np.ceil((ego + high - offset) / gap)) + 2)


def _vehicle(
    group: Group, style: Style, rng: np.random.Generator, t: float, s: float, back: bool, choice: float = 1.0
) -> None:
    kind = rng.random()
    if choice < 1.0:  # a lane's fixed share of buses and trucks
        kind = choice
    if kind < 0.05:
        template, *size = bus(int(rng.integers(6)))
    elif kind < 0.12:
        template, *size = truck(int(rng.integers(24)))
    elif kind < 0.2:
        _two_wheeler(group, style, rng, t, s, back, True, 0.0)
        return
    else:
        template, *size = car(int(rng.integers(CAR_VARIANTS)))
    yaw = style.yaw_at(s) + (np.pi if back else 0.0)
    place_vehicle(group, style, template, (size[0], size[1], size[2]), t, s, yaw, vehicle_palette(rng, kind < 0.12))


def _lanes(group: Group, style: Style, time: float, ego: float) -> None:
    """Slots of one lane move at one speed, so nobody collides; the own lane keeps its distance to the camera."""
    gap = 24.0 / style.traffic
    for j in range(12):  # ahead in the own lane: distance to the camera drifts slowly
        rng = generator(style.seed, TRAFFIC, OWN, j)
        if j > 0 and rng.random() < 0.35:
            continue
        distance = (
            11.0
            + gap * (j + 0.5 * rng.random())
            + 1.5 * np.sin(0.4 * time + j)
            + 8.0 * generator(style.seed, TRAFFIC, OWN).random()
        )
        if distance < RANGE:
            _vehicle(group, style, rng, style.own + float(rng.normal(0, 0.15)), ego + distance, False)
    streams = [
        (-(style.median + style.left.lane * (lane + 0.5)), -0.9 * style.speed, ONCOMING, lane)
        for lane in range(style.left.lanes)
    ]
    if style.right.lanes > 1:
        other = 2 * style.median + 2 * style.right.lane - style.own
        streams.append((other, 0.8 * style.speed, SECOND, 0))
    for t, speed, stream, lane in streams:
        gap2 = gap * 1.15
        for j in _slots(ego, -6.0, RANGE, speed * time, gap2):
            rng = generator(style.seed, TRAFFIC, stream, lane, j)
            s = speed * time + gap2 * (j + 0.4 * rng.random())
            if (rng.random() < 0.25 and j % 3) or not -4.0 < s - ego < RANGE:
                continue
            _vehicle(
                group, style, rng, t + float(rng.normal(0, 0.12)), s, speed < 0, (0.0, 1.0, 1.0, 0.1, 1.0, 1.0)[j % 6]
            )


def _two_wheeler(
    group: Group, style: Style, rng: np.random.Generator, t: float, s: float, back: bool, motor: bool, phase: float
) -> None:
    yaw = style.yaw_at(s) + (np.pi if back else 0.0)
    at = style.world(t, s)
    template = props.motorcycle(int(rng.integers(2))) if motor else props.bicycle(False, int(rng.integers(2)))
    group.place(template, at, yaw, props.cycle_palette(rng), style.light, s)
    ends, radius, rgb, cls = pose(
        make_person(rng), (float(at[0]), float(at[2])), yaw, phase, "drive" if motor else "ride"
    )
    group.sticks(ends, radius, rgb * style.light.upright, cls, s - 0.02)
    angle = np.arange(10) * (np.pi / 5)
    group.contacts.append(at[[0, 2]] + np.stack([0.3 * np.cos(angle), 0.8 * np.sin(angle)], 1))


def _cycles(group: Group, style: Style, time: float, ego: float) -> None:
    for sign, side in ((1.0, style.right), (-1.0, style.left)):
        speed = sign * 4.2
        gap = 30.0 / style.crowd
        t = sign * (style.median + side.lanes * side.lane - 0.35)
        for j in _slots(ego, 3.0, RANGE * 0.7, speed * time, gap):
            rng = generator(style.seed, TRAFFIC, CYCLES, int(sign), j)
            s = speed * time + gap * (j + 0.7 * rng.random())
            if not 5.0 < s - ego < RANGE * 0.7 or rng.random() < 0.35:
                continue
            _two_wheeler(group, style, rng, t, s, sign < 0, False, 5.0 * time + j)


def _walkers(group: Group, style: Style, time: float, ego: float) -> None:
    for sign, side in ((1.0, style.right), (-1.0, style.left)):
        inner, outer = side.kerb + 0.2 + side.verge + 0.3, side.line - 0.4
        for forward in (1.0, -1.0):
            gap = 15.0 / style.crowd
            speed = forward * 1.3
            for j in _slots(ego, 2.0, PEOPLE_RANGE, speed * time, gap):
                rng = generator(style.seed, TRAFFIC, WALK, int(sign), int(forward), j)
                s = speed * time + gap * (j + rng.random())
                if rng.random() < 0.3 or not 5.0 < s - ego < PEOPLE_RANGE:
                    continue
                place = float(rng.uniform(inner, outer))
                for i in range(1 + int(rng.random() < 0.35)):  # some walk in pairs
                    person = make_person(rng)
                    at = style.world(sign * (place - 0.6 * i), s + 0.1 * i)
                    _person(
                        group,
                        style,
                        person,
                        at,
                        style.yaw_at(s) + (0.0 if forward > 0 else np.pi),
                        time * person.pace * 2 * np.pi + j + i,
                    )


def _person(group: Group, style: Style, person: Person, at: np.ndarray, yaw: float, phase: float) -> None:
    ends, radius, rgb, cls = pose(person, (float(at[0]), float(at[2])), yaw, phase)
    group.sticks(ends, radius, rgb * style.light.upright, cls, float(at[2]))
    angle = np.arange(8) * (np.pi / 4)
    foot = at[[0, 2]]
    group.contacts.append(foot + np.stack([0.26 * np.cos(angle), 0.2 * np.sin(angle)], 1))
    if style.light.sun_power > 0.05:
        along = style.light.shadow_offset(1.7)
        norm = max(float(np.hypot(*along)), 1e-6)
        across = np.array([-along[1], along[0]]) / norm * 0.22
        group.shadows.append(
            np.array([foot - across, foot + across, foot + along + across * 0.6, foot + along - across * 0.6])
        )


def _crossers(group: Group, style: Style, time: float, ego: float) -> None:
    """People on the zebra crossings; they leave the road well before the camera arrives."""
    first = int(np.floor(ego / style.block))
    for k in range(first, first + 4):
        rng = generator(style.seed, TRAFFIC, CROSS, k)
        for zebra in (k * style.block - 3.2, k * style.block + style.crossing + 3.2):
            for _ in range(int(rng.poisson(2.5 * style.crowd))):
                person = make_person(rng)
                lead, pace, sign = (
                    float(rng.uniform(14, 110)),
                    float(rng.uniform(1.1, 1.6)),
                    float(rng.choice([-1.0, 1.0])),
                )
                offset, phase = float(rng.uniform(-1.2, 1.2)), float(rng.uniform(0, 6))
                left = zebra - ego - lead  # metres of driving until this person is in the middle of the road
                t = sign * left / style.speed * pace
                t = float(np.clip(t, -style.left.line + 0.6, style.right.line - 0.6))
                if not 4.0 < zebra - ego < PEOPLE_RANGE:
                    continue
                moving = -style.left.line + 0.61 < t < style.right.line - 0.61
                at = style.world(t, zebra + offset)
                gait = time * person.pace * 2 * np.pi + phase if moving else 0.1
                _person(group, style, person, at, -sign * np.pi / 2 + style.yaw_at(zebra), gait)


def _trams(group: Group, style: Style, time: float, ego: float) -> None:
    for t, speed, gap in ((-1.6, -0.8 * style.speed, 95.0), (1.6, 0.75 * style.speed, 120.0)):
        for j in _slots(ego, -20.0, RANGE, speed * time, gap):
            rng = generator(style.seed, TRAFFIC, TRAM, int(speed > 0), j)
            s = speed * time + gap * (j + 0.35 * rng.random())
            template, *size = tram(int(rng.integers(6)))
            yaw = style.yaw_at(s) + (np.pi if speed < 0 else 0.0)
            palette = vehicle_palette(generator(style.seed, TRAFFIC, TRAM), True)
            place_vehicle(group, style, template, (size[0], size[1], size[2]), t, s, yaw, palette)


def _crossing_tram(group: Group, style: Style, ego: float) -> None:
    """Without tracks in the street, a tram halts in every second cross street, beside the road."""
    first = int(np.floor(ego / style.block))
    for k in range(first, first + 3):
        rng = generator(style.seed, TRAFFIC, TRAM, k)
        if k % 2 == 0:
            continue
        template, *size = tram(int(rng.integers(6)))
        sign = float(rng.choice([-1.0, 1.0]))
        side = style.right if sign > 0 else style.left
        t = sign * (side.kerb + 1.2 + size[0] / 2)
        s = k * style.block + style.crossing * 0.5
        place_vehicle(
            group, style, template, (size[0], size[1], size[2]), t, s, -sign * np.pi / 2, vehicle_palette(rng, True)
        )
