"""`sparserefine bench`: measurements, each printing a table and saving it on request."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "measure: `bench bundle` compares HR dense, LR dense and LR + SparseRefine"
CARD_MARK = "<!-- table: {} -->"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    bundle = kinds.add_parser("bundle", help="accuracy, multiply-adds and time of a bundle, side by side in one run")
    bundle.add_argument("model", help="bundle: a folder or a name under models/")
    bundle.add_argument(
        "--data", type=Path, help="folder of the data set the bundle was trained on, where it needs one"
    )
    bundle.add_argument("--frames", type=int, help="use only the first N validation frames")
    bundle.add_argument("--entropy-threshold", type=float, help="nats (default: the bundle's)")
    bundle.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")
    bundle.add_argument("--precision", default="fp32", choices=("fp32", "fp16", "bf16"))
    bundle.add_argument("--json", type=Path, help="also save the figures here")
    bundle.add_argument("--card", action="store_true", help="write the table into the bundle's model card")


def run(args: argparse.Namespace) -> int:
    from sparserefine_ros.datasets.splits import load_split
    from sparserefine_ros.evaluation.compare import compare, markdown, save_json
    from sparserefine_ros.segmenter.bundle import Bundle

    bundle = Bundle.load(args.model)
    _, samples = load_split(bundle.provenance.get("dataset", {}), "val", args.data)
    table = compare(bundle, samples[: args.frames], args.device, args.precision, args.entropy_threshold)
    text = markdown(table)
    print(text)
    if args.json:
        save_json(table, args.json)
    if args.card:
        write_card(bundle.path / "README.md", text)
    return 0


def write_card(card: Path, table: str) -> None:
    """Replaces what stands between the table marks of a model card."""
    start, end = CARD_MARK.format("start"), CARD_MARK.format("end")
    text = card.read_text() if card.exists() else f"# {card.parent.name}\n\n{start}\n{end}\n"
    head, rest = text.split(start, 1)
    tail = rest.split(end, 1)[1]
    card.write_text(f"{head}{start}\n{table}\n{end}{tail}")
