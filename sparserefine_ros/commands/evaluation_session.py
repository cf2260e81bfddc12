"""One evaluation from options to report: what `sparserefine evaluate` and `sparserefine demo` share."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from sparserefine_ros.commands.arguments import TOLD_EVERY_S
from sparserefine_ros.commands.evaluate import SEGMENTER_PARAMETERS
from sparserefine_ros.datasets.base import Sample
from sparserefine_ros.errors import BagError, FrameError, ParameterError, SparseRefineError
from sparserefine_ros.evaluation import curves, files, gallery, html_report, replay_metrics, report, worst_frames
from sparserefine_ros.evaluation.bag_writer import COMPRESSED_TOPIC, IMAGE_TOPIC
from sparserefine_ros.evaluation.bags import Bag
from sparserefine_ros.evaluation.mask_spool import MaskSpool
from sparserefine_ros.evaluation.offline import segment_bag, selected_pixels
from sparserefine_ros.evaluation.replay_metrics import ReplayLog
from sparserefine_ros.node.conversion import to_rgb
from sparserefine_ros.node.logs import Throttle
from sparserefine_ros.node.model import load_segmenter
from sparserefine_ros.node.parameters import BY_NAME, Parameter, Value
from sparserefine_ros.segmenter.segmenter import Segmenter

PICTURE_FRAMES = 4


@dataclass(frozen=True)
class Options:
    """What to evaluate and how. ``parameters`` are the node's, by name, as text; the others take their defaults."""

    bag: Path
    parameters: Mapping[str, str] = field(default_factory=dict)
    offline: bool = False
    rate: float = 1.0  # 1: the recording's timing, 0: lossless
    report: Path | None = None  # HTML
    json: Path | None = None
    output: Path | None = None
    save_masks: bool = False
    image_topic: str | None = None
    label_topic: str | None = None
    answer_timeout_s: float = 60.0
    domain_id: int | None = None


def evaluate(options: Options, console: Console) -> dict[str, Any]:
    """Replays, measures, writes the files that ``options`` names, and returns the report (`report.build`).

    Raises BundleError, BagError, ParameterError, ResultError or NodeError, each before the replay where it can be
    known.
    """
    for file in filter(None, (options.report, options.json)):
        files.check(file)
    if options.output:
        files.check_folder(options.output)
    values = parameter_values(options.parameters)
    segmenter = load_segmenter(values)  # also for a live replay: what the node would refuse is said at once
    bundle = segmenter.bundle
    with Bag(options.bag, options.image_topic, options.label_topic) as bag, MaskSpool() as spool:
        stamps = bag.check(bundle.classes)
        if bag.compressed:
            _check_first_size(bag)
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ) as progress:
            due = Throttle(TOLD_EVERY_S)
            due("frames")  # not at once
            task = progress.add_task("segmenting" if options.offline else "starting the node", total=len(stamps))

            def advance(log: ReplayLog) -> None:
                progress.update(task, completed=len(log.sent), description=f"{len(log.answered)} masks")
                if not console.is_terminal and due("frames"):
                    console.print(
                        f"{len(log.sent)} of {len(stamps)} frames, {len(log.answered)} masks", highlight=False
                    )

            if options.offline:
                facts: dict[str, Any] = {"mode": "offline"}
                log = segment_bag(bag, segmenter, to_rgb, spool, advance)
            else:
                log, facts = _replay(options, values, bag, spool, advance)
        score = replay_metrics.score(bag.labels(), spool, bundle.classes, log.sent) if bag.label_topic else None
        facts |= _facts(values, segmenter, bag)
        result = report.build(log, score, facts)
        result["curves"] = None
        if options.report:
            result["curves"] = curves.measure(segmenter, _labelled_samples(bag, score.frames if score else ()))
        if options.json:  # the numbers first: the page takes longest
            report.write_json(result, options.json)
        if options.report:
            choice, reasons = worst_frames.choose(log, score)
            shown = worst_frames.collect(bag, spool, segmenter, to_rgb, reasons)
            html_report.write(result, choice, shown, options.report)
        if options.output:
            _draw(options, bag, segmenter, spool, result)
    return result


def parameter_values(texts: Mapping[str, str]) -> dict[str, Value]:
    """Every parameter of the node: those in ``texts`` parsed and checked, the others at their defaults.

    Raises ParameterError for an unknown name or a value that the node would refuse.
    """
    unknown = sorted(set(texts) - set(BY_NAME))
    if unknown:
        raise ParameterError(f"unknown parameter {unknown[0]!r}; the node has {', '.join(BY_NAME)}")
    return {name: p.check(_parse(p, texts[name])) if name in texts else p.default for name, p in BY_NAME.items()}


def _parse(parameter: Parameter, text: str) -> Value:
    if not parameter.numeric:
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def check_ros() -> None:
    """SparseRefineError, saying how to install it, where ROS 2 is not there for a live replay."""
    try:
        import sparserefine_ros.node.replay  # noqa: F401
    except ImportError as error:
        raise SparseRefineError(
            f"a live replay needs ROS 2's Python packages, and {error.name or error} is missing: source a ROS 2 "
            "environment or install this package's `ros` extra; or use --offline"
        ) from error


