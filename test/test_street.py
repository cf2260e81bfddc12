"""The procedural street: deterministic, exact labels, one scene at all sizes, consistent in three dimensions."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparserefine_ros.datasets.base import UNLABELLED
from sparserefine_ros.datasets.classes import CITYSCAPES
from sparserefine_ros.datasets.street import Street
from sparserefine_ros.datasets.street_blocks import Block
from sparserefine_ros.datasets.street_raster import Polygons, clip_near, fill_large, fill_small, polygon_spans
from sparserefine_ros.datasets.street_render import Renderer
from sparserefine_ros.datasets.street_sensor import _vignette, expose
from sparserefine_ros.datasets.street_shapes import Group
from sparserefine_ros.datasets.street_style import Camera, make_style
from sparserefine_ros.datasets.street_view import View, make_view
from sparserefine_ros.errors import DatasetError

POLE = 5
SIZE = (128, 256)


def nearest(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The label at another size's pixel centres."""
    rows, columns = (((np.arange(n) + 0.5) * full / n).astype(int) for n, full in zip(size, label.shape, strict=True))
    return label[np.ix_(rows, columns)]


def test_sample_fields() -> None:
    street = Street(frames=30, seed=3, size=SIZE, fps=15.0)
    sample = street[12]
    assert len(street) == 30
    assert street.classes is CITYSCAPES
    assert sample.image.shape == (*SIZE, 3)
    assert sample.image.dtype == np.uint8
    assert sample.image.flags.c_contiguous
    assert sample.label is not None
    assert sample.label.shape == SIZE
    assert sample.label.dtype == np.uint8
    assert sample.stamp_ns == 800_000_000
    assert sample.name == "street_0003_000012"
    assert sample.image.std() > 20  # a picture, not a blank


def test_a_frame_depends_on_nothing_but_its_arguments() -> None:
    wanted = Street(seed=5, size=SIZE)[40]
    other_order = Street(seed=5, size=SIZE)
    other_order[99], other_order[0]
    Street(seed=5, size=(64, 100))[40]  # another size must leave nothing behind
    again = other_order[40]
    np.testing.assert_array_equal(again.image, wanted.image)
    np.testing.assert_array_equal(again.label, wanted.label)
    assert not np.array_equal(other_order[41].image, wanted.image)
    assert not np.array_equal(Street(seed=6, size=SIZE)[40].label, wanted.label)


def test_threads_do_not_change_a_frame() -> None:
    before = cv2.getNumThreads()
    try:
        cv2.setNumThreads(1)
        alone = [Street(seed=8, size=SIZE)[i] for i in (10, 20)]
        cv2.setNumThreads(4)
        shared = Street(seed=8, size=SIZE)
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(shared.__getitem__, [10, 20, 10, 20]))
    finally:
        cv2.setNumThreads(before)
    for i in range(4):
        np.testing.assert_array_equal(together[i].image, alone[i % 2].image)
        np.testing.assert_array_equal(together[i].label, alone[i % 2].label)


@pytest.mark.parametrize("seed", [0, 1, 2, 1000])
def test_all_classes_occur_over_a_drive(seed: int) -> None:
    street = Street(frames=100, seed=seed, size=(256, 512))
    seen: set[int] = set()
    for i in range(0, 100, 14):
        label = street[i].label
        assert label is not None
        seen |= set(np.unique(label).tolist())
        if seen >= set(range(19)):
            break
    assert seen - {UNLABELLED} == set(range(19)), [CITYSCAPES.names[c] for c in set(range(19)) - seen]


@pytest.mark.parametrize("seed", [0, 7])
def test_labels_of_one_scene_agree_at_all_sizes(seed: int) -> None:
    full = Street(seed=seed, size=(512, 1024))[30].label
    assert full is not None
    for size in ((256, 512), (171, 342)):
        small = Street(seed=seed, size=size)[30].label
        assert small is not None
        assert (small == nearest(full, size)).mean() >= 0.97


def test_images_of_one_scene_agree_at_two_sizes() -> None:
    full, half = (Street(seed=2, size=size)[30].image for size in ((512, 1024), (256, 512)))
    shrunk = cv2.resize(full, (512, 256), interpolation=cv2.INTER_AREA)
    assert np.abs(shrunk.astype(int) - half.astype(int)).mean() < 8


