"""Several cameras on one stand-in model: names and patterns, batches, failures, ~/enable, the model's life."""

from __future__ import annotations

import gc
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

rclpy = pytest.importorskip("rclpy")

from lifecycle_msgs.msg import Transition  # noqa: E402
from lifecycle_msgs.srv import ChangeState  # noqa: E402
from rclpy.context import Context  # noqa: E402
from rclpy.lifecycle import LifecycleNode, TransitionCallbackReturn  # noqa: E402
from rclpy.parameter import Parameter  # noqa: E402
from rclpy.serialization import serialize_message  # noqa: E402
from ros_client import fill_image  # noqa: E402
from sensor_msgs.msg import Image  # noqa: E402
from std_msgs.msg import Header  # noqa: E402
from std_srvs.srv import SetBool  # noqa: E402

from sparserefine_ros.datasets.classes import CAMVID  # noqa: E402
from sparserefine_ros.errors import BundleError, FrameError, ParameterError  # noqa: E402
from sparserefine_ros.node import rig  # noqa: E402
from sparserefine_ros.node.device_health import device_health, free_memory  # noqa: E402
from sparserefine_ros.node.logs import Throttle  # noqa: E402
from sparserefine_ros.node.parameters import BY_NAME  # noqa: E402
from sparserefine_ros.node.percentiles import StageWindow  # noqa: E402
from sparserefine_ros.node.process import free_domain_id  # noqa: E402
from sparserefine_ros.node.refusal import Refusal  # noqa: E402
from sparserefine_ros.node.reports import NodeState  # noqa: E402
from sparserefine_ros.node.segment_node import SegmentNode  # noqa: E402
from sparserefine_ros.node.sources import Search, Source, fixed_sources, shown  # noqa: E402
from sparserefine_ros.segmenter.segmenter import Segmentation  # noqa: E402

POISON, HUNGRY = 66, 77  # images of these values make the model fail, or run out of memory


class StandIn:
    """A mask of the image's first channel; remembers its batches."""

    classes = CAMVID
    bundle = SimpleNamespace(name="stand-in", entropy_threshold=0.5, decoders=("dense",))
    refines, device, precision, sparse_backend, has_superpixels = False, "cpu", "fp32", "torch", False
    entropy_threshold, runtime, under_way = 0.5, "torch", ""
    degraded = ""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.free = threading.Event()
        self.free.set()

    def segment(self, images: list[np.ndarray], refine: bool | None = None) -> list[Segmentation]:
        values = [int(image[0, 0, 0]) for image in images]
        self.batches.append(values)
        assert len({image.shape for image in images}) == 1
        self.free.wait(10)
        if POISON in values:
            raise FrameError("logits that are not finite")
        if HUNGRY in values and refine is None:
            raise RuntimeError("CUDA out of memory")
        masks = [np.ascontiguousarray(image[..., 0]) for image in images]
        return [Segmentation(mask, mask, mask.astype(np.float32), 0.25, {"dense": 1.0}) for mask in masks]


class Bench:
    """A node fed by hand, and the masks it would have published by camera."""

    def __init__(self, context: Context, **parameters: Any) -> None:
        self.segmenter = StandIn()
        overrides = [Parameter(name, value=value) for name, value in parameters.items()]
        self.node = SegmentNode(lambda values, announce: self.segmenter, context=context, parameter_overrides=overrides)
        self.masks: dict[str, list[int]] = {}

    def start(self) -> Bench:
        self.node.start()
        for camera in self.node.cameras:
            self.watch(camera)
        return self

    def watch(self, camera: Any) -> None:
        seen = self.masks.setdefault(camera.name, [])
        camera.outputs.publish = lambda header, image, result, opacity: seen.append(int(result.mask[0, 0]))

    def camera(self, name: str) -> Any:
        return next(camera for camera in self.node.cameras if camera.name == name)

    def feed(self, name: str, value: int, size: tuple[int, int] = (4, 6), stamp: int = 0, **changes: Any) -> None:
        header = Header(frame_id=name)
        header.stamp.sec = stamp
        message = fill_image(Image(), header, np.full((*size, 3), value, np.uint8), "rgb8")
        for field, changed in changes.items():
            setattr(message, field, changed)
        self.node._receive(self.camera(name), serialize_message(message))

    def busy(self) -> None:
        """Holds the worker in a frame of the first camera, so that what is fed next waits."""
        before = len(self.segmenter.batches)
        self.segmenter.free.clear()
        self.feed(self.node.cameras[0].name, 1)
        self.until(lambda: len(self.segmenter.batches) > before)

    def until(self, done: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 10
        while not done():
            assert time.monotonic() < deadline, [c.counters for c in self.node.cameras]
            time.sleep(0.005)

    def counts(self, name: str) -> dict[str, int]:
        return {key: count for key, count in self.camera(name).counters.values().items() if count}

    def settled(self) -> None:
        ended = ("processed", "dropped", "malformed", "failed")

        def done() -> bool:
            all_counts = [camera.counters.values() for camera in self.node.cameras]
            return all(counts["received"] == sum(counts[name] for name in ended) for counts in all_counts)

        self.until(done)

    def diagnostics(self) -> Any:
        sent: list[Any] = []
        self.node._reporter._publisher.publish = sent.append
        self.node._tick()
        return sent[-1].status


def rows(status: Any) -> dict[str, str]:
    return {row.key: row.value for row in status.values}


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Context]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROS_LOG_DIR", str(tmp_path_factory.mktemp("log")))
        patch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
        result = Context()
        rclpy.init(context=result, domain_id=free_domain_id())
        yield result
        result.try_shutdown()


