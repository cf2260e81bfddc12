"""`sparserefine import`: a checkpoint of mmsegmentation, a model of the hub or an ONNX file, to a bundle."""

from __future__ import annotations

import argparse
from pathlib import Path

from sparserefine_ros.commands.arguments import parse_path, parse_size

HELP = "write a bundle from a checkpoint of mmsegmentation or of the Hugging Face hub, or from an ONNX file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        type=parse_path,
        help=".safetensors or .pth file of mmsegmentation; or a folder from the hub, with config.json and weights: a "
        "SegFormer or a Mask2Former on Swin; or any segmenter as .onnx, normalised images to logits, which runtime "
        "onnxruntime then runs as it is",
    )
    parser.add_argument(
        "--download", action="store_true", help="the checkpoint is a name on the hub, owner/model: fetch it"
    )
    parser.add_argument(
        "--network",
        help="what a file's weights are for: hrnet-w48, offseg-t, segformer-b0, segnext-t, with offsets "
        "segformer-ol-b0, segnext-ol-t, and their other sizes (default: told from the weights)",
    )
    parser.add_argument(
        "--classes", required=True, help="camvid, cityscapes, or a YAML file that gives name, names and palette"
    )
    parser.add_argument(
        "--any-names", action="store_true", help="the checkpoint may call its classes otherwise than --classes does"
    )
    parser.add_argument("--output", help="of an ONNX file with several outputs, the name of the one with the logits")
    parser.add_argument("--name", required=True, help="name of the bundle")
    parser.add_argument(
        "--models", type=parse_path, default=Path("models"), help="where the bundle goes (default: models)"
    )
    parser.add_argument(
        "--native-size",
        type=parse_size,
        default="1024x2048",
        metavar="HxW",
        help="size of the frames it is for (default: 1024x2048)",
    )
    parser.add_argument("--scale", type=float, default=1.0, help="size the network sees over native size (default: 1)")
    parser.add_argument(
        "--renames", type=parse_path, help="YAML list of [regular expression, replacement] for its weights"
    )


def run(args: argparse.Namespace) -> int:
    from sparserefine_ros.datasets.classes import CLASS_LISTS
    from sparserefine_ros.datasets.folder import read_classes
    from sparserefine_ros.errors import ParameterError
    from sparserefine_ros.segmenter.importing import REPORT, import_checkpoint, read_renames
    from sparserefine_ros.segmenter.licences import UNKNOWN

    if not 0 < args.scale <= 1:
        raise ParameterError(f"--scale {args.scale} is out of range; give a number above 0 and at most 1")
    if Path(args.name).name != args.name or args.name in ("", ".."):
        raise ParameterError(f"--name {args.name!r} must be a plain folder name; --models says where it goes")
    if args.classes not in CLASS_LISTS and not Path(args.classes).exists():
        raise ParameterError(f"--classes {args.classes}: no such list; give {', '.join(CLASS_LISTS)} or a YAML file")
    classes = CLASS_LISTS[args.classes] if args.classes in CLASS_LISTS else read_classes(Path(args.classes))
    bundle = import_checkpoint(
        args.checkpoint, args.network, classes, args.models / args.name, args.native_size, args.scale,
        read_renames(args.renames) if args.renames else (), args.download, args.any_names, args.output,
    )  # fmt: skip
    print(f"wrote {bundle.path}; what was found: {bundle.path / REPORT}; its entropy threshold is not calibrated")
    print(f"licence: {bundle.provenance['licence'] or UNKNOWN}")
    return 0
