"""The node's parameters: the one table that node, launch file, config/segment.yaml and README read.

Imports no ROS. `python -m sparserefine_ros.node.parameters` prints the README's table, with `--yaml` the
parameter file config/segment.yaml.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparserefine_ros.errors import ParameterError

Value = Any  # bool, int, float, str or list[str]: what Parameter.check returns
AUTO = "auto"


@dataclass(frozen=True)
class Parameter:
    """One parameter. Its type is the type of `default`, unless `words` and a range make it a word or a number.

    choices: the only strings allowed; "true" and "false" among them may be given as booleans too.
    pattern: regular expression that a string, or each string of a list, must match, explained by `form`.
    minimum, maximum: range of a number, both inclusive.
    live: may change while the node runs; the others while it is not configured.
    """

    name: str
    default: Value
    description: str
    choices: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    pattern: str = ""
    form: str = ""
    minimum: float | None = None
    maximum: float | None = None
    live: bool = False

    @property
    def numeric(self) -> bool:
        """Whether numbers are allowed."""
        return self.minimum is not None

    @property
    def several_types(self) -> bool:
        """Whether ROS must let the type vary: 1 for 1.0, "1" for 1, a word, true for "true", [] of no type."""
        return self.numeric or "true" in self.choices or isinstance(self.default, list)

    @property
    def values(self) -> str:
        """The allowed values, for people."""
        if self.choices:
            return ", ".join(self.choices)
        if self.form:
            return self.form
        if self.numeric:
            return ", ".join([*self.words, f"{self.minimum:g} to {self.maximum:g}"])
        return "text"

    def check(self, value: object) -> Value:
        """`value` in this parameter's type; ParameterError with the value and the remedy where it does not fit."""
        result = self._fit(value)
        if result is None:
            shown = f"'{value}'" if isinstance(value, str) else repr(value)
            raise ParameterError(f"parameter '{self.name}' is {shown}; it must be: {self.values}")
        return result

    def _fit(self, value: object) -> Value:
        """`value` in this parameter's type, None where it does not fit."""
        if isinstance(self.default, list):
            return self._list(value)
        if isinstance(value, bool):
            value = str(value).lower() if "true" in self.choices else None
        if self.numeric:
            return value if value in self.words else self._number(value)
        if not isinstance(value, str):
            return None
        if self.choices:
            return value if value in self.choices else None
        return value if re.fullmatch(self.pattern or ".*", value) else None

    def _list(self, value: object) -> list[str] | None:
        if value is None:  # how ROS reads `[]`, which has no type
            return []
        if not isinstance(value, list) or len(set(map(str, value))) < len(value):
            return None
        fits = all(isinstance(item, str) and re.fullmatch(self.pattern, item) for item in value)
        return list(value) if fits else None

    def _number(self, value: object) -> float | int | None:
        try:
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            return None
        assert self.minimum is not None and self.maximum is not None
        if not self.minimum <= number <= self.maximum:  # also refuses nan
            return None
        if isinstance(self.default, int):
            return int(number) if number.is_integer() else None
        return number


