"""The thread that decodes, segments and publishes.

Frames that are replaced before their turn are never deserialized. A malformed frame costs itself only, and so does one
that the segmenter fails at: where a batch fails, its frames are tried one by one.
"""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from sparserefine_ros.errors import FrameError, is_out_of_memory
from sparserefine_ros.node.budget import unaffordable, unhelped
from sparserefine_ros.node.camera import Camera
from sparserefine_ros.node.cdr import read_message
from sparserefine_ros.node.conversion import to_rgb
from sparserefine_ros.node.logs import Throttle
from sparserefine_ros.node.mask_transport import at_scale, scaled_size, shrink
from sparserefine_ros.node.percentiles import StageWindow
from sparserefine_ros.node.receipt import Receipt
from sparserefine_ros.node.scheduler import Scheduler
from sparserefine_ros.node.status import FrameReport

if TYPE_CHECKING:
    from sparserefine_ros.segmenter.latency_budget import LatencyBudget
    from sparserefine_ros.segmenter.segmenter import Choose, Segmentation, Segmenter

QUIET_S = 5.0  # at most one warning of a kind, and of a camera, in this time
POLL_S = 0.1


@dataclass(frozen=True)
class Frame:
    """A decoded frame; times in seconds of time.perf_counter."""

    camera: Camera
    receipt: Receipt
    header: Any
    image: np.ndarray  # [H, W, 3] uint8 RGB
    start: float  # when its decoding began
    decoded: float


@dataclass(frozen=True)
class Done:
    """A frame's result, or the error that it cost."""

    result: Segmentation | None
    refined: bool = True
    error: Exception | None = None


