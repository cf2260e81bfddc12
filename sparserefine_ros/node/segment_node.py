"""The node `segment`: images in, masks out, as a lifecycle node.

    unconfigured --configure--> inactive --activate--> active
                 <--cleanup----          <-deactivate-

configure reads the parameters, loads the model and makes the topics; activate subscribes and starts the worker. A
subscription callback puts the serialized image into its camera's slot and returns; the worker's thread does the rest.
The model is loaded in a thread of its own, so that diagnostics tell how far it is. By default main() drives the node
up to active (`SegmentNode.start`).
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any

from lifecycle_msgs.msg import Transition
from rclpy import get_rmw_implementation_identifier
from rclpy.clock import Clock, ClockType
from rclpy.executors import ExternalShutdownException
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter as RosParameter
from std_srvs.srv import SetBool

from sparserefine_ros.errors import ParameterError, SparseRefineError
from sparserefine_ros.node.budget import BUDGET_PARAMETERS, budget_values, make_budget
from sparserefine_ros.node.camera import Camera
from sparserefine_ros.node.declare import current, declare, on_change
from sparserefine_ros.node.device_health import device_health, free_memory
from sparserefine_ros.node.logs import RosHandler, Throttle
from sparserefine_ros.node.model import LOADING, Announce, number_or_none, start_segmenter
from sparserefine_ros.node.parameters import BY_NAME, Value
from sparserefine_ros.node.priority import ReceivePriority
from sparserefine_ros.node.qos import QosWatch
from sparserefine_ros.node.receipt import received
from sparserefine_ros.node.refusal import Refusal
from sparserefine_ros.node.reports import NodeState, Reporter
from sparserefine_ros.node.rig import Rig
from sparserefine_ros.node.scheduler import Scheduler
from sparserefine_ros.node.transport import loses_images, on_fast_dds, remedy, stamp_of
from sparserefine_ros.node.worker import Worker

if TYPE_CHECKING:
    from sparserefine_ros.segmenter.latency_budget import LatencyBudget
    from sparserefine_ros.segmenter.segmenter import Segmenter

LABELS_EVERY = 10  # diagnostics between two repetitions of the class list
COMPLAIN_EVERY_S = 30.0  # in the log, about the same camera's lost images
DISABLED = "disabled by ~/enable: frames are dropped"
REPORT_EVERY_S = 1.0
POLL_S = 0.1
HAND_OVER_S = 0.0001
"""After a frame's receipt the executor's thread rests, so that the worker has the GIL at once. Else it would wait until
the executor has gone through all entities of the node: 0.5 ms of every frame rather than 0.15."""

Load = Callable[[Mapping[str, Value], Announce], "Segmenter"]


class SegmentNode(LifecycleNode):
    """See the README for topics and parameters, docs/cameras.md for several cameras and the lifecycle.

    Raises ParameterError for a parameter that does not fit its table.
    """

    def __init__(self, load: Load = start_segmenter, **node_options: Any) -> None:
        super().__init__("segment", **node_options)
        self.autostart = declare(self)["autostart"] == "true"
        self._log_handler = RosHandler(self.get_logger())
        self._load = load
        self._spin: Callable[..., None] | None = None
        self._values: dict[str, Value] | None = None  # while configured, or about to be
        self._segmenter: Segmenter | None = None
        self._worker: Worker | None = None
        self._failure: Exception | None = None
        self._enabled = True
        self._state = "unconfigured"
        self.loader: threading.Thread | None = None
        self._rig: Rig | None = None
        self.priority = ReceivePriority(0)
        self._qos = QosWatch(self)
        self._rmw = get_rmw_implementation_identifier()
        self._lossy = loses_images(self._rmw)
        self._due = Throttle(COMPLAIN_EVERY_S)
        on_change(self, self._change)
        self._reporter = Reporter(self)
        self._ticks = 0
        # A steady clock: with use_sim_time the node must be able to say that no /clock and no image comes.
        self._timer = self.create_timer(REPORT_EVERY_S, self._tick, clock=Clock(clock_type=ClockType.STEADY_TIME))
        self._change_state = self._service_change_state.callback
        self._service_change_state.callback = self._on_change_state
        self._enable = self.create_service(SetBool, "~/enable", self._on_enable)

    # Transitions -----------------------------------------------------------------------------------------------------

    def start(self, spin: Callable[..., None] | None = None) -> None:
        """Configures and activates the node; raises whatever kept it from that.

        ~/change_state may have been called before: the node goes on from there, and one shut down by it stays so.

        spin: serves parameters and the like while the model loads, an executor's `spin_once`.
        """
        self._spin = spin
        try:
            for state, trigger in (("unconfigured", self.trigger_configure), ("inactive", self.trigger_activate)):
                if self._state == state and trigger() != TransitionCallbackReturn.SUCCESS:
                    raise self._failure or RuntimeError(f"the transition {trigger.__name__} failed")
        finally:
            self._spin = None
        if self._state != "active":
            self.get_logger().warning(f"autostart leaves the node {self._state}, as ~/change_state made it")

    def _on_change_state(self, request: Any, response: Any) -> Any:
        """Service ~/change_state, lifecycle_msgs/ChangeState. The rclpy of humble and jazzy raises for a transition
        that the state does not allow, which would end the process; and every rclpy takes those that only a transition
        under way may ask for."""
        label, number = request.transition.label, request.transition.id
        private = label.startswith("transition_") if label else number >= Transition.TRANSITION_ON_CONFIGURE_SUCCESS
        if private:
            self.get_logger().error(f"transition {label or number} refused: it is for the node itself to ask for")
            response.success = False
            return response
        try:
            return self._change_state(request, response)
        except Refusal as error:
            self.get_logger().error(f"transition {request.transition.label or request.transition.id} refused: {error}")
            response.success = False
            return response

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Parameters, model, topics. A failure is logged and leaves the node unconfigured."""
        return self._attempt(self._configure, self._release)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Subscriptions and worker."""
        return self._attempt(self._activate, self._stop)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Masks stop, when the batch in work is done; the model stays."""
        return self._attempt(self._stop)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Model and topics go."""
        return self._attempt(self._release)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """From any state, for good."""
        result = self._attempt(self._release)
        self._state = "finalized"
        return result

    def _attempt(self, step: Callable[[], None], undo: Callable[[], None] = lambda: None) -> TransitionCallbackReturn:
        self._failure = None
        try:
            step()
        except ExternalShutdownException:
            # Past rclpy, which would complain that it cannot publish the transition any more.
            raise SystemExit(0) from None
        except Exception as error:  # rclpy would swallow it
            self._failure = error
            traceback.clear_frames(error.__traceback__)  # they hold the model that is to go
            undo()
            if self.context.ok():
                what = str(error) if isinstance(error, SparseRefineError) else f"{type(error).__name__}: {error}"
                self.get_logger().error(what)
            return TransitionCallbackReturn.FAILURE
        return TransitionCallbackReturn.SUCCESS

    def _configure(self) -> None:
        self._values = values = current(self)
        self._state = LOADING
        self._segmenter = segmenter = self._loaded(values)
        self._take_up(values)
        self._rig = Rig(self._qos, values, segmenter.classes, segmenter.has_superpixels)
        self._state = "inactive"
        self.get_logger().info(
            f"configured: {self._description(segmenter)}, entropy threshold {segmenter.entropy_threshold:.4g} nats"
        )

    def _activate(self) -> None:
        values, segmenter, rig = self._values, self._segmenter, self._rig
        assert values is not None and segmenter is not None and rig is not None
        if self._lossy:
            self.get_logger().warning(f"Fast DDS will lose most large images with its default settings: {remedy()}")
        capacity = int(values["queue_size"]) if values["queue"] == "all" else 1
        window_s = float(values["batch_window_ms"]) / 1e3
        scheduler: Scheduler[Camera] = Scheduler(capacity, int(values["max_batch"]), window_s)
        opacity, scale = (float(self.get_parameter(name).value) for name in ("overlay_opacity", "output_scale"))
        budget = self._budget(segmenter)
        self._worker = Worker(segmenter, scheduler, self.get_logger(), self.context.ok, opacity, scale, budget)
        rig.open(scheduler, self._receive)
        self.priority = ReceivePriority(int(values["receive_priority"]))
        if refusal := self.priority.take():
            self.get_logger().info(f"{refusal} (receive_priority is {self.priority.priority})")
        self._state = "active"
        self.get_logger().info(f"ready: images from {', '.join(rig.topics)}")

    def _stop(self) -> None:
        self.priority.give_back()
        if self._rig is not None:
            self._rig.close()
        if self._worker is not None:
            self._state = "deactivating"
            due = Throttle(REPORT_EVERY_S)
            self._worker.stop(lambda: self._report() if self.context.ok() and due("report") else None)
            self._worker = None
        self._state = "inactive"

    def _release(self) -> None:
        self._stop()
        if self._rig is not None:
            self._rig.destroy()
        self._rig = self._segmenter = self._values = None
        self._state = "unconfigured"
        free_memory()

    def destroy_node(self) -> None:
        """Stops the worker, which finishes the batch it is at, before the publishers go."""
        if hasattr(self, "_enable"):  # the last thing made
            self._release()
        if hasattr(self, "_log_handler"):
            self._log_handler.close()
        super().destroy_node()

    # The model -------------------------------------------------------------------------------------------------------

    def _loaded(self, values: Mapping[str, Value]) -> Segmenter:
        """The model, loaded in a thread; meanwhile diagnostics go on. ExternalShutdownException when told to end."""
        future: Future[Segmenter] = Future()

        def load() -> None:
            try:
                future.set_result(self._load(values, self._announce))
            except BaseException as error:
                future.set_exception(error)

        self.loader = threading.Thread(target=load, name="load", daemon=True)
        self.loader.start()
        due = Throttle(REPORT_EVERY_S)
        while not future.done():
            if self._spin is not None:
                self._spin(timeout_sec=POLL_S)
            else:  # a transition asked for by service blocks the executor, and with it the timer
                wait([future], POLL_S)
                if due("report"):
                    self._report()
            if not self.context.ok():
                raise ExternalShutdownException()
        return future.result()

    def _announce(self, state: str) -> None:
        self._state = state
        self.get_logger().info(state)
        if self.context.ok():
            self._report()

    @staticmethod
    def _description(s: Segmenter) -> str:
        kinds = [kind for kind in s.bundle.decoders if kind not in ("dense", "sparserefine")]
        decoder = " + ".join([*kinds, *(["sparserefine"] if s.refines else [])]) or "dense"
        engine = f", sparse backend {s.sparse_backend}" if s.refines else ""
        what = f"model {s.bundle.name} ({decoder}, {len(s.classes)} classes)"
        return f"{what} on {s.device}, {s.precision}, runtime {s.runtime}{engine}"

    def _change(self, values: Mapping[str, Value]) -> None:
        """Parameters change while running, all of them or none; raises ParameterError to refuse them."""
        for name, value in values.items():
            if self._values is not None and not BY_NAME[name].live and value != self._values[name]:
                raise ParameterError(
                    f"'{name}' is read-only while the node is configured; first deactivate it and clean it up "
                    "(ros2 lifecycle set)"
                )
        if self._segmenter is not None and not values.keys().isdisjoint(("entropy_threshold", *BUDGET_PARAMETERS)):
            before = self._segmenter.entropy_threshold
            if "entropy_threshold" in values:
                number = number_or_none(values["entropy_threshold"])
                auto = self._segmenter.bundle.entropy_threshold
                self._segmenter.entropy_threshold = auto if number is None else number
            try:
                self._set_budget(**{name: value for name, value in values.items() if name in BUDGET_PARAMETERS})
            except ParameterError:
                self._segmenter.entropy_threshold = before
                raise
        if self._worker is not None:
            self._worker.opacity = float(values.get("overlay_opacity", self._worker.opacity))
            self._worker.scale = float(values.get("output_scale", self._worker.scale))

    def _set_budget(self, **changed: Value) -> None:
        if self._segmenter is not None:
            budget = self._budget(self._segmenter, **changed)
            if self._worker is not None:
                self._worker.budget = budget

    def _take_up(self, values: Mapping[str, Value]) -> None:
        """What was set while the model loaded; set back, all of it, where it does not fit the model that has come.

        ``values``: those of before, which raise ParameterError where they do not fit either.
        """
        names = ("entropy_threshold", *BUDGET_PARAMETERS)
        try:
            self._change({name: BY_NAME[name].check(self.get_parameter(name).value) for name in names})
        except ParameterError as error:
            changed = [name for name in names if self.get_parameter(name).value != values[name]]
            if not changed:
                raise
            self.get_logger().error(f"{error}; {', '.join(changed)} set back to what it was before the model loaded")
            result = self.set_parameters_atomically([RosParameter(name, value=values[name]) for name in changed])
            if not result.successful:
                raise ParameterError(result.reason) from error

    def _budget(self, segmenter: Segmenter, **changed: Value) -> LatencyBudget | None:
        values = {name: self.get_parameter(name).value for name in BUDGET_PARAMETERS} | changed
        return make_budget(values, segmenter.entropy_threshold, len(segmenter.classes))

    # Frames ----------------------------------------------------------------------------------------------------------

    def _receive(self, camera: Camera, frame: memoryview) -> None:
        stamp, worker = stamp_of(frame), self._worker
        awaited = worker is not None and self._enabled
        camera.arrived(stamp, awaited)
        receipt = received(frame, stamp, self.get_clock().now().nanoseconds, time.perf_counter())
        camera.stamps_believed = receipt.believed
        dropped = worker.scheduler.put(camera, receipt) if worker is not None and awaited else 1
        camera.counters.add(received=1, dropped=dropped)
        time.sleep(HAND_OVER_S)

    def _on_enable(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        """Service ~/enable: while disabled, frames are dropped as they come; model and topics stay."""
        self._enabled = request.data
        if not self._enabled and self._worker is not None:
            for camera, dropped in self._worker.scheduler.clear().items():
                camera.counters.add(dropped=dropped)
        for camera in self.cameras:
            camera.excuse()
        response.success, response.message = True, "enabled" if self._enabled else "disabled"
        self.get_logger().info(f"{response.message} by ~/enable")
        return response

    # Diagnostics -----------------------------------------------------------------------------------------------------

    @property
    def cameras(self) -> Sequence[Camera]:
        """The cameras of the configured node."""
        return self._rig.cameras if self._rig is not None else ()

    def _tick(self) -> None:
        self._ticks += 1
        if self._rig is not None:
            self._rig.discover()
            if self._ticks % LABELS_EVERY == 0:
                self._rig.publish_labels()
        self._report()

    def _report(self) -> None:
        worker, segmenter = self._worker, self._segmenter
        help_text = remedy(everywhere=self._lossy) if on_fast_dds(self._rmw) else ""
        disabled = "" if self._enabled else DISABLED
        cameras = {c: c.status(worker.scheduler.waiting(c) if worker else 0, help_text, disabled) for c in self.cameras}
        for camera, its in cameras.items():
            if its.complaint and self._state == "active" and self._due(camera.image_topic):
                self.get_logger().warning(f"{camera.image_topic}: {its.complaint}")
        trouble = self._state
        if self._state == "active":
            # An engine for frames of another size than the bundle's is built when the first one comes.
            trouble = segmenter.under_way if segmenter is not None else ""
            trouble = disabled or trouble
        values: dict[str, object] = {"enabled": self._enabled, "receive_priority": self.priority.taken}
        if segmenter is not None:
            values |= {"model": self._description(segmenter)}
            values["entropy_threshold"] = f"{segmenter.entropy_threshold:.6g}"
        if worker is not None:
            values |= {name: f"{ms:.3f}" for name, ms in worker.stages.values().items()}
        values |= device_health(segmenter.device if segmenter is not None else "")
        name = segmenter.bundle.name if segmenter is not None else ""
        degraded = [trouble] if trouble and self._state == "active" else []
        degraded += self._qos.complaints()
        degraded += [segmenter.degraded] if segmenter is not None and segmenter.degraded else []
        if worker is not None:
            values |= budget_values(worker.budget, worker.segmenter.refines)
            degraded += [worker.unaffordable] if worker.unaffordable else []
        self._reporter.publish(NodeState(self._state, trouble, name, degraded, values), cameras)
