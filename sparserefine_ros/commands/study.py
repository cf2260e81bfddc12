"""`sparserefine study`: the paper's ablations on a bundle and its validation frames."""

from __future__ import annotations

import argparse
from pathlib import Path

from sparserefine_ros.commands.arguments import parse_path

HELP = "the paper's ablations on a bundle: selectors, threshold, inputs, channels, ensemblers, classes, objects"
STUDIES = {
    "selectors": "which pixels to refine (Table 5a)",
    "threshold": "the entropy threshold (5b)",
    "classes": "gain by class (8)",
    "objects": "gain by object size",
    "ensemblers": "how both predictions become one (5e)",
    "inputs": "what the refiner reads (5c); trains three refiners",
    "channels": "how wide it is, and PointNet (5d); trains four, one of them shared with inputs",
}
"""Each a module of ``sparserefine_ros.studies`` with study(setting) -> Report."""
EPOCHS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name",
        choices=(*STUDIES, "all"),
        metavar="NAME",
        help="; ".join(f"{name}: {what}" for name, what in STUDIES.items()) + "; all: every one in turn",
    )
    parser.add_argument("--model", default="camvid", help="bundle: a folder or a name under models/ (default: camvid)")
    parser.add_argument(
        "--data", type=parse_path, help="folder of the data set the bundle was trained on, where it needs one"
    )
    parser.add_argument(
        "--frames", type=int, metavar="N", help="validate on N frames, evenly spaced (default: all); needs --out"
    )
    parser.add_argument(
        "--epochs", type=int, default=EPOCHS, help="of each training, over the training frames (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=parse_path, help="folder for NAME.md, NAME.json and NAME.png (default: docs/studies/BUNDLE)"
    )
    parser.add_argument("--runs", type=parse_path, default=Path("runs"), help="trainings, gone on with (default: runs)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")
    parser.add_argument("--threads", type=int, help="CPU threads for torch (default: all cores)")


def run(args: argparse.Namespace) -> int:
    import importlib

    import cv2
    import torch

    from sparserefine_ros.datasets.splits import load_split
    from sparserefine_ros.errors import ParameterError
    from sparserefine_ros.segmenter.bundle import Bundle
    from sparserefine_ros.segmenter.segmenter import pick_device
    from sparserefine_ros.studies.report import Setting, write
    from sparserefine_ros.training.frames import evenly_spaced

    for name in ("frames", "epochs", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ParameterError(f"--{name} is {value}; give 1 or more")
    if args.frames and not args.out:  # what lies in docs/studies, on all frames, would be replaced
        raise ParameterError("--frames makes a study of a part of the frames; say with --out where it shall go")
    cv2.setNumThreads(1)  # batches are drawn in a pool of threads already
    if args.threads:
        torch.set_num_threads(args.threads)
    bundle, device = Bundle.load(args.model), pick_device(args.device)
    _, val = load_split(bundle.provenance.get("dataset", {}), "val", args.data)
    val = [val[i] for i in evenly_spaced(len(val), args.frames or len(val))]
    out = args.out or Path("docs/studies") / bundle.name
    for name in STUDIES if args.name == "all" else [args.name]:
        module = importlib.import_module(f"sparserefine_ros.studies.{name}")
        setting = Setting(bundle, val, args.data, args.runs, device, args.epochs, command(name, args))
        file = write(module.study(setting), setting, out)
        print(file.read_text("utf-8"))
        print(f"wrote {file}")
    return 0


def command(name: str, args: argparse.Namespace) -> str:
    """What gives the study ``name`` again on another machine."""
    parts = [f"sparserefine study {name} --model {Path(args.model).name}"]
    if args.data:
        parts.append("--data PATH_TO_DATA")
    if args.frames:
        parts.append(f"--frames {args.frames} --out FOLDER")
    if args.epochs != EPOCHS:
        parts.append(f"--epochs {args.epochs}")
    if args.threads:
        parts.append(f"--threads {args.threads}")
    return " ".join(parts)