@pytest.fixture
def make(context: Context) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def one(**parameters: Any) -> Bench:
        made.append(Bench(context, **parameters))
        return made[-1]

    yield one
    for bench in made:
        bench.segmenter.free.set()
        bench.node.destroy_node()


# Names and patterns


def test_names_and_topics_become_cameras() -> None:
    assert fixed_sources([]) == [Source("", "image", "segmentation")]
    items = ["front", "rig/left", "/camera/rear/image_raw", "/top", "/camera/*/image_raw"]
    assert fixed_sources(items) == [
        Source("front", "front/image", "front/segmentation"),
        Source("rig/left", "rig/left/image", "rig/left/segmentation"),
        Source("camera/rear", "/camera/rear/image_raw", "/camera/rear/segmentation"),
        Source("top", "/top", "/segmentation"),
    ]


KIND = "sensor_msgs/msg/Image"


@pytest.mark.parametrize(
    ("patterns", "suffix", "topics", "found"),
    [
        (["/camera/*/image_raw"], "", ["/camera/a/image_raw", "/camera/b/image_raw"], ["camera/a", "camera/b"]),
        (["/camera/*/image_raw"], "", ["/camera/a/b/image_raw", "/camera/image_raw", "/x/camera/a/image_raw"], []),
        (["/camera/*/image_raw"], "", ["/camera/a/image_raw/compressed", "/camera/a/image_rawer"], []),
        (["/cam*/image"], "", ["/cam1/image", "/cam/image", "/camXimage"], ["cam", "cam1"]),
        (["*/image"], "", ["/robot/left/image", "/left/image"], ["robot/left"]),
        (["/a.c/*"], "", ["/abc/x"], []),
        (["/*/*/*"], "", ["/camera/segmentation/mask", "/camera/segmentation/color", "/a/b/c"], ["a/b"]),
        (["/camera/*/image"], "/compressed", ["/camera/a/image/compressed", "/camera/b/image"], ["camera/a"]),
        ([], "", ["/camera/a/image_raw"], []),
    ],
)
def test_patterns_match_whole_names(patterns, suffix, topics, found) -> None:
    search = Search(["front", *patterns], "/robot", suffix)
    graph = [(topic, [KIND]) for topic in topics] + [("/camera/odd/image_raw", ["std_msgs/msg/String"])]
    assert [source.name for source in search.sources(graph, KIND)] == found
    if found == ["camera/a"]:
        [source] = search.sources(graph, KIND)
        assert source == Source("camera/a", "/camera/a/image", "/camera/a/segmentation")


@pytest.mark.parametrize(
    ("cameras", "image"),
    [
        ("[]", "image"),
        ("[front, left]", "front/image"),
        ("['*/image', left]", "left/image"),
        ("['*/image']", None),
        ("[front", "image"),
        ("[1, 2]", "image"),
    ],
)
def test_one_camera_is_shown(cameras: str, image: str | None) -> None:
    """What is no list of names is the node's to refuse."""
    source = shown({"cameras": cameras})
    assert (source and source.image) == image and (source is None or source.results)


def test_two_cameras_may_not_share_their_results(make: Callable[..., Bench]) -> None:
    bench = make(cameras=["/camera/left", "/camera/right"])
    with pytest.raises(ParameterError, match="/camera/segmentation/mask, as those of /camera/left do"):
        bench.start()
    assert not bench.node.cameras


def test_cameras_of_one_name_are_told_apart(make: Callable[..., Bench]) -> None:
    """Their results are not on the same topics, so both may be; in the diagnostics each has its own line."""
    bench = make(cameras=["/top/image", "/top"]).start()
    assert [status.name for status in bench.diagnostics()[1:]] == ["segment: camera top", "segment: camera /top"]