PARAMETERS: tuple[Parameter, ...] = (
    Parameter(
        "decoder",
        AUTO,
        "How frames are segmented: sparserefine = dense segmenter at low resolution, refined where it is "
        "uncertain; superpixel = Superpixel Transformer; offseg = offset learning; dense = the model's dense "
        "segmenter alone; auto = what the model has, sparserefine if none is named.",
        choices=(AUTO, "sparserefine", "superpixel", "offseg", "dense"),
    ),
    Parameter(
        "model",
        AUTO,
        "Bundle: a folder, or the name of one under models/; auto = the decoder's default bundle.",
        pattern=r"\S(.*\S)?",
        form="auto, a name or a folder",
    ),
    Parameter(
        "refine",
        AUTO,
        "Whether the sparse refiner runs over the decoder; auto = where the model has one, but not with decoder dense.",
        choices=(AUTO, "true", "false"),
    ),
    Parameter(
        "entropy_threshold",
        AUTO,
        "Pixels whose entropy in nats exceeds this are refined; auto = the bundle's calibrated value. Lower "
        "refines more and takes longer. At most log(number of classes).",
        words=(AUTO,),
        minimum=0.0,
        maximum=round(math.log(255), 4),
        live=True,
    ),
    Parameter(
        "latency_budget_ms",
        0.0,
        "Milliseconds from a frame's stamp to its mask that 95 % of the frames keep to: where time is short the "
        "entropy threshold rises, and where that is not enough the frame stays dense; 0 = no budget.",
        minimum=0.0,
        maximum=60000.0,
        live=True,
    ),
    Parameter(
        "budget_threshold_min",
        AUTO,
        "With a latency budget: the lowest entropy threshold, used while time permits; auto = entropy_threshold.",
        words=(AUTO,),
        minimum=0.0,
        maximum=round(math.log(255), 4),
        live=True,
    ),
    Parameter(
        "budget_threshold_max",
        AUTO,
        "With a latency budget: the highest entropy threshold before frames stay dense; auto = halfway from the lowest "
        "to log(number of classes).",
        words=(AUTO,),
        minimum=0.0,
        maximum=round(math.log(255), 4),
        live=True,
    ),
    Parameter(
        "scale",
        AUTO,
        "Size of the dense segmenter's input relative to the image; auto = the bundle's.",
        words=(AUTO,),
        minimum=0.05,
        maximum=1.0,
    ),
    Parameter(
        "device",
        AUTO,
        "Where the networks run; auto = cuda when there is one, else cpu.",
        pattern=r"auto|cpu|cuda(:\d+)?",
        form="auto, cpu, cuda, cuda:N",
    ),
    Parameter(
        "precision",
        "fp32",
        "Number format of the networks; fp16 is for CUDA, bf16 for CUDA and for CPUs that compute in it.",
        choices=("fp32", "fp16", "bf16"),
    ),
    Parameter(
        "sparse_backend",
        AUTO,
        "Engine of the refiner's sparse convolutions; auto = cpu on CPUs, on CUDA the fastest that is right in a trial "
        "at the first start. torch runs anywhere, cpu is C for fp32 (compiled on first use), triton is for CUDA; "
        "torchsparse and spconv where installed.",
        choices=(AUTO, "torch", "cpu", "triton", "torchsparse", "spconv"),
    ),
    Parameter(
        "runtime",
        AUTO,
        "What runs the dense segmenter; auto = torch, but onnxruntime for a model that is an ONNX file. torch_compile "
        "is faster and takes up to minutes at every start; torch_graph replays it as one CUDA graph, not yet run on a "
        "GPU; onnxruntime exports it on first use and keeps the file under ~/.cache. The refiner runs on "
        "sparse_backend in any case.",
        choices=(AUTO, "torch", "torch_compile", "torch_graph", "onnxruntime"),
    ),
    Parameter(
        "provider",
        AUTO,
        "What onnxruntime runs on; auto = on a CUDA device tensorrt or cuda, where there are such, else cpu. tensorrt "
        "builds its engine at the first start, for minutes, and keeps it.",
        choices=(AUTO, "cpu", "cuda", "tensorrt"),
    ),
    Parameter(
        "threads",
        0,
        "CPU threads of the networks; 0 = as many as torch takes by itself.",
        minimum=0,
        maximum=256,
    ),
    Parameter(
        "image_transport",
        "raw",
        "raw subscribes to `image` (sensor_msgs/Image), compressed to `image/compressed` "
        "(sensor_msgs/CompressedImage, JPEG or PNG).",
        choices=("raw", "compressed"),
    ),
    Parameter(
        "cameras",
        [],
        "Cameras that share the model: a name N subscribes to `N/image` and publishes below `N/segmentation`; a topic, "
        "in which * stands for anything but /, publishes below the topic's own namespace; matching topics are found "
        "whenever they appear. Empty = one camera, `image` to `segmentation`.",
        pattern=r"/?[A-Za-z*][A-Za-z0-9_*]*(/[A-Za-z_*][A-Za-z0-9_*]*)*",
        form="list of names (front) and topics (/camera/*/image_raw), each once",
    ),
    Parameter(
        "max_batch",
        4,
        "Cameras whose frames, of one size, are segmented together at most; 1 gives the shortest latency on a CPU.",
        minimum=1,
        maximum=64,
    ),
    Parameter(
        "batch_window_ms",
        0.0,
        "How long a batch waits for further cameras, from the arrival of its first frame; 0 = takes what is there.",
        minimum=0.0,
        maximum=1000.0,
    ),
    Parameter(
        "qos_reliability",
        "best_effort",
        "Reliability asked of the image publisher; best_effort receives from every publisher.",
        choices=("best_effort", "reliable", "system_default"),
    ),
    Parameter(
        "qos_depth",
        5,
        "History depth of the image subscription.",
        minimum=1,
        maximum=1000,
    ),
    Parameter(
        "receive_priority",
        1,
        "Real-time priority (SCHED_FIFO) of the threads that receive frames, which then do not wait for a busy core. "
        "It takes root, CAP_SYS_NICE or rtprio in limits.conf; without, they stay normal. 0 = as they are.",
        minimum=0,
        maximum=99,
    ),
    Parameter(
        "queue",
        "newest",
        "newest = one slot, a new frame replaces a waiting one, so masks are never stale; all = every frame in "
        "order, up to queue_size waiting (for evaluation; set qos_reliability to reliable as well).",
        choices=("newest", "all"),
    ),
    Parameter(
        "queue_size",
        64,
        "Frames that may wait when queue is all; then the oldest is dropped.",
        minimum=1,
        maximum=10000,
    ),
    Parameter(
        "autostart",
        "true",
        "true = the node configures and activates itself; false = `ros2 lifecycle set` does, and a model that cannot "
        "be loaded does not end the node.",
        choices=("true", "false"),
    ),
    Parameter(
        "output_scale",
        1.0,
        "Size of everything published relative to the image, by nearest neighbour, so that class ids stay class ids; a "
        "subscriber that uses camera_info must scale it likewise.",
        minimum=0.05,
        maximum=1.0,
        live=True,
    ),
    Parameter(
        "overlay_opacity",
        0.5,
        "How much of the class colours the overlay shows: 0 = image only, 1 = colours only.",
        minimum=0.0,
        maximum=1.0,
        live=True,
    ),
)