@pytest.mark.parametrize("size", [(16, 16), (97, 131), (33, 200), (301, 77)])
def test_odd_sizes(size: tuple[int, int]) -> None:
    sample = Street(frames=3, seed=1, size=size)[2]
    assert sample.label is not None
    assert sample.image.shape == (*size, 3)
    assert sample.label.shape == size
    assert set(np.unique(sample.label)) <= {*range(19), UNLABELLED}


def test_the_sensor_has_noise_of_the_drives_strength() -> None:
    style = make_style(4)
    grey = np.full((200, 300, 3), 120, np.uint8)
    first, second = expose(grey, style, 1).astype(float), expose(grey, style, 2).astype(float)
    level = np.sqrt(1.4 + 0.045 * first.mean()) * style.noise
    assert (first - second).std() / np.sqrt(2) == pytest.approx(level, rel=0.15)
    np.testing.assert_array_equal(expose(grey, style, 1), first)


@pytest.mark.parametrize("size", [(100, 200), (200, 64)])
def test_the_corners_are_darker_by_the_lens_strength(size: tuple[int, int]) -> None:
    fall = _vignette(*size, 0.25)[..., 0].astype(int)
    assert fall[0, 0] == pytest.approx(255 * 0.75, abs=3)
    assert fall[size[0] // 2, size[1] // 2] >= 254
    assert (np.diff(fall[: size[0] // 2], axis=0) >= 0).all()  # no band where a negative factor became a large one


# -- geometry ------------------------------------------------------------------------------------------------------


def level_view(position: tuple[float, float, float], s: float = 0.0) -> View:
    """A level camera that looks along +Z: focal length 200 px, principal point (160, 60), image 120 x 320."""
    camera = Camera(np.asarray(position), np.diag([1.0, -1.0, 1.0]), s)
    return View(camera, 120, 320, 200.0, 160.0, 60.0)


def draw(view: View, group: Group) -> np.ndarray:
    """The label of a scene that holds nothing but ground, skyline and ``group``."""
    return Renderer(make_style(0)).render(view, [Block(group, ([], []))], Group())[1]


def panel(x: tuple[float, float], y: tuple[float, float], z: float) -> Group:
    """A rectangle that faces the camera, of class 6."""
    group = Group()
    points = np.array([(x[0], y[0], z), (x[1], y[0], z), (x[1], y[1], z), (x[0], y[1], z)])
    group.polygon(points, (0.0, 0.0, -1.0), np.array([200.0, 20, 20]), 6, z)
    return group


@pytest.mark.parametrize("position", [(0.0, 1.5, 0.0), (0.4, 1.3, 3.5)])
def test_a_static_object_moves_through_the_image_as_the_pinhole_says(position: tuple[float, float, float]) -> None:
    label = draw(level_view(position), panel((-1.0, 1.0), (0.5, 2.5), 12.0))
    depth = 12.0 - position[2]
    x = [160 + 200 * (wx - position[0]) / depth for wx in (-1.0, 1.0)]
    y = [60 - 200 * (wy - position[1]) / depth for wy in (2.5, 0.5)]
    columns, rows = np.arange(320) + 0.5, np.arange(120) + 0.5
    inside = ((rows > y[0]) & (rows < y[1]))[:, None] & ((columns > x[0]) & (columns < x[1]))
    np.testing.assert_array_equal(label == 6, inside)


def test_nearer_hides_farther_whatever_the_order() -> None:
    near, far = panel((-0.5, 0.5), (0.5, 2.5), 10.0), panel((-3.0, 3.0), (0.5, 2.5), 20.0)
    for name in ("verts", "sides", "normal", "rgb", "cls", "key", "two_sided"):
        getattr(near, name).extend(getattr(far, name))
    near.cls[1] = np.array([7])
    label = draw(level_view((0.0, 1.5, 0.0)), near)
    assert (label[55:65, 152:168] == 6).all()
    assert (label[55:60, 132:148] == 7).all()


def test_lamp_posts_stay_where_the_world_has_them() -> None:
    size, hits, beside, total = (512, 1024), 0, 0, 0
    for seed in (3, 13):
        street = Street(seed=seed, size=size)
        for i in (0, 6, 12):
            view = make_view(street.style, i / 10, size)
            label = street[i].label
            assert label is not None
            first = int(np.floor(view.camera.s / street.style.block))
            for k in (first, first + 1):
                group = street._block(k).group
                ends, cls = np.concatenate(group.stick_ends), np.concatenate(group.stick_cls)
                tall = (cls == POLE) & (ends[:, 1, 1] - ends[:, 0, 1] > 3.0)
                points = view.to_camera(ends[tall].mean(1))
                points = points[(points[:, 2] > 6) & (points[:, 2] < 50)]
                for x, y in np.floor(view.to_pixels(points)).astype(int):
                    if 40 <= x < 984 and 0 <= y < 512:
                        total += 1
                        hits += int(label[y, x] == POLE)
                        beside += int(label[y, x + 17] == POLE)
    assert total >= 20
    assert hits >= 0.6 * total  # the rest stands behind something
    assert beside <= 0.15 * total


def test_the_camera_never_drives_backwards() -> None:
    for seed in range(5):
        style = make_style(seed)
        s = [style.ego_s(t / 10) for t in range(200)]
        assert min(np.diff(s)) > 0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(3, 9), st.booleans())
def test_a_pixel_belongs_to_a_polygon_if_its_centre_does(seed: int, sides: int, mirrored: bool) -> None:
    rng = np.random.default_rng(seed)
    angle = np.sort(rng.uniform(0, 2 * np.pi, sides)) * (-1 if mirrored else 1)
    radius = rng.uniform(0.3, 40)
    xy = rng.uniform(-5, 45, 2) + radius * np.stack([np.cos(angle), np.sin(angle)], 1)
    spans = polygon_spans(Polygons(xy, np.array([sides])), 40, 50)
    small, large = np.zeros((40, 50), np.uint16), np.zeros((40, 50), np.uint16)
    fill_small(small, spans, 0, len(spans.row), np.array([3], np.uint16))
    if len(spans.row):
        fill_large(large, spans, 0, len(spans.row), 3)
    x, y = np.meshgrid(np.arange(50) + 0.5, np.arange(40) + 0.5)
    following = np.roll(xy, -1, 0)
    side = [
        (b[0] - a[0]) * (y - a[1]) - (b[1] - a[1]) * (x - a[0]) for a, b in zip(xy, following, strict=True)
    ]  # of one sign inside
    inside = (np.min(side, 0) > 0) | (np.max(side, 0) < 0)
    np.testing.assert_array_equal(small == 3, inside)
    np.testing.assert_array_equal(large, small)


def test_the_last_of_overlapping_polygons_wins() -> None:
    square = np.array([(0.0, 0.0), (4, 0), (4, 4), (0, 4)])
    spans = polygon_spans(Polygons(np.concatenate([square, square + 2]), np.array([4, 4])), 8, 8)
    ids = np.zeros((8, 8), np.uint16)
    fill_small(ids, spans, 0, len(spans.row), np.array([1, 2], np.uint16))
    assert ids[3, 3] == 2
    assert (ids == 1).sum() == 12
    assert (ids == 2).sum() == 16


def test_clipping_keeps_what_is_in_front() -> None:
    cut = clip_near(np.array([(0.0, 0, -1), (2, 0, 3), (0, 0, 3)]), near=1.0)
    assert cut[:, 2].min() == 1.0
    np.testing.assert_allclose(sorted(cut[:, 0]), [0.0, 0.0, 1.0, 2.0])


# -- wrong arguments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"frames": 0}, "0 frames; give at least 1"),
        ({"seed": -1}, "seed -1; give"),
        ({"size": (8, 100)}, r"\(8, 100\); give \(height, width\)"),
        ({"size": (128, 9000)}, "9000"),
        ({"size": (128,)}, r"\(128,\)"),
        ({"fps": 0.0}, "0.0 frames a second; give"),
        ({"fps": float("nan")}, "nan"),
        ({"frames": 3, "fps": 1e-9}, r"3 frames at 1e-09 a second takes 3e\+09 s; give at most 1e\+07"),  # never ended
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(DatasetError, match=words):
        Street(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("index", [-1, 5])
def test_frames_beyond_the_drive(index: int) -> None:
    with pytest.raises(IndexError, match=f"frame {index} of a street of 5 frames"):
        Street(frames=5, size=SIZE)[index]
