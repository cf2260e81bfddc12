"""`sparserefine bench`: measurements, each printing a table and saving it on request."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from sparserefine_ros.commands.arguments import add_size, check_output, parse_path, parse_threshold
from sparserefine_ros.node.parameters import BY_NAME

HELP = (
    "measure: `bench bundle` HR dense, LR dense and LR + its refiner, `bench peers` other refiners beside it, "
    "`bench sparse` engines, `bench decoders`, `bench pipeline` the paper's models, `bench pruning` of tokens, "
    "`bench runtimes` what runs a dense segmenter, `bench node` what the live node adds, `bench budget` the latency "
    "budget"
)
CARD_MARK = "<!-- table: {} -->"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    bundle = kinds.add_parser("bundle", help="accuracy, multiply-adds and time of a bundle, side by side in one run")
    bundle.add_argument("model", help="bundle: a folder or a name under models/")
    bundle.add_argument(
        "--data", type=parse_path, help="folder of the data set the bundle was trained on, where it needs one"
    )
    bundle.add_argument("--frames", type=int, help="use only the first N validation frames")
    bundle.add_argument("--entropy-threshold", type=parse_threshold, help="nats (default: auto, the bundle's)")
    bundle.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")
    bundle.add_argument("--precision", default="fp32", choices=("fp32", "fp16", "bf16"))
    bundle.add_argument("--json", type=parse_path, help="also save the figures here")
    bundle.add_argument("--card", action="store_true", help="write the table into the bundle's model card")
    bundle.set_defaults(measure=run_bundle)
    peers = kinds.add_parser("peers", help="SparseRefine, PointRend, patches and bilateral on the same logits")
    peers.add_argument("model", help="bundle: a folder or a name under models/")
    peers.add_argument(
        "--data", type=parse_path, help="folder of the data set the bundle was trained on, where it needs one"
    )
    peers.add_argument("--frames", type=int, help="use only the first N validation frames")
    peers.add_argument("--pointrend", metavar="BUNDLE", help="a trained PointRend over the model's dense segmenter")
    peers.add_argument(
        "--patches", nargs="*", type=int, default=[256, 512], metavar="SIZE", help="pixels (default: 256 512)"
    )
    peers.add_argument(
        "--patch-densities", nargs="+", type=float, default=[0.0], metavar="SHARE",
        help="a patch is refined if more than this share of it is selected (default: 0)",
    )  # fmt: skip
    peers.add_argument("--entropy-threshold", type=parse_threshold, help="nats (default: auto, the bundle's)")
    peers.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")
    peers.add_argument("--precision", default="fp32", choices=("fp32", "fp16", "bf16"))
    peers.add_argument("--json", type=parse_path, help="also save the figures here")
    peers.set_defaults(measure=run_peers)
    pruning = kinds.add_parser("pruning", help="token pruning of Mask2Former's Swin: work and time; random weights")
    pruning.add_argument("--model", default="t", help="size of Mask2Former, t or l (default: t)")
    pruning.add_argument(
        "--keep", nargs=4, type=float, action="append", metavar="SHARE",
        help="windows that each stage keeps; more than once for more rows (default: 0.8, 0.6 and 0.4 everywhere)",
    )  # fmt: skip
    add_size(pruning, "1024x2048", "frames")
    pruning.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")
    pruning.add_argument("--repeats", type=int, default=5, help="timed rounds (default: 5)")
    pruning.add_argument("--json", type=parse_path, help="also save the figures here")
    pruning.set_defaults(measure=run_pruning)
    sparse = kinds.add_parser("sparse", help="the sparse U-Net on every engine and installed peer, in one run")
    sparse.add_argument(
        "--backends", nargs="+", metavar="NAME", help="ours first (default: triton on CUDA, what auto takes, torch)"
    )
    add_size(sparse, "1024x2048", "image")
    sparse.add_argument("--density", type=float, default=0.118, help="share of selected pixels (default: 0.118)")
    sparse.add_argument(
        "--channels",
        default="32,64,128,256,512",
        help="widths by level (default: 32,64,128,256,512; 3 levels: 32,64,128)",
    )
    sparse.add_argument("--stride", default="dilate", choices=("dilate", "floor"))
    sparse.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")
    sparse.add_argument("--precision", default="fp32", choices=("fp32", "fp16", "bf16"))
    sparse.add_argument("--repeats", type=int, default=5, help="timed rounds (default: 5)")
    sparse.add_argument("--no-peers", action="store_true", help="leave dense convolution and spconv out")
    sparse.add_argument("--json", type=parse_path, help="also save the figures here")
    sparse.add_argument("--plot", type=parse_path, help="also measure over density and image size, and draw it here")
    sparse.set_defaults(measure=run_sparse)
    decoders = kinds.add_parser("decoders", help="cost of the decoders by stage, in one run; random weights")
    decoders.add_argument(
        "--networks", nargs="+", metavar="NAME", help="rows (default: all that need no further package)"
    )
    add_size(decoders, "512x1024", "network input")
    decoders.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")
    decoders.add_argument("--repeats", type=int, default=5, help="timed rounds (default: 5)")
    decoders.add_argument("--json", type=parse_path, help="also save the figures here")
    decoders.set_defaults(measure=run_decoders)
    pipeline = kinds.add_parser(
        "pipeline", help="the paper's five models dense at native and low resolution, and refined; random weights"
    )
    pipeline.add_argument("--models", nargs="+", metavar="NAME", help="rows (default: all five)")
    pipeline.add_argument("--params-only", action="store_true", help="only count parameters")
    add_size(pipeline, "1024x2048", "native frames")
    pipeline.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")
    pipeline.add_argument(
        "--precisions", nargs="+", choices=("fp32", "fp16", "bf16"), help="(default: fp16 on CUDA, else fp32)"
    )
    pipeline.add_argument(
        "--batches", nargs="+", type=int, metavar="N", help="batch sizes (default: 1 2 4 8 on CUDA, else 1)"
    )
    pipeline.add_argument("--warmup", type=int, help="untimed rounds (default: 100 on CUDA, else 1)")
    pipeline.add_argument("--repeats", type=int, help="timed rounds (default: 500 on CUDA, else 3)")
    pipeline.add_argument("--stride", default="dilate", choices=("dilate", "floor"), help="of the refiner")
    pipeline.add_argument("--sparse-backend", default="auto", help="of the refiner (default: auto)")
    pipeline.add_argument("--graph", action="store_true", help="dense parts as CUDA graphs (not yet run on a GPU)")
    pipeline.add_argument("--repeat", action="store_true", help="also refined by the dense segmenter's own layers")
    pipeline.add_argument("--json", type=parse_path, help="also save the figures here")
    pipeline.set_defaults(measure=run_pipeline)
    runtimes = kinds.add_parser("runtimes", help="a bundle's dense segmenter in every runtime, in one run")
    runtimes.add_argument("model", help="bundle: a folder or a name under models/")
    runtimes.add_argument("--runtimes", nargs="+", metavar="NAME", help="rows, compared with the first (default: all)")
    runtimes.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")
    runtimes.add_argument("--precision", default="fp32", choices=("fp32", "fp16", "bf16"))
    runtimes.add_argument("--repeats", type=int, default=30, help="timed rounds (default: 30)")
    runtimes.add_argument("--json", type=parse_path, help="also save the figures here")
    runtimes.set_defaults(measure=run_runtimes)
    node = kinds.add_parser("node", help="what the live node adds to a trivial model, and its memory over time")
    add_size(node, "1024x2048", "frames, rgb8")
    node.add_argument("--rate", type=float, default=30.0, metavar="HZ", help="of each camera (default: 30)")
    node.add_argument("--cameras", type=int, default=1, metavar="N", help="that share the model (default: 1)")
    node.add_argument("--duration", type=float, default=20.0, metavar="S", help="seconds (default: 20)")
    node.add_argument(
        "--split-cores",
        action="store_true",
        help="the cameras have the first core to themselves, the node the others (default: they share all)",
    )
    priority = BY_NAME["receive_priority"].default
    node.add_argument(
        "--receive-priority", type=int, default=priority, metavar="N",
        help=f"the node's parameter, 0 = normal (default: {priority})",
    )  # fmt: skip
    node.add_argument("--json", type=parse_path, help="also save the figures here")
    node.set_defaults(measure=run_node)
    budget = kinds.add_parser("budget", help="the latency budget: live on a bag whose clutter changes, or simulated")
    budget.add_argument("--simulate", action="store_true", help="only compare controllers on simulated frames")
    budget.add_argument(
        "--bag",
        type=parse_path,
        metavar="DIR",
        help="with ground truth; made if missing (default: one of its own, removed)",
    )
    budget.add_argument("--model", default="street", help="bundle (default: street)")
    add_size(budget, "384x768", "frames of the bag made")
    budget.add_argument("--rate", type=float, default=5.0, metavar="HZ", help="frames a second (default: 5)")
    budget.add_argument("--budget", type=float, metavar="MS", help="(default: between calm and cluttered frames)")
    budget.add_argument("--json", type=parse_path, help="also save the figures here")
    budget.add_argument("--plot", type=parse_path, help="draw threshold, density and latency over time here")
    budget.set_defaults(measure=run_budget)


def run(args: argparse.Namespace) -> int:
    from sparserefine_ros.errors import ParameterError, is_out_of_memory

    for option in ("json", "plot"):
        check_output(f"--{option}", getattr(args, option, None))
    for option in ("frames", "repeats"):
        if (count := getattr(args, option, None)) is not None and count < 1:
            raise ParameterError(f"--{option} is {count}; give 1 or more")
    try:
        result: int = args.measure(args)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            what = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ParameterError(f"memory ran out ({what}); give smaller images, or another device") from error
        raise
    return result


def run_bundle(args: argparse.Namespace) -> int:
    from sparserefine_ros.datasets.splits import load_split
    from sparserefine_ros.errors import ParameterError
    from sparserefine_ros.evaluation.compare import compare, markdown
    from sparserefine_ros.segmenter.bundle import Bundle

    if args.card and args.frames is not None:
        raise ParameterError("--card writes the figures of all validation frames; leave --frames out")
    bundle = Bundle.load(args.model)
    if args.card:
        _card_parts(bundle.path / "README.md")
    _, samples = load_split(bundle.provenance.get("dataset", {}), "val", args.data)
    table = compare(bundle, samples[: args.frames], args.device, args.precision, args.entropy_threshold)
    text = markdown(table)
    if args.card:
        write_card(bundle.path / "README.md", text)
    return _finish(table, text, args)


def run_peers(args: argparse.Namespace) -> int:
    from sparserefine_ros.benchmarks.peers import markdown, measure
    from sparserefine_ros.datasets.splits import load_split
    from sparserefine_ros.errors import ParameterError
    from sparserefine_ros.segmenter.bundle import Bundle

    bundle = Bundle.load(args.model)
    pointrend = Bundle.load(args.pointrend) if args.pointrend else None
    _, samples = load_split(bundle.provenance.get("dataset", {}), "val", args.data)
    try:
        table = measure(
            bundle, samples[: args.frames], pointrend, args.patches, args.patch_densities, args.device, args.precision,
            args.entropy_threshold,
        )  # fmt: skip
    except ValueError as error:  # patches that cannot be
        raise ParameterError(str(error)) from error
    return _finish(table, markdown(table), args)


def run_pruning(args: argparse.Namespace) -> int:
    from sparserefine_ros.benchmarks.pruning import markdown, measure
    from sparserefine_ros.errors import ParameterError
    from sparserefine_ros.segmenter.segmenter import pick_device

    keeps = args.keep or [[share] * 4 for share in (0.8, 0.6, 0.4)]
    try:
        result = measure(args.model, keeps, args.size, pick_device(args.device), args.repeats)
    except ValueError as error:  # a network without its package, shares out of range
        raise ParameterError(str(error)) from error
    return _finish(result, markdown(result), args)


def run_sparse(args: argparse.Namespace) -> int:
    from sparserefine_ros.benchmarks.sparse import measure, sweep
    from sparserefine_ros.benchmarks.sparse_case import Case
    from sparserefine_ros.benchmarks.sparse_report import draw, markdown
    from sparserefine_ros.errors import ParameterError
    from sparserefine_ros.evaluation.compare import save_json
    from sparserefine_ros.segmenter.segmenter import PRECISIONS, pick_device
    from sparserefine_ros.sparse.backends import backend_class, pick_backend

    try:
        channels = tuple(map(int, args.channels.split(",")))
        if min(channels) < 1:
            raise ValueError
    except ValueError as error:
        raise ParameterError(f"--channels {args.channels}: give C,C,... of 1 or more each") from error
    device, dtype = pick_device(args.device), PRECISIONS[args.precision]
    case = Case(args.size, args.density, channels, stride=args.stride, device=device, dtype=dtype)
    no_triton = backend_class("triton").missing(device) if device.type == "cuda" else "it is for CUDA"
    default = [*([] if no_triton else ["triton"]), pick_backend("auto", device, dtype).name, "torch"]
    backends = args.backends or list(dict.fromkeys(default))
    try:
        case.mask()
    except ValueError as error:
        raise ParameterError(str(error)) from error
    result = measure(case, backends, args.repeats, peers=not args.no_peers)
    if no_triton and device.type == "cuda":
        result["missing"]["triton"] = no_triton
    _finish(result, markdown(result), args)
    if args.plot:
        result["sweep"] = sweep(case, backends[0], max(1, args.repeats // 2))
        if args.json:
            save_json(result, args.json)
        draw(result, result["sweep"], args.plot)
    return 0


def run_decoders(args: argparse.Namespace) -> int:
    from sparserefine_ros.benchmarks.decoders import NETWORKS, markdown, measure
    from sparserefine_ros.errors import ParameterError
    from sparserefine_ros.segmenter.segmenter import pick_device

    names = args.networks or [name for name, (_, network) in NETWORKS.items() if "backbone" not in network]
    for name in names:
        if name not in NETWORKS:
            raise ParameterError(f"--networks has {name!r}; choose from {', '.join(NETWORKS)}")
    result = measure(names, args.size, pick_device(args.device), args.repeats)
    if not result["rows"]:
        raise ParameterError("; ".join(result["missing"].values()))
    return _finish(result, markdown(result), args)


def run_pipeline(args: argparse.Namespace) -> int:
    from sparserefine_ros.benchmarks.paper_models import MODELS, params_m
    from sparserefine_ros.benchmarks.pipeline import Setting, markdown, measure
    from sparserefine_ros.errors import ParameterError
    from sparserefine_ros.segmenter.segmenter import PRECISIONS, pick_device
    from sparserefine_ros.sparse.backends import pick_backend

    names = args.models or list(MODELS)
    for name in names:
        if name not in MODELS:
            raise ParameterError(f"--models has {name!r}; choose from {', '.join(MODELS)}")
    if args.params_only:
        counts, missing = {}, {}
        for name in names:
            try:
                counts[name] = params_m(MODELS[name])["dense"]
            except ValueError as error:  # a network without its package
                missing[name] = str(error)
        if not counts:
            raise ParameterError("; ".join(dict.fromkeys(missing.values())))
        lines = [f"{name} {millions:.2f} M" for name, millions in counts.items()]
        lines += [f"{name} not counted: {why}" for name, why in missing.items()]
        return _finish({"params_m": counts, **({"missing": missing} if missing else {})}, "\n".join(lines), args)
    device = pick_device(args.device)
    cuda = device.type == "cuda"
    height, width = args.size
    if height % 2 or width % 2 or min(height, width) < 64:
        raise ParameterError(f"--size {height}x{width}: give even numbers from 64 on")
    batches = args.batches or ([1, 2, 4, 8] if cuda else [1])
    warmup = (100 if cuda else 1) if args.warmup is None else args.warmup
    repeats = (500 if cuda else 3) if args.repeats is None else args.repeats
    if warmup < 0 or repeats < 1 or min(batches) < 1:
        raise ParameterError(f"--warmup {warmup} --repeats {repeats} --batches {batches}: give 0, 1 and 1 or more")
    if args.graph and not cuda:
        raise ParameterError(f"--graph is for CUDA, but the device is {device}; leave it out")
    precisions = args.precisions or ["fp16" if cuda else "fp32"]
    for precision in precisions:  # before minutes are spent on the first
        pick_backend(args.sparse_backend, device, PRECISIONS[precision])
    setting = Setting(args.size, device, warmup, repeats, args.stride, args.sparse_backend, args.graph, args.repeat)
    result = measure(names, setting, precisions, batches)
    if not result["models"]:
        raise ParameterError("; ".join(dict.fromkeys(result["missing"].values())))
    return _finish(result, markdown(result), args)


def run_runtimes(args: argparse.Namespace) -> int:
    from sparserefine_ros.benchmarks.runtimes import markdown, measure
    from sparserefine_ros.errors import ParameterError
    from sparserefine_ros.segmenter.bundle import Bundle
    from sparserefine_ros.segmenter.dense import RUNTIMES

    names = args.runtimes or [name for name in RUNTIMES if name not in ("auto", "torch_graph")]
    for name in names:
        if name not in RUNTIMES:
            raise ParameterError(f"--runtimes has {name!r}; choose from {', '.join(RUNTIMES)}")
    result = measure(Bundle.load(args.model), names, args.device, args.precision, args.repeats)
    if not result["rows"]:
        raise ParameterError("; ".join(dict.fromkeys(result["missing"].values())))
    return _finish(result, markdown(result), args)


def run_node(args: argparse.Namespace) -> int:
    from sparserefine_ros.benchmarks.node_overhead import markdown, measure
    from sparserefine_ros.errors import ParameterError

    if not (0 < args.rate < math.inf and 0 < args.duration < math.inf):
        raise ParameterError(f"--rate {args.rate:g} --duration {args.duration:g}: give numbers above 0")
    if args.cameras < 1:
        raise ParameterError(f"--cameras {args.cameras}: give 1 or more")
    priority = BY_NAME["receive_priority"].check(args.receive_priority)
    result = measure(args.size, args.rate, args.duration, args.cameras, args.split_cores, priority)
    return _finish(result, markdown(result), args)


def run_budget(args: argparse.Namespace) -> int:
    from sparserefine_ros.benchmarks import budget_live, budget_simulation
    from sparserefine_ros.errors import ParameterError

    if args.simulate:
        if args.plot:
            raise ParameterError("--plot draws what the live node did; leave it or --simulate out")
        result = budget_simulation.compare()
        table = budget_simulation.markdown(result)
    else:
        if not all(0 < number < math.inf for number in (args.rate, 1.0 if args.budget is None else args.budget)):
            raise ParameterError(f"--rate {args.rate:g} --budget {args.budget}: give numbers above 0")
        result = budget_live.measure(args.model, args.bag, args.size, args.rate, args.budget)
        table = budget_live.markdown(result)
    _finish(result, table, args)
    if args.plot:
        budget_live.draw(result, args.plot)
    return 0


def _finish(result: dict[str, Any], table: str, args: argparse.Namespace) -> int:
    """Saves the result where asked to, prints the table, and gives the command's status."""
    from sparserefine_ros.evaluation.compare import save_json

    if args.json:  # first: whoever reads the table may leave, as `head` does
        save_json(result, args.json)
    print(table)
    return 0


def write_card(card: Path, table: str) -> None:
    """Replaces what stands between the table marks of a model card."""
    from sparserefine_ros.evaluation import files

    head, tail = _card_parts(card)
    files.write_text(card, f"{head}\n{table}\n{tail}")


def _card_parts(card: Path) -> tuple[str, str]:
    """A card up to its first mark and from its second on, marks included; at the end of a card that has none."""
    start, end = CARD_MARK.format("start"), CARD_MARK.format("end")
    text = card.read_text() if card.exists() else f"# {card.parent.name}\n"
    if start not in text and end not in text:
        text += f"\n{start}\n{end}\n"
    head, _, rest = text.partition(start)
    _, found, tail = rest.partition(end)
    if not found:
        from sparserefine_ros.errors import ParameterError

        raise ParameterError(f"{card} lacks one of {start} and {end}, in this order; write both or neither")
    return head + start, end + tail