BY_NAME: dict[str, Parameter] = {parameter.name: parameter for parameter in PARAMETERS}


def markdown() -> str:
    """The README's table of parameters."""
    lines = ["| parameter | default | values | live | meaning |", "|---|---|---|---|---|"]
    for p in PARAMETERS:
        live = "yes" if p.live else "no"
        lines.append(f"| `{p.name}` | `{_plain(p.default)}` | {p.values} | {live} | {p.description} |")
    return "\n".join(lines) + "\n"


def yaml_text() -> str:
    """config/segment.yaml: every parameter at its default, with its text."""
    lines = [
        "# Every parameter of the segment node at its default.",
        "# Written by `python -m sparserefine_ros.node.parameters --yaml`; copy it and change the copy.",
        "/**:",
        "  ros__parameters:",
    ]
    for p in PARAMETERS:
        lines += [f"    # {p.description} ({p.values})", f"    {p.name}: {_plain(p.default)}"]
    return "\n".join(lines) + "\n"


def _plain(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def main(arguments: list[str]) -> int:
    """Prints the Markdown table, or with --yaml the parameter file."""
    printers: dict[tuple[str, ...], Callable[[], str]] = {(): markdown, ("--yaml",): yaml_text}
    printer = printers.get(tuple(arguments))
    if printer is None:
        print("usage: python -m sparserefine_ros.node.parameters [--yaml]", file=sys.stderr)
        return 2
    sys.stdout.write(printer())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