class Worker:
    """Serves the scheduler's batches until `stop`. `ok` tells whether publishing still makes sense.

    opacity, scale (of what is published) and budget may be set between any two frames.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        scheduler: Scheduler[Camera],
        logger: Any,
        ok: Callable[[], bool],
        opacity: float,
        scale: float = 1.0,
        budget: LatencyBudget | None = None,
    ) -> None:
        self.segmenter, self.scheduler = segmenter, scheduler
        self.opacity, self.scale = opacity, scale
        self._budget = budget
        self._late = ("", -math.inf)  # why the budget was not held, and when that was
        self.stages = StageWindow()
        self._logger, self._ok, self._due = logger, ok, Throttle(QUIET_S)
        self._open: set[Camera] = set()  # whose frame of the batch in work is not counted yet
        self._thread = threading.Thread(target=self._work, name="segment")
        self._thread.start()

    def stop(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Returns when the batch in work is published; frames that wait are counted as dropped.

        meanwhile: called now and then, where that takes long.
        """
        for camera, dropped in self.scheduler.close().items():
            camera.counters.add(dropped=dropped)
        self._thread.join(POLL_S)
        while self._thread.is_alive():
            meanwhile()
            self._thread.join(POLL_S)

    @property
    def budget(self) -> LatencyBudget | None:
        """The latency budget in force."""
        return self._budget

    @budget.setter
    def budget(self, budget: LatencyBudget | None) -> None:
        self._budget = budget
        self._late = ("", -math.inf)

    @property
    def unaffordable(self) -> str:
        """Why the budget was not held for the last frame, if it was not and that is not long ago."""
        why, at = self._late
        return why if time.monotonic() - at < QUIET_S else ""

    def _work(self) -> None:
        while batch := self.scheduler.take():
            self._open = {camera for camera, _ in batch}
            try:
                if not self._work_on(batch):
                    return
            except Exception as error:  # memory may end anywhere; without this thread the node would fall silent
                for camera in tuple(self._open):
                    self._failed(camera, f"the worker stumbled: {type(error).__name__}: {error}")

    def _work_on(self, batch: list[tuple[Camera, Receipt]]) -> bool:
        """Decodes, segments, publishes; False when the node has been shut down meanwhile."""
        frames = [frame for camera, data in batch if (frame := self._decode(camera, data))]
        groups: dict[tuple[int, ...], list[Frame]] = defaultdict(list)
        for frame in frames:
            groups[frame.image.shape].append(frame)
        return all(self._serve(group) for group in groups.values())

    def _decode(self, camera: Camera, receipt: Receipt) -> Frame | None:
        start = time.perf_counter()
        try:
            message = read_message(receipt.data, camera.message_type)
            image = to_rgb(message)
        except Exception as error:  # whatever a sender does may cost its frame, never the node
            if is_out_of_memory(error):  # not the sender's fault
                self._failed(camera, f"decoding it ran out of memory: {error}")
                return None
            self._open.discard(camera)
            camera.counters.add(malformed=1)
            if self._due(("malformed", camera)):
                self._logger.warning(f"malformed frame on {camera.image_topic} skipped: {error}")
            return None
        self.scheduler.measured(camera, (image.shape[0], image.shape[1]))
        return Frame(camera, receipt, message.header, image, start, time.perf_counter())

    def _serve(self, frames: list[Frame]) -> bool:
        """Segments frames of one size and publishes their masks; False when the node has been shut down meanwhile."""
        budget, threshold, start = self.budget, self.segmenter.entropy_threshold, time.perf_counter()
        choose = partial(self._choose, budget, frames) if budget is not None and self.segmenter.refines else None
        results = self._segment(frames, choose)
        segment_ms = (time.perf_counter() - start) * 1e3
        for frame, done in zip(frames, results, strict=True):
            error = done.error
            if done.result is not None:
                if choose is not None:  # nothing is above infinity: the frame was left dense
                    threshold = math.inf if done.result.threshold is None else done.result.threshold
                try:
                    self._publish(frame, done, threshold, segment_ms)
                except Exception as failure:
                    error = failure
            if error is not None:
                if not self._ok():
                    return False
                what = str(error) if isinstance(error, FrameError) else f"{type(error).__name__}: {error}"
                self._failed(frame.camera, f"segmenting it failed: {what}")
        if budget is not None and choose is None:
            self._tell(unhelped(budget, _age_ms(frames)))
        elif budget is not None and all(done.result is not None and done.refined for done in results):
            budget.observe(_age_ms(frames))
        return True

    def _failed(self, camera: Camera, why: str) -> None:
        if camera in self._open:  # else its mask is out
            self._open.remove(camera)
            camera.counters.add(failed=1)
        if self._due(("failed", camera)):
            self._logger.error(f"frame of {camera.image_topic} skipped, {why}")

    def _choose(self, budget: LatencyBudget, frames: list[Frame], entropy: np.ndarray, pixels: int) -> float | None:
        """The threshold of a batch, by the age of its oldest frame."""
        spent_ms = _age_ms(frames)
        threshold = budget.choose(spent_ms, entropy, pixels)
        self._tell("" if threshold is not None else unaffordable(budget, spent_ms))
        return threshold

    def _tell(self, late: str) -> None:
        """Notes why the budget is not held, empty where it is."""
        self._late = (late, time.monotonic())
        if late and self._due("budget"):
            self._logger.warning(late)

    def _segment(self, frames: list[Frame], choose: Choose | None) -> list[Done]:
        segment = self.segmenter.segment if choose is None else partial(self.segmenter.segment, choose=choose)
        if len(frames) == 1:
            return [self._segment_one(frames[0], segment)]
        try:
            return [Done(result) for result in segment([frame.image for frame in frames])]
        except Exception as error:
            if self._due("batch"):
                self._logger.warning(
                    f"a batch of {len(frames)} frames failed, each is tried alone: {type(error).__name__}: {error}"
                )
        # Outside the handler: while it runs, the traceback keeps the failed attempt's tensors alive.
        return [self._segment_one(frame, segment) for frame in frames]

    def _segment_one(self, frame: Frame, segment: Callable[..., list[Segmentation]]) -> Done:
        """One frame; where memory runs out, its dense mask rather than none."""
        try:
            return Done(segment([frame.image])[0])
        except Exception as error:
            if not is_out_of_memory(error):
                return Done(None, error=error)
            height, width = frame.image.shape[:2]
            if self._due(("memory", height, width)):
                self._logger.warning(
                    f"out of memory at {width} x {height}, frame segmented without refinement; raise "
                    "entropy_threshold, or free memory"
                )
        try:
            return Done(self.segmenter.segment([frame.image], refine=False)[0], refined=False)
        except Exception as error:
            return Done(None, error=error)

    def _publish(self, frame: Frame, done: Done, threshold: float, segment_ms: float) -> None:
        """``segment_ms`` is the time that the segmenter took for the batch."""
        camera, outputs, header, scale, result = (
            frame.camera,
            frame.camera.outputs,
            frame.header,
            self.scale,
            done.result,
        )
        assert result is not None
        start = time.perf_counter()
        outputs.publish(header, frame.image, at_scale(result, scale), self.opacity)
        if outputs.wanted("superpixels"):
            ids, size = self.segmenter.superpixels(frame.image), scaled_size(frame.image.shape, scale)
            outputs.publish_superpixels(header, shrink(frame.image, size), shrink(ids, size))
        published = time.perf_counter()
        stages = {
            **({"transport": frame.receipt.age_s * 1e3} if frame.receipt.believed else {}),  # from stamp to receipt
            "wait": (frame.start - frame.receipt.at) * 1e3,
            "decode": (frame.decoded - frame.start) * 1e3,
            **result.stage_ms,
            "segment": segment_ms,
            "publish": (published - start) * 1e3,
            "total": (published - frame.start) * 1e3,
            "latency": frame.receipt.latency_ms(published),  # from stamp to publish
        }
        report = FrameReport(result.density, threshold, stages)
        self._open.discard(camera)
        camera.processed(header.stamp.sec * 10**9 + header.stamp.nanosec, report, done.refined)
        self.stages.add(stages)
        outputs.publish_timing(header, report, self.segmenter.bundle.name)


def _age_ms(frames: list[Frame]) -> float:
    """Milliseconds since the stamp of the oldest."""
    now = time.perf_counter()
    return max(frame.receipt.latency_ms(now) for frame in frames)
