"""`sparserefine export`: a bundle to ONNX files."""

from __future__ import annotations

import argparse

from sparserefine_ros.commands.arguments import parse_path, parse_size

HELP = "write a bundle as ONNX: the dense segmenter, and the whole pipeline with the refiner"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="bundle: a folder or a name under models/")
    parser.add_argument("--output", type=parse_path, required=True, help="folder for dense.onnx and pipeline.onnx")
    parser.add_argument("--what", default="both", choices=("dense", "pipeline", "both"), help="(default: both)")
    parser.add_argument(
        "--size", type=parse_size, metavar="HxW",
        help="frames of this size alone, which some runtimes make faster (default: any size, where the network can)",
    )  # fmt: skip
    parser.add_argument("--half", action="store_true", help="dense.onnx computes in float16")
    parser.add_argument("--external-data", action="store_true", help="weights in files of their own")


def run(args: argparse.Namespace) -> int:
    from sparserefine_ros.errors import ExportError
    from sparserefine_ros.evaluation import files
    from sparserefine_ros.networks.refiner import SparseRefiner
    from sparserefine_ros.segmenter.bundle import ONNX, Bundle
    from sparserefine_ros.segmenter.export import export_dense, export_pipeline, is_dynamic
    from sparserefine_ros.segmenter.segmenter import Segmenter

    bundle = Bundle.load(args.model)
    if bundle.dense.network == ONNX:
        raise ExportError(f"bundle {bundle.name!r} is an ONNX file already: {bundle.path / bundle.dense.weights}")
    files.check_folder(args.output)
    if (args.output / "model.yaml").exists():
        raise ExportError(f"{args.output} holds a bundle, whose files would be written over; give another --output")
    segmenter = Segmenter(bundle, "cpu", sparse_backend="torch", runtime="torch")
    size = args.size or bundle.native_size
    low = segmenter.low_size(size)
    fixed = args.size is not None or not is_dynamic(segmenter.dense)
    sizes = f"{size[0]}x{size[1]} alone, {low[0]}x{low[1]} at low resolution" if fixed else "any size"
    if args.what != "pipeline":
        done = export_dense(segmenter.dense, args.output / "dense.onnx", low, fixed, args.half, args.external_data)
        print(f"wrote {done.path}: frames of {sizes}; differs from torch by {done.difference:.1e} of the largest logit")
    if args.what == "both" and segmenter.refiner is not None and not isinstance(segmenter.refiner, SparseRefiner):
        print(f"no pipeline.onnx: the refiner of bundle {bundle.name!r} is no sparse network")
    elif args.what == "pipeline" or (args.what == "both" and segmenter.refiner is not None):
        done = export_pipeline(segmenter, args.output / "pipeline.onnx", size, fixed, args.external_data)
        print(
            f"wrote {done.path}: frames of {sizes}; differs from torch in the class of {done.flipped:.1e} of the "
            f"pixels and by {done.difference:.1e} nats of entropy"
        )
    return 0