def test_cameras_that_match_come_and_go(make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make(cameras=["/camera/*/image_raw", "/pair/*"]).start()
    assert not bench.node.cameras and "no topic matches" in bench.diagnostics()[0].message
    topics = {"/camera/front/image_raw": 1, "/pair/left": 1, "/pair/right": 1, "/camera/watched/image_raw": 0}
    monkeypatch.setattr(bench.node, "get_topic_names_and_types", lambda: [(topic, [KIND]) for topic in topics])
    monkeypatch.setattr(bench.node, "count_publishers", lambda topic: topics.get(topic, 0))
    own = [f"/camera/front/segmentation/{name}" for name in ("mask", "color", "overlay")]
    for _ in range(3):
        bench.node._tick()
        topics |= dict.fromkeys(own, 1)
        assert [camera.name for camera in bench.node.cameras] == ["camera/front", "pair"]
    assert bench.camera("pair").image_topic == "/pair/left", "right's results would be on left's topics"
    names = {publisher.topic_name for publisher in bench.camera("camera/front").outputs.publishers}
    assert names >= {*own, "/camera/front/segmentation/label_info_json", "/camera/front/segmentation/timing"}

    bench.watch(bench.camera("camera/front"))
    bench.feed("camera/front", 5)
    bench.settled()
    assert bench.masks["camera/front"] == [5]
    assert [status.name for status in bench.diagnostics()] == [
        "segment: segmentation", "segment: camera camera/front", "segment: camera pair",
    ]  # fmt: skip
    del topics["/camera/front/image_raw"]
    bench.node._tick()
    assert len(bench.node.cameras) == 2, "a camera may be away for a while"
    monkeypatch.setattr(rig, "FORGET_S", 0.0)
    bench.node._tick()
    assert [camera.name for camera in bench.node.cameras] == ["pair"]
    assert not bench.node._worker.scheduler._lines.keys() - set(bench.node.cameras)
    topics["/camera/front/image_raw"] = 1
    bench.node._tick()
    assert [camera.name for camera in bench.node.cameras] == ["pair", "camera/front"]


def test_a_topic_that_cannot_be_a_camera_costs_itself_only(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that DDS allows and ROS does not; an override that is no QoS. Nothing of them stays."""
    bad = "qos_overrides./camera/odd/image_raw.subscription.reliability"
    bench = make(cameras=["/camera/*/image_raw"], **{bad: "sure"}).start()
    topics = [(f"/camera/{name}/image_raw", [KIND]) for name in ("9x", "odd", "rear")]
    monkeypatch.setattr(bench.node, "get_topic_names_and_types", lambda: topics)
    count = bench.node.count_publishers  # refuses odd names
    monkeypatch.setattr(bench.node, "count_publishers", lambda topic: count(topic) + 1)
    for _ in range(2):
        bench.node._tick()
        assert [camera.name for camera in bench.node.cameras] == ["camera/rear"]
    assert not [p.topic_name for p in bench.node.publishers if p.topic_name.startswith("/camera/odd")]
    assert set(bench.node._worker.scheduler._lines) == set(bench.node.cameras)


def test_a_configure_that_fails_half_way_leaves_no_topics(make: Callable[..., Bench]) -> None:
    bench = make(**{"qos_overrides./segmentation/overlay.publisher.reliability": "sure"})
    with pytest.raises(ParameterError, match="qos_overrides./segmentation/overlay"):
        bench.start()
    assert not [p.topic_name for p in bench.node.publishers if "segmentation" in p.topic_name]


def test_a_camera_may_take_the_place_of_one_that_is_gone(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make(cameras=["/pair/*"]).start()
    topics = {"/pair/left": 1, "/pair/right": 1}
    monkeypatch.setattr(bench.node, "get_topic_names_and_types", lambda: [(topic, [KIND]) for topic in topics])
    monkeypatch.setattr(bench.node, "count_publishers", lambda topic: topics.get(topic, 0))
    monkeypatch.setattr(rig, "FORGET_S", 0.0)
    bench.node._tick()
    assert [camera.image_topic for camera in bench.node.cameras] == ["/pair/left"]
    del topics["/pair/left"]
    for _ in range(2):
        bench.node._tick()
    assert [camera.image_topic for camera in bench.node.cameras] == ["/pair/right"]


def test_masks_per_second_are_those_of_the_cameras_there_are(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A camera that is forgotten takes its count with it; the rate of the others stays."""
    bench = make(cameras=["front", "/camera/*/image_raw"]).start()
    topics = {"/camera/rear/image_raw": 1}
    monkeypatch.setattr(bench.node, "get_topic_names_and_types", lambda: [(topic, [KIND]) for topic in topics])
    monkeypatch.setattr(bench.node, "count_publishers", lambda topic: topics.get(topic, 0))
    bench.node._tick()
    rates = []
    for number in range(8):
        bench.camera("front").counters.add(processed=10)
        if number < 4:
            bench.camera("camera/rear").counters.add(processed=30)
        if number == 4:
            topics.clear()
            monkeypatch.setattr(rig, "FORGET_S", 0.0)
        rates.append(float(rows(bench.diagnostics()[0])["masks_per_second"]))
    assert rates == [20.0, 26.7, 30.0, 32.0, 34.0, 28.0, 22.0, 16.0], "means of the last five, the first of them 0"


def test_the_node_tells_the_sum_of_what_the_cameras_tell(make: Callable[..., Bench]) -> None:
    """Whatever the worker counts while the report is written."""
    bench = make(cameras=["front", "left"]).start()
    sent: list[Any] = []
    bench.node._reporter._publisher.publish = sent.append
    statuses = {camera: camera.status(0, "") for camera in bench.node.cameras}
    bench.camera("front").counters.add(processed=1)
    bench.node._reporter.publish(NodeState("active"), statuses)
    node, *cameras = (rows(status) for status in sent[-1].status)
    assert int(node["processed"]) == sum(int(camera["processed"]) for camera in cameras) == 0


def test_patterns_cannot_fill_the_memory(make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig, "MAX_CAMERAS", 2)
    bench = make(cameras=["/camera/*/image_raw"]).start()
    topics = [(f"/camera/c{i}/image_raw", [KIND]) for i in range(4)]
    monkeypatch.setattr(bench.node, "get_topic_names_and_types", lambda: topics)
    monkeypatch.setattr(bench.node, "count_publishers", lambda topic: 1)
    bench.node._tick()
    assert [camera.name for camera in bench.node.cameras] == ["camera/c0", "camera/c1"]
    for i in range(4, 20):  # topics that come and go
        topics[2:] = [(f"/camera/c{i}/image_raw", [KIND])]
        bench.node._tick()
    assert len(bench.node.cameras) == 2 and bench.node._rig._refused == {"/camera/c19/image_raw"}


# Batches and failures

FOUR = ["front", "left", "right", "rear"]


def test_waiting_cameras_share_batches_by_size(make: Callable[..., Bench]) -> None:
    bench = make(cameras=FOUR, max_batch=3).start()
    sizes = {"front": (4, 6), "left": (4, 6), "right": (8, 8), "rear": (4, 6)}
    for value, name in enumerate(FOUR, 10):  # makes the sizes known
        bench.feed(name, value, sizes[name])
        bench.settled()
    bench.busy()
    for value, name in enumerate(FOUR, 20):
        bench.feed(name, 99, sizes[name])  # replaced by the next
        bench.feed(name, value, sizes[name])
    bench.segmenter.free.set()
    bench.settled()
    # front, which has just been served, may not pass right over
    assert bench.segmenter.batches[-4:] == [[1], [21, 23], [22], [20]]
    assert bench.masks == {"front": [10, 1, 20], "left": [11, 21], "right": [12, 22], "rear": [13, 23]}
    for name in FOUR[1:]:
        assert bench.counts(name) == {"received": 3, "processed": 2, "dropped": 1}


def test_a_camera_that_changes_its_size_leaves_the_batch(make: Callable[..., Bench]) -> None:
    bench = make(cameras=["front", "left"]).start()
    for name in ("front", "left"):
        bench.feed(name, 1)
    bench.settled()
    bench.busy()
    bench.feed("front", 2)
    bench.feed("left", 3, (8, 8))
    bench.segmenter.free.set()
    bench.settled()
    assert bench.masks == {"front": [1, 1, 2], "left": [1, 3]}, "StandIn refuses mixed sizes"


def test_only_the_guilty_frames_of_a_batch_are_lost(make: Callable[..., Bench]) -> None:
    bench = make(cameras=FOUR).start()
    for name in FOUR:
        bench.feed(name, 2)
    bench.settled()
    bench.busy()
    bench.feed("front", 3)
    bench.feed("left", POISON)
    bench.feed("right", 5, step=1)
    bench.feed("rear", HUNGRY)
    bench.segmenter.free.set()
    bench.settled()
    assert bench.masks == {"front": [2, 1, 3], "left": [2], "right": [2], "rear": [2, HUNGRY]}
    assert bench.counts("front") == {"received": 3, "processed": 3}
    assert bench.counts("left") == {"received": 2, "processed": 1, "failed": 1}
    assert bench.counts("right") == {"received": 2, "processed": 1, "malformed": 1}
    assert bench.counts("rear") == {"received": 2, "processed": 2, "unrefined": 1}
    whole, *alone = bench.segmenter.batches[-5:]
    assert sorted(whole) == [3, POISON, HUNGRY] and sorted(alone) == [[3], [POISON], [HUNGRY], [HUNGRY]]

    node, *cameras = bench.diagnostics()
    assert node.level == b"\2" and node.message.startswith("left: 1 frame(s) failed")
    assert rows(node)["cameras"] == "front, left, right, rear" and rows(node)["received"] == "9"
    assert rows(node)["degraded"] == "out of memory: 1 frames without refinement"
    assert {status.name: status.level[0] for status in cameras} == {
        "segment: camera front": 1, "segment: camera left": 2, "segment: camera right": 1, "segment: camera rear": 1,
    }  # fmt: skip
    assert rows(cameras[2])["malformed"] == "1" and rows(cameras[0])["image_topic"] == "/front/image"


def test_one_cameras_warnings_do_not_hide_anothers(make: Callable[..., Bench]) -> None:
    bench = make(cameras=["front", "left"]).start()
    said: list[str] = []
    bench.node._worker._logger = SimpleNamespace(warning=said.append, error=said.append)
    for _ in range(3):
        for name in ("front", "left"):
            bench.feed(name, 3, step=1)
            bench.feed(name, POISON)
            bench.settled()
    assert sorted(text[: text.index(" skipped")] for text in said) == [
        "frame of /front/image", "frame of /left/image",
        "malformed frame on /front/image", "malformed frame on /left/image",
    ]  # fmt: skip


def test_the_log_says_a_thing_again_when_its_time_is_over() -> None:
    due = Throttle(5.0)
    assert [due("a", at) for at in (0.0, 1.0, 4.9, 5.0, 9.0, 10.0)] == [True, False, False, True, False, True]
    assert due("b", 10.0) and not due("b", 11.0) and not due("a", 14.9)


def test_no_frame_is_counted_twice(make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory may end when the mask is out; the frame has been processed, and nothing of its batch has failed."""
    bench = make(cameras=["front", "left"], latency_budget_ms=30000.0)
    bench.segmenter.segment = lambda images, choose=None: StandIn.segment(bench.segmenter, images)
    bench.start()

    def full(*_: Any) -> Any:
        raise MemoryError

    worker = bench.node._worker
    for place, name in ((worker.stages, "add"), (worker.budget, "observe")):
        before = bench.counts("front").get("processed", 0)
        with monkeypatch.context() as patch:
            patch.setattr(place, name, full)
            bench.feed("front", 1)
            bench.until(lambda before=before: bench.counts("front").get("processed", 0) > before)
            bench.feed("left", 2)
            bench.until(lambda before=before: bench.counts("left").get("processed", 0) > before)
    bench.feed("front", 3)
    bench.settled()
    assert bench.counts("front") == {"received": 3, "processed": 3}
    assert bench.counts("left") == {"received": 2, "processed": 2}


def test_six_busy_cameras_get_equal_shares_of_the_worker(make: Callable[..., Bench]) -> None:
    """A feeder keeps every slot full with the two fast ones sending ten times as often."""
    names = [f"camera{i}" for i in range(6)]
    bench = make(cameras=names, max_batch=4).start()
    bench.busy()
    for name in names[1:]:
        bench.feed(name, 2)
    for _ in range(30):
        for name in names:
            for _ in range(10 if name in names[:2] else 1):
                bench.feed(name, 3)
        before = len(bench.segmenter.batches)
        bench.segmenter.free.set()
        bench.segmenter.free.clear()
        bench.until(lambda before=before: len(bench.segmenter.batches) > before)
    counts = [camera.counters.values()["processed"] for camera in bench.node.cameras]
    bench.segmenter.free.set()
    bench.settled()
    assert min(counts) >= 10 and max(counts) - min(counts) <= 2, counts  # two: one batch is half published


def test_frames_older_than_the_last_are_published_and_counted(make: Callable[..., Bench]) -> None:
    bench = make().start()
    for value, stamp in enumerate((5, 6, 6, 3, 4, 4), 1):
        bench.feed("", value, stamp=stamp)
        bench.settled()
    assert bench.masks[""] == [1, 2, 3, 4, 5, 6]
    assert bench.counts("")["stale"] == 1, "time went back once"


# ~/enable, life and health


def test_disabled_the_node_computes_nothing_and_says_so(make: Callable[..., Bench], monkeypatch: Any) -> None:
    bench = make(cameras=["front", "left"]).start()
    bench.busy()
    bench.feed("left", 2)
    response = bench.node._on_enable(SetBool.Request(data=False), SetBool.Response())
    assert response.success and response.message == "disabled"
    bench.segmenter.free.set()
    bench.settled()
    monkeypatch.setattr("sparserefine_ros.node.camera.PATIENCE_S", 0.05)
    for value in range(5):
        bench.feed("front", value)
    time.sleep(0.1)
    for its in bench.node.cameras:
        its.publishers = lambda: 1
    assert {its.message for its in bench.diagnostics()} == {"disabled by ~/enable: frames are dropped"}
    assert bench.counts("left") == {"received": 1, "dropped": 1}, "what waited is dropped"
    assert bench.counts("front") == {"received": 6, "processed": 1, "dropped": 5}
    node = bench.diagnostics()[0]
    assert node.level == b"\1" and node.message == rows(node)["degraded"] == "disabled by ~/enable: frames are dropped"
    assert rows(node)["enabled"] == "False"
    assert bench.node._on_enable(SetBool.Request(data=True), SetBool.Response()).message == "enabled"
    assert bench.diagnostics()[1].level == b"\0", "no mask is owed for what was dropped"
    bench.feed("front", 9)
    bench.settled()
    assert bench.masks["front"] == [1, 9]


def test_a_life_by_hand(context: Context, make: Callable[..., Bench]) -> None:
    """Configure fails and is tried again; masks stop with deactivate; cleanup frees the model and the topics."""
    done, failed = TransitionCallbackReturn.SUCCESS, TransitionCallbackReturn.FAILURE
    bench = make(autostart="false")
    node = bench.node
    assert not node.autostart
    models: list[Any] = []
    asked: list[dict[str, Any]] = []

    def load(values: Any, announce: Callable[[str], None]) -> StandIn:
        asked.append(dict(values))
        if len(asked) == 1:
            raise BundleError("weights.safetensors is not there")
        model = StandIn()
        models.append(weakref.ref(model))
        return model

    node._load = load
    state = lambda: node._state_machine.current_state[1]  # noqa: E731
    assert node.trigger_configure() == failed and state() == "unconfigured"
    assert isinstance(node._failure, BundleError)
    assert not [publisher for publisher in node.publishers if "segmentation" in publisher.topic_name]
    assert node.set_parameters([Parameter("cameras", value=["front"])])[0].successful
    assert node.trigger_configure() == done and state() == "inactive"
    assert asked[-1]["cameras"] == ["front"]
    assert [camera.name for camera in node.cameras] == ["front"]
    [refused] = node.set_parameters([Parameter("cameras", value=["left"])])
    assert not refused.successful and "'cameras' is read-only while the node is configured" in refused.reason
    assert bench.diagnostics()[0].message == "inactive"

    assert node.trigger_activate() == done and state() == "active"
    bench.watch(bench.camera("front"))
    bench.feed("front", 4)
    bench.settled()
    assert node.trigger_deactivate() == done and state() == "inactive"
    assert node._worker is None and models[0]() is not None
    bench.camera("front").publishers = lambda: 1
    _, front = bench.diagnostics()
    assert front.level == b"\1" and front.message.startswith("not subscribed"), front.message
    bench.feed("front", 5)
    assert bench.counts("front") == {"received": 2, "processed": 1, "dropped": 1} and bench.masks["front"] == [4]
    assert node.trigger_activate() == done
    bench.feed("front", 6)
    bench.settled()
    assert bench.masks["front"] == [4, 6]
    bench.masks.clear()
    assert node.trigger_deactivate() == done and node.trigger_cleanup() == done and state() == "unconfigured"
    gc.collect()
    assert models[0]() is None and not node.cameras
    assert not [publisher for publisher in node.publishers if "segmentation" in publisher.topic_name]
    assert node.set_parameters([Parameter("cameras", value=["left"])])[0].successful
    assert node.trigger_configure() == done and [camera.name for camera in node.cameras] == ["left"]
    assert node.trigger_shutdown() == done and state() == "finalized"
    gc.collect()
    assert models[1]() is None


def test_a_configure_that_fails_half_way_frees_the_model(make: Callable[..., Bench]) -> None:
    bench = make(autostart="false", cameras=["/camera/left", "/camera/right"])
    models: list[Any] = []

    def load(values: Any, announce: Callable[[str], None]) -> StandIn:
        model = StandIn()
        models.append(weakref.ref(model))
        return model

    bench.node._load = load
    assert bench.node.trigger_configure() == TransitionCallbackReturn.FAILURE
    assert "give the cameras names" in str(bench.node._failure)
    gc.collect()
    assert models[0]() is None


def test_a_transition_that_is_not_allowed_is_refused(make: Callable[..., Bench], monkeypatch: Any) -> None:
    """In every distribution: where rclpy lets it out of the service (humble, jazzy), it would end the process."""
    bench = make(autostart="false")
    service = bench.node._service_change_state
    request = ChangeState.Request(transition=Transition(id=Transition.TRANSITION_ACTIVATE))
    assert not service.callback(request, ChangeState.Response(success=True)).success

    def raises(*_: Any) -> Any:
        raise Refusal("Failed to trigger lifecycle state machine transition: Transition is not registered.")

    monkeypatch.setattr(LifecycleNode, "_LifecycleNodeMixin__change_state", raises)
    assert not service.callback(request, ChangeState.Response(success=True)).success
    assert bench.node._state_machine.current_state[1] == "unconfigured"


@pytest.mark.parametrize("asked", [{"id": 10}, {"id": 12}, {"id": 60}, {"label": "transition_success"}])
def test_a_transition_of_the_nodes_own_is_refused(make: Callable[..., Bench], asked: dict[str, Any]) -> None:
    """While a model loads it would end the transition under way, and with it the process."""
    bench = make()
    answers: list[bool] = []

    def load(values: Any, announce: Callable[[str], None]) -> StandIn:
        request = ChangeState.Request(transition=Transition(**asked))
        answers.append(bench.node._service_change_state.callback(request, ChangeState.Response(success=True)).success)
        return bench.segmenter

    bench.node._load = load
    bench.node.start()
    assert answers == [False] and bench.node._state_machine.current_state[1] == "active"


@pytest.mark.parametrize("wrong", [{"entropy_threshold": 5.0}, {"budget_threshold_max": 0.1}])
def test_what_is_set_while_the_model_loads_is_judged_by_the_model(
    make: Callable[..., Bench], wrong: dict[str, float]
) -> None:
    """What does not fit it is set back; minutes of loading are not lost to it."""
    bench = make(latency_budget_ms=50.0, entropy_threshold=0.25)

    class Limited(StandIn):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "entropy_threshold" and value > 2.4:
                raise ParameterError(f"entropy_threshold is {value}, out of range")
            super().__setattr__(name, value)

    def load(values: Any, announce: Callable[[str], None]) -> StandIn:
        segmenter = Limited()
        segmenter.entropy_threshold = values["entropy_threshold"]
        changes = {"overlay_opacity": 0.75, **wrong}
        for result in bench.node.set_parameters([Parameter(name, value=value) for name, value in changes.items()]):
            assert result.successful, "what it will be judged by is not there yet"
        return segmenter

    bench.node._load = load
    bench.node.start()
    worker = bench.node._worker
    assert (worker.segmenter.entropy_threshold, worker.budget.lowest, worker.opacity) == (0.25, 0.25, 0.75)
    for name in wrong:
        assert bench.node.get_parameter(name).value == bench.node._values[name]
    [result] = bench.node.set_parameters([Parameter("budget_threshold_max", value=0.1)])
    assert not result.successful
    assert bench.node.trigger_deactivate() == TransitionCallbackReturn.SUCCESS
    [result] = bench.node.set_parameters([Parameter("budget_threshold_max", value=0.1)])
    assert not result.successful, "while inactive too, or it could not be activated again"
    assert bench.node.trigger_activate() == TransitionCallbackReturn.SUCCESS


def test_a_budget_that_the_model_itself_breaks_is_refused_at_the_start(make: Callable[..., Bench]) -> None:
    with pytest.raises(ParameterError, match="must be at most 2.398 nats"):
        make(latency_budget_ms=50.0, budget_threshold_max=2.5).start()


def test_a_file_of_parameters_may_be_loaded_that_changes_none(make: Callable[..., Bench]) -> None:
    """As `ros2 param load` does with what `ros2 param dump` wrote; all of them at once, too."""
    node = make(max_batch=2, cameras=["front"]).start().node
    same = [node.get_parameter(name) for name in BY_NAME]
    assert all(result.successful for result in node.set_parameters(same))
    live = Parameter("overlay_opacity", value=0.25)
    assert node.set_parameters_atomically([*same, live]).successful and node._worker.opacity == 0.25
    assert not node.set_parameters_atomically([*same, Parameter("max_batch", value=3)]).successful


def test_diagnostics_go_on_while_a_frame_holds_up_the_end(make: Callable[..., Bench], monkeypatch: Any) -> None:
    monkeypatch.setattr("sparserefine_ros.node.segment_node.REPORT_EVERY_S", 0.1)
    bench = make().start()
    bench.busy()
    sent: list[Any] = []
    bench.node._reporter._publisher.publish = sent.append
    threading.Timer(0.6, bench.segmenter.free.set).start()
    assert bench.node.trigger_deactivate() == TransitionCallbackReturn.SUCCESS
    assert len(sent) >= 2 and {message.status[0].message for message in sent} == {"deactivating"}
    assert bench.diagnostics()[0].message == "inactive" and bench.masks[""] == [1]


def test_a_budget_without_refinement_is_judged_too(make: Callable[..., Bench], monkeypatch: Any) -> None:
    """Nothing can be left out to keep it; it is said, until the budget changes or frames stay away."""
    bench = make(latency_budget_ms=0.001, decoder="dense").start()
    for its in bench.node.cameras:
        its.publishers = lambda: 1

    told = "latency budget of 0.001 ms: frames are .* ms old when they are segmented.*refines nothing"

    def late() -> None:
        bench.feed("", 3)
        bench.until(lambda: bench.node._worker.unaffordable)
        status = bench.diagnostics()[0]
        assert status.level == b"\1" and status.message == rows(status)["degraded"] and re.match(told, status.message)

    late()
    assert "budget_threshold" not in rows(bench.diagnostics()[0])
    monkeypatch.setattr("sparserefine_ros.node.worker.QUIET_S", 0.05)
    time.sleep(0.1)
    assert rows(bench.diagnostics()[0])["degraded"] == ""
    monkeypatch.undo()
    late()
    [result] = bench.node.set_parameters([Parameter("latency_budget_ms", value=60000.0)])
    assert result.successful and rows(bench.diagnostics()[0])["degraded"] == ""
    bench.feed("", 3)
    bench.settled()
    assert rows(bench.diagnostics()[0])["degraded"] == ""


def test_diagnostics_tell_what_the_start_is_at(make: Callable[..., Bench]) -> None:
    """By hand too, when nothing spins: loading lasts longer than the period of the diagnostics."""
    bench = make()
    sent: list[Any] = []
    bench.node._reporter._publisher.publish = sent.append

    def load(values: Any, announce: Callable[[str], None]) -> StandIn:
        announce("loading")
        time.sleep(2.3)
        announce("building engine")
        announce("warming up")
        return bench.segmenter

    bench.node._load = load
    bench.node.start()
    bench.node._tick()
    messages = [message.status[0].message for message in sent]
    loading = messages.index("building engine")
    assert loading >= 2 and messages[:loading] == ["loading"] * loading
    assert messages[loading + 1] == "warming up"
    assert messages[-1].startswith("waiting: nobody publishes")
    assert [rows(message.status[0])["state"] for message in sent][-1] == "active"


def test_percentiles_are_numpys_over_the_window() -> None:
    times = np.random.default_rng(0).gamma(2.0, 20.0, 50)
    window = StageWindow(frames=20)
    assert window.values() == {}
    for number, time_ms in enumerate(times):
        window.add({"dense": time_ms, **({"refine": 2 * time_ms} if number >= 45 else {})})
    values = window.values()
    for stage, known in (("dense", times[-20:]), ("refine", 2 * times[-5:])):
        for p in (50, 95, 99):
            assert values[f"{stage}_p{p}_ms"] == pytest.approx(np.percentile(known, p))
    assert len(values) == 6


def test_percentiles_reach_the_diagnostics(make: Callable[..., Bench]) -> None:
    bench = make().start()
    bench.feed("", 1)
    bench.settled()
    values = rows(bench.diagnostics()[0])
    assert values["dense_p50_ms"] == values["dense_p99_ms"] == "1.000"
    assert float(values["total_p95_ms"]) > 0 and float(values["memory_rss_mb"]) > 10


def test_health_is_read_from_files(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "status").write_text("Name:\tsegment\nVmRSS:\t  250000 kB\n")
    for zone, text in (("0", "41500\n"), ("1", "63250\n"), ("2", "off"), ("3", "")):
        (tmp_path / f"thermal_zone{zone}").mkdir()
        (tmp_path / f"thermal_zone{zone}" / "temp").write_text(text)
    assert device_health("cpu", tmp_path, tmp_path) == {"memory_rss_mb": "256", "temperature_c": "63.2"}
    assert device_health("cpu", tmp_path / "no", tmp_path / "no") == {}


def test_health_of_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3_000_000_000, 8_000_000_000))
    assert device_health("cuda:0", tmp_path, tmp_path) == {"gpu_memory_free_mb": "3000", "gpu_memory_total_mb": "8000"}

    def fails(device: str) -> None:
        raise RuntimeError("driver gone")

    monkeypatch.setattr(torch.cuda, "mem_get_info", fails)
    assert device_health("cuda:0", tmp_path, tmp_path) == {}


def test_a_gpus_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    emptied: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    free_memory()
    assert emptied == [], "must not start CUDA"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    free_memory()
    assert emptied == [1]


def test_a_broken_gpu_keeps_the_node_from_no_transition(make: Callable[..., Bench], monkeypatch: Any) -> None:
    """After an illegal access every CUDA call fails, giving back memory too."""
    import torch

    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", broken)
    bench = make().start()
    node = bench.node
    assert node.trigger_deactivate() == node.trigger_cleanup() == TransitionCallbackReturn.SUCCESS
    node._load = lambda values, announce: broken()
    assert node.trigger_configure() == TransitionCallbackReturn.FAILURE
    assert node._state_machine.current_state[1] == "unconfigured" and "illegal" in str(node._failure)