def _replay(
    options: Options, values: Mapping[str, Value], bag: Bag, spool: MaskSpool, advance: Callable[[ReplayLog], None]
) -> tuple[ReplayLog, dict[str, Any]]:
    check_ros()
    from sparserefine_ros.node.process import NodeProcess, free_domain_id
    from sparserefine_ros.node.replay import Replayer, ros_versions, transport_environment

    domain_id = free_domain_id() if options.domain_id is None else options.domain_id
    environment = transport_environment()
    log_path = None
    if options.output:
        log_path = options.output / "node.log"
    # Ours, whatever the bag's is called: other tools' names may be none to ROS, or those of the node's own outputs.
    topic = COMPRESSED_TOPIC if bag.compressed else IMAGE_TOPIC
    remapping = {("image/compressed" if bag.compressed else "image"): topic}
    parameters = {name: values[name] for name in SEGMENTER_PARAMETERS}
    # Reliable: what is lost shall be lost by the node under test, by its choice, and not by the transport.
    parameters |= {"qos_reliability": "reliable", "image_transport": "compressed" if bag.compressed else "raw"}
    node_environment = {**environment, "ROS_DOMAIN_ID": str(domain_id)}
    with (
        NodeProcess(parameters, remapping, node_environment, log_path) as node,
        Replayer(domain_id, environment, topic, bag.compressed, spool.put) as replayer,
    ):
        replayer.ready(node.check)
        log = replayer.play(bag.frames(), options.rate, options.answer_timeout_s, node.check, advance)
        facts = {"mode": "live", "versions": dict(ros_versions())}
    return log, facts | {
        "rate": options.rate,
        "lossless": options.rate == 0,
        "qos": {"reliability": "reliable", "history": "keep_last", "depth": 10},
        "node_exit_code": node.exit_code,
    }


def _facts(values: Mapping[str, Value], segmenter: Segmenter, bag: Bag) -> dict[str, Any]:
    bundle = segmenter.bundle
    return {
        "model": bundle.name,
        "decoder": _decoder(segmenter),
        "entropy_threshold": segmenter.entropy_threshold,
        "scale": segmenter.scale,
        "device": str(segmenter.device),
        "precision": segmenter.precision,
        "sparse_backend": segmenter.sparse_backend if segmenter.refines else None,
        "runtime": segmenter.runtime,
        "threads": values["threads"],
        "parameters": {name: values[name] for name in SEGMENTER_PARAMETERS},
        "weights_sha256": {
            spec.weights: spec.sha256 for spec in (bundle.dense, bundle.native, bundle.refiner) if spec is not None
        },
        "classes": asdict(bundle.classes),
        "bag": {
            "name": bag.name,
            "sha256": bag.sha256(),
            "duration_s": bag.duration_s,
            "image_topic": bag.image_topic,
            "image_type": bag.image_type,
            "label_topic": bag.label_topic,
        },
    }


def _check_first_size(bag: Bag) -> None:
    """BagError where the first labelled image and its label differ in size, which `Bag.check` cannot see of JPEG."""
    stamp, label = next(bag.labels(), (None, None))
    if stamp is None or label is None:
        return
    message = next((m for s, m in bag.image_messages() if s == stamp), None)
    with suppress(FrameError):  # costs that frame only
        size = label.shape if message is None else to_rgb(message).shape[:2]
        if size != label.shape:
            raise BagError(
                f"{bag.path}: at stamp {stamp} ns the image is {size[1]}x{size[0]} but its label "
                f"{label.shape[1]}x{label.shape[0]}; record both at the same size"
            )


def _decoder(segmenter: Segmenter) -> str:
    """What gave the masks: dense, superpixel or offseg, and over it the refiner where one ran."""
    bundle = segmenter.bundle
    parts: list[str] = [kind for kind in ("superpixel", "offseg") if kind in bundle.decoders]
    if segmenter.refines and bundle.refiner is not None:
        parts.append(bundle.refiner.network)
    return " + ".join(parts) or "dense"


def _labelled_samples(bag: Bag, scored: Container[int]) -> list[Sample]:
    """Frames of those that were ``scored``, evenly spaced over the drive, for `curves.measure`."""
    sizes = {stamp: label.size for stamp, label in bag.labels() if stamp in scored}
    count = min(curves.FRAMES, max(1, curves.PIXELS // max(sizes.values(), default=1)))
    chosen = set(replay_metrics.evenly_spaced(list(sizes), count))
    labels = {stamp: label for stamp, label in bag.labels() if stamp in chosen}
    return [Sample(to_rgb(m), labels[s], str(s), s) for s, m in bag.image_messages() if s in labels]


def _draw(options: Options, bag: Bag, segmenter: Segmenter, spool: MaskSpool, result: dict[str, Any]) -> None:
    assert options.output is not None
    classes = segmenter.bundle.classes
    if options.save_masks:
        gallery.save_masks(spool, classes, options.output / "masks")
    stamps = replay_metrics.evenly_spaced(spool.stamps(), PICTURE_FRAMES)
    picture = options.output / "evaluation.png"
    if not stamps:
        picture.unlink(missing_ok=True)  # an earlier evaluation's would pass for this one's
        return
    selected = selected_pixels(bag, segmenter, to_rgb, stamps) if segmenter.refines else {}
    title = f"{segmenter.bundle.name} on {bag.name}, {len(spool)} masks"
    for name, value in (("mIoU", result["miou"]), ("density", result["density"] if segmenter.refines else None)):
        title += "" if value is None else f", {name} {100 * value:.2f} %"
    gallery.draw_evaluation(bag, spool, classes, to_rgb, stamps, selected, picture, title)
