"""The node's own behaviour, with a stand-in segmenter: newest wins, failures cost one frame, memory runs out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

rclpy = pytest.importorskip("rclpy")

from lifecycle_msgs.msg import Transition  # noqa: E402
from lifecycle_msgs.srv import ChangeState  # noqa: E402
from rclpy.context import Context  # noqa: E402
from rclpy.lifecycle import TransitionCallbackReturn  # noqa: E402
from rclpy.parameter import Parameter  # noqa: E402
from rclpy.qos import DurabilityPolicy, QoSProfile  # noqa: E402
from rclpy.serialization import serialize_message  # noqa: E402
from ros_client import fill_image  # noqa: E402
from sensor_msgs.msg import Image  # noqa: E402
from std_msgs.msg import Header  # noqa: E402

from sparserefine_ros.datasets.classes import CAMVID  # noqa: E402
from sparserefine_ros.errors import FrameError, ParameterError  # noqa: E402
from sparserefine_ros.node import labels, serialized  # noqa: E402
from sparserefine_ros.node.cdr import read_message  # noqa: E402
from sparserefine_ros.node.outputs import Outputs  # noqa: E402
from sparserefine_ros.node.parameters import BY_NAME  # noqa: E402
from sparserefine_ros.node.process import free_domain_id  # noqa: E402
from sparserefine_ros.node.qos import QosWatch  # noqa: E402
from sparserefine_ros.node.segment_node import SegmentNode  # noqa: E402
from sparserefine_ros.node.status import Counters, FrameReport, diagnostics, judge  # noqa: E402
from sparserefine_ros.segmenter.segmenter import Segmentation  # noqa: E402


class StandIn:
    """Answers with a mask of the image's first channel; raises what it is told to, once each."""

    classes = CAMVID
    bundle = SimpleNamespace(name="stand-in", entropy_threshold=0.5, decoders=("dense", "sparserefine"))
    refines, device, precision, sparse_backend = True, "cpu", "fp32", "torch"
    has_superpixels, runtime, under_way, degraded = False, "torch", "", ""
    entropy_threshold = 0.5

    def __init__(self) -> None:
        self.errors: list[Exception] = []
        self.calls: list[tuple[int, bool | None]] = []
        self.free = threading.Event()
        self.free.set()

    def segment(self, images: list[np.ndarray], refine: bool | None = None) -> list[Segmentation]:
        self.calls.append((int(images[0][0, 0, 0]), refine))
        self.free.wait(10)
        if self.errors:
            raise self.errors.pop(0)
        mask = np.ascontiguousarray(images[0][..., 0])
        return [Segmentation(mask, mask, mask.astype(np.float32), 0.25, {"dense": 1.0})]


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[Context]:
    monkeypatch.setenv("ROS_LOG_DIR", str(tmp_path))
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    result = Context()
    rclpy.init(context=result, domain_id=free_domain_id())
    yield result
    result.try_shutdown()


@pytest.mark.parametrize("by_hand", [(), ("configure",), ("configure", "activate"), ("shutdown",)])
def test_start_goes_on_from_what_was_done_by_hand(context: Context, by_hand: tuple[str, ...]) -> None:
    """~/change_state is there before main() starts the node, which such a call must not make fail."""
    loads: list[object] = []

    def load(values: object, announce: object) -> Any:
        loads.append(values)
        return StandIn()

    node = SegmentNode(load, context=context)
    try:
        for label in by_hand:
            request = ChangeState.Request(transition=Transition(label=label))
            assert node._service_change_state.callback(request, ChangeState.Response()).success
        node.start()
        ended = by_hand == ("shutdown",)
        assert node._state_machine.current_state[1] == ("finalized" if ended else "active")
        assert len(loads) == (0 if ended else 1)
    finally:
        node.destroy_node()


