"""`sparserefine calibrate`: the entropy threshold of a bundle from its density-recall curve."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparserefine_ros.commands.arguments import parse_path

if TYPE_CHECKING:
    from sparserefine_ros.datasets.base import Sample
    from sparserefine_ros.segmenter.bundle import Bundle

HELP = "fit a bundle's temperature, measure its density-recall curve, write both and the threshold into it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="bundle: a folder or a name under models/")
    parser.add_argument(
        "--data",
        type=parse_path,
        help="folder of the data set the bundle was trained on, where it needs one; for a bundle that does not say "
        "what that was, as an imported one, a folder of labelled frames: image/, label/ and classes.yaml",
    )
    parser.add_argument("--recall", type=float, default=0.8, help="share of wrong pixels to select (default: 0.8)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")


def run(args: argparse.Namespace) -> int:
    from sparserefine_ros.errors import ParameterError
    from sparserefine_ros.evaluation.calibration import calibrate_bundle
    from sparserefine_ros.segmenter.bundle import Bundle

    if not 0 < args.recall <= 1:
        raise ParameterError(f"--recall {args.recall} is out of range; give a share above 0 and at most 1")
    bundle = Bundle.load(args.model)
    bundle = calibrate_bundle(bundle, _frames(bundle, args.data), args.recall, args.device)
    figures = bundle.calibration
    print(
        f"{bundle.name}: threshold {figures['threshold']:.4f} nats selects {figures['density']:.1%} of the pixels, "
        f"{figures['recall']:.1%} of the wrong ones (precision {figures['precision']:.1%}); "
        f"curve in {bundle.path / 'density_recall.png'}\n"
        f"temperature {bundle.temperature:g}: expected calibration error {figures['ece']:.4f} "
        f"({figures['ece_at_temperature_1']:.4f} without)"
    )
    return 0


def _frames(bundle: Bundle, data: Path | None) -> Sequence[Sample]:
    """Labelled frames that the bundle was not trained on, as far as it says."""
    from sparserefine_ros.datasets.base import UNLABELLED
    from sparserefine_ros.datasets.folder import Folder
    from sparserefine_ros.datasets.splits import load_split
    from sparserefine_ros.errors import DatasetError, ParameterError

    dataset = bundle.provenance.get("dataset")
    if isinstance(dataset, dict):
        return load_split(dataset, "val", data)[1]
    if data is None:
        raise ParameterError(
            f"bundle {bundle.name!r} does not say what it was trained on; give labelled frames with --data: a folder "
            "with image/, label/ and classes.yaml"
        )
    folder = Folder(data, "val")
    if folder.classes.names != bundle.classes.names:
        raise DatasetError(
            f"{data / 'classes.yaml'} names {', '.join(folder.classes.names)}, but the classes of bundle "
            f"{bundle.name!r} are {', '.join(bundle.classes.names)}; ids must mean the same"
        )
    frames = (folder[index] for index in range(len(folder)))
    samples = [frame for frame in frames if frame.label is not None and (frame.label != UNLABELLED).any()]
    if not samples:
        labels = folder.images[0].parents[1] / "label"
        raise DatasetError(f"no labelled pixel in {labels}; put PNG files of class ids there")
    return samples