class Bench:
    """A node fed by hand, and what it would have published."""

    def __init__(self, context: Context, **parameters: Any) -> None:
        self.segmenter = StandIn()
        overrides = [Parameter(name, value=value) for name, value in parameters.items()]
        self.node = SegmentNode(lambda values, announce: self.segmenter, context=context, parameter_overrides=overrides)
        self.node.start()
        [self.camera] = self.node.cameras
        self.masks: list[tuple[Header, np.ndarray]] = []
        self.camera.outputs.publish = lambda header, image, result, opacity: self.masks.append((header, result.mask))

    def feed(self, value: int, **changes: Any) -> None:
        image = np.full((4, 6, 3), value, np.uint8)
        message = fill_image(Image(), Header(frame_id=f"camera{value}"), image, "rgb8")
        for name, changed in changes.items():
            setattr(message, name, changed)
        self.node._receive(self.camera, serialize_message(message))

    def until(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not done():
            assert time.monotonic() < deadline, self.counts()
            time.sleep(0.005)

    def counts(self) -> dict[str, int]:
        return self.camera.counters.values()

    def processed(self, number: int) -> None:
        self.until(lambda: self.counts()["processed"] == number)


@pytest.fixture
def make(context: Context) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def one(**parameters: Any) -> Bench:
        made.append(Bench(context, **parameters))
        return made[-1]

    yield one
    for bench in made:  # a worker left running would keep pytest from ending
        bench.segmenter.free.set()
        bench.node.destroy_node()


@pytest.fixture
def bench(make: Callable[..., Bench]) -> Bench:
    return make()


def test_newest_frame_wins_while_the_worker_is_busy(bench: Bench) -> None:
    bench.segmenter.free.clear()
    bench.feed(1)
    bench.until(lambda: bench.segmenter.calls == [(1, None)])
    for value in (2, 3, 4, 5):
        bench.feed(value)  # returns at once although the worker is busy
    bench.segmenter.free.set()
    bench.processed(2)
    assert [mask[0, 0] for _, mask in bench.masks] == [1, 5]
    assert [header.frame_id for header, _ in bench.masks] == ["camera1", "camera5"]
    counts = bench.counts()
    assert (counts["received"], counts["processed"], counts["dropped"]) == (5, 2, 3)


def test_queue_all_keeps_order_up_to_its_bound(make: Callable[..., Bench]) -> None:
    bench = make(queue="all", queue_size=3)
    bench.segmenter.free.clear()
    bench.feed(1)
    bench.until(lambda: len(bench.segmenter.calls) == 1)
    for value in (2, 3, 4, 5):
        bench.feed(value)
    bench.segmenter.free.set()
    bench.processed(4)
    assert [mask[0, 0] for _, mask in bench.masks] == [1, 3, 4, 5]
    assert bench.counts()["dropped"] == 1


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), FrameError("too odd"), ZeroDivisionError("zero")])
def test_a_failing_frame_costs_itself_only(bench: Bench, error: Exception) -> None:
    bench.segmenter.errors = [error]
    bench.feed(1)
    bench.until(lambda: bench.counts()["failed"] == 1)
    bench.feed(2)
    bench.processed(1)
    assert [mask[0, 0] for _, mask in bench.masks] == [2]


def test_malformed_frames_never_reach_the_segmenter(bench: Bench) -> None:
    for number, changes in enumerate(({"encoding": "yuv"}, {"step": 1}, {"height": 0}), 1):
        bench.feed(9, **changes)
        bench.until(lambda number=number: bench.counts()["malformed"] == number)
    bench.feed(3)
    bench.processed(1)
    assert bench.segmenter.calls == [(3, None)]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")])
def test_out_of_memory_falls_back_to_the_dense_mask(bench: Bench, error: Exception) -> None:
    bench.segmenter.errors = [error]
    bench.feed(7)
    bench.processed(1)
    assert bench.segmenter.calls == [(7, None), (7, False)]
    assert bench.masks[0][1][0, 0] == 7
    assert bench.counts()["unrefined"] == 1 and bench.counts()["failed"] == 0
    bench.feed(8)
    bench.processed(2)
    assert bench.segmenter.calls[2:] == [(8, None)], "the next frame is refined again"


def test_out_of_memory_twice_fails_the_frame(bench: Bench) -> None:
    bench.segmenter.errors = [MemoryError(), MemoryError()]
    bench.feed(7)
    bench.until(lambda: bench.counts()["failed"] == 1)
    assert bench.counts()["processed"] == 0 and bench.counts()["unrefined"] == 0


class Recorder:
    """A publisher with as many subscribers as it is told."""

    def __init__(self, subscribers: int, durability: DurabilityPolicy = DurabilityPolicy.VOLATILE) -> None:
        self.subscribers, self.qos_profile = subscribers, QoSProfile(depth=1, durability=durability)
        self.sent: list[Any] = []
        self.publish = self.sent.append

    def get_subscription_count(self) -> int:
        return self.subscribers


@pytest.mark.parametrize("watched", [[], ["mask"], ["confidence", "color"], ["overlay"], ["overlay", "entropy"]])
def test_pictures_are_made_only_while_somebody_looks(
    bench: Bench, watched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serialized, "RCL", None)  # it wants publishers that exist
    outputs = Outputs(QosWatch(bench.node), CAMVID, superpixels=False)
    outputs._images = {name: Recorder(name in watched) for name in outputs._images}
    outputs._timing = Recorder(0)
    image = np.zeros((4, 6, 3), np.uint8)
    header = Header(frame_id="camera")
    outputs.publish(header, image, bench.segmenter.segment([image])[0], 0.5)
    outputs.publish_timing(header, FrameReport(0.5, 1.0, {}), "tiny")
    sent = {name for name, recorder in outputs._images.items() if recorder.sent}
    assert sent == set(watched)
    messages = [read_message(recorder.sent[0], Image) for recorder in outputs._images.values() if recorder.sent]
    assert all(message.header == header for message in messages)
    outputs._images["mask"] = latched = Recorder(0, DurabilityPolicy.TRANSIENT_LOCAL)
    outputs.publish(header, image, bench.segmenter.segment([image])[0], 0.5)
    assert len(latched.sent) == 1, "who comes late gets the last of a latched topic"
    outputs._png = latched = Recorder(0, DurabilityPolicy.TRANSIENT_LOCAL)
    outputs.publish(header, image, bench.segmenter.segment([image])[0], 0.5)
    assert len(latched.sent) == 1 and latched.sent[0].format.startswith("mono8; png")
    assert outputs._timing.sent == []
    outputs._timing.subscribers = 1
    outputs.publish_timing(header, FrameReport(0.5, 1.0, {}), "tiny")
    assert len(outputs._timing.sent) == 1


def test_live_parameters_reach_the_segmenter(bench: Bench) -> None:
    [result] = bench.node.set_parameters([Parameter("entropy_threshold", value=0.125)])
    assert result.successful and bench.segmenter.entropy_threshold == 0.125
    [result] = bench.node.set_parameters([Parameter("entropy_threshold", value="auto")])
    assert result.successful and bench.segmenter.entropy_threshold == 0.5
    [result] = bench.node.set_parameters([Parameter("entropy_threshold", value="much")])
    assert not result.successful and "'much'" in result.reason and bench.segmenter.entropy_threshold == 0.5
    [result] = bench.node.set_parameters([Parameter("overlay_opacity", value=0)])
    assert result.successful and bench.node._worker.opacity == 0.0


def test_parameters_set_together_take_effect_together_or_not_at_all(bench: Bench) -> None:
    together = lambda **values: bench.node.set_parameters_atomically(  # noqa: E731
        [Parameter(name, value=value) for name, value in values.items()]
    )
    assert together(latency_budget_ms=50.0, budget_threshold_min=0.1, budget_threshold_max=0.4).successful
    budget = bench.node._worker.budget
    assert (budget.budget_ms, budget.lowest, budget.highest) == (50.0, 0.1, 0.4)
    result = together(budget_threshold_min=0.6, budget_threshold_max=0.9, entropy_threshold=0.7)
    assert result.successful, result.reason
    budget = bench.node._worker.budget
    assert (budget.budget_ms, budget.lowest, budget.highest) == (50.0, 0.6, 0.9)
    assert not together(entropy_threshold=0.2, overlay_opacity=0.1, qos_depth=7).successful, "one is read-only"
    assert not together(entropy_threshold=0.2, overlay_opacity=0.1, budget_threshold_max=0.5).successful
    assert bench.segmenter.entropy_threshold == 0.7 and bench.node._worker.opacity == 0.5
    assert bench.node._worker.budget is budget


def test_no_parameter_can_be_deleted(make: Callable[..., Bench]) -> None:
    """`ros2 param delete /segment cameras` would leave a node that cannot be configured again."""
    node = make().node
    assert node.trigger_deactivate() == node.trigger_cleanup() == TransitionCallbackReturn.SUCCESS
    for name in BY_NAME:
        [result] = node.set_parameters([Parameter(name, Parameter.Type.NOT_SET)])
        assert not result.successful, name
    assert node.set_parameters([Parameter("cameras", value=[])])[0].successful
    assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"qos_depth": 0}, ["qos_depth", "1 to 1000"]),
        ({"entropy_threshold": 7.5}, ["7.5", "auto, 0 to 5.5413"]),
        ({"queue": "oldest"}, ["'oldest'", "newest, all"]),
        ({"model": 5}, ["model", "5"]),
    ],
)
def test_bad_parameters_stop_the_start(
    make: Callable[..., Bench], parameters: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ParameterError) as error:
        make(**parameters)
    for word in words:
        assert word in str(error.value)


def test_diagnostics_tell_counters_and_density(bench: Bench) -> None:
    sent: list[Any] = []
    bench.node._reporter._publisher.publish = sent.append
    bench.feed(1)
    bench.processed(1)
    bench.node._tick()
    status = sent[0].status[0]
    values = {row.key: row.value for row in status.values}
    assert status.name == "segment: segmentation" and status.hardware_id == "stand-in"
    assert (values["received"], values["processed"], values["density"]) == ("1", "1", "0.250000")
    assert values["publishers"] == "0" and status.message.startswith("waiting: nobody publishes")


ZERO = Counters().values()


@pytest.mark.parametrize(
    ("complaint", "changes", "publishers", "level", "words"),
    [
        ("", {"received": 3, "processed": 3}, 1, "ok", "segmenting"),
        ("", {}, 1, "ok", "waiting for the first image"),
        ("", {}, 0, "warn", "nobody publishes"),
        ("no image for 5 s", {}, 1, "warn", "no image for 5 s"),
        ("", {"received": 2, "malformed": 1}, 1, "warn", "1 malformed"),
        ("", {"processed": 2, "unrefined": 2}, 1, "warn", "out of memory: 2"),
        ("silence", {"failed": 1, "malformed": 4}, 1, "error", "1 frame(s) failed"),
    ],
)
def test_diagnostic_level(complaint, changes, publishers, level, words) -> None:
    got, message = judge(complaint, ZERO, ZERO | changes, publishers)
    assert got == level and words in message


def test_only_new_trouble_counts() -> None:
    old = ZERO | {"processed": 5, "malformed": 3, "failed": 2}
    assert judge("", old, old | {"received": 6, "processed": 6}, 1) == ("ok", "segmenting")


def test_counters_add_up_across_threads() -> None:
    counters = Counters()
    threads = [
        threading.Thread(target=lambda: [counters.add(received=1, dropped=2) for _ in range(500)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counters.values() == ZERO | {"received": 2000, "dropped": 4000}


def test_timing_message_keeps_the_header() -> None:
    header = Header(frame_id="camera")
    report = FrameReport(0.5, 1.25, {"dense": 2.0, "total": 3.5})
    message = diagnostics(header, "segment: timing", "ok", "", "tiny", report.key_values())
    assert message.header == header
    rows = {row.key: float(row.value) for row in message.status[0].values}
    assert rows == {"density": 0.5, "entropy_threshold": 1.25, "dense_ms": 2.0, "total_ms": 3.5}


def test_label_info_lists_every_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "LabelInfo", lambda: SimpleNamespace(header=SimpleNamespace()))
    monkeypatch.setattr(labels, "VisionClass", SimpleNamespace)
    message = labels.label_info(CAMVID, "now")
    assert message.header.stamp == "now"
    assert [(row.class_id, row.class_name) for row in message.class_map] == list(enumerate(CAMVID.names))
