"""The model card of a new bundle: what it was made from, and the command that gives its figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sparserefine_ros.evaluation import files
from sparserefine_ros.segmenter.bundle import Bundle
from sparserefine_ros.segmenter.licences import UNKNOWN
from sparserefine_ros.untrusted import read_text

CARD = "README.md"
LICENCE = "| licence |"


def write_trained_card(bundle: Bundle, recipe: str) -> None:
    """The card of a bundle trained from the recipe of that name, unless there is a card already."""
    source = bundle.provenance
    dataset = ", ".join(f"{key} {value}" for key, value in source.get("dataset", {}).items())
    counts = ", ".join(f"{count} {split}" for split, count in source.get("frames", {}).items())
    rows = {"trained from": f"recipe `{recipe}`" + (f", seed {source['seed']}" if "seed" in source else "")}
    if "bundle" in source:
        rows["dense segmenter of"] = f"bundle {source['bundle']}"
    _write(bundle, {**rows, "data": dataset + (f"; frames: {counts}" if counts else "")})


def write_distilled_card(bundle: Bundle, source: Bundle) -> None:
    """The card of a bundle whose refiner was distilled for ``source``, unless there is a card already."""
    facts = bundle.provenance["distilled"]
    kept = facts["frames"]
    trained = "trained on" if "refiner" in facts else "nothing was trained; the threshold is from"
    rows = {
        "distilled from": f"bundle {source.name}, dense weights sha256 `{bundle.dense.sha256}`",
        "refiner": f"{bundle.refiner.network if bundle.refiner else 'none'}; {trained} {kept['train']} frames without "
        f"labels, {kept['held_out']} held out",
        "licence": licence_of(source.path / CARD) or f"of the dense weights: {UNKNOWN}",
    }
    _write(bundle, rows)


def licence_of(card: Path) -> str:
    """What the card of a bundle says of its licence; empty where it says nothing, or there is none."""
    try:
        lines = read_text(card).splitlines()
    except (OSError, ValueError):
        return ""
    found = next((line for line in lines if line.startswith(LICENCE)), LICENCE)
    return found.removeprefix(LICENCE).strip().removesuffix("|").strip()


def _write(bundle: Bundle, rows: Mapping[str, str]) -> None:
    file = bundle.path / CARD
    if file.exists():
        return
    height, width = bundle.native_size
    rows = {
        **rows,
        "classes": f"{len(bundle.classes)}, {bundle.classes.name}: {', '.join(bundle.classes.names)}",
        "frames": f"{width}x{height}, seen at scale {bundle.scale:g}",
        "entropy threshold": f"{bundle.entropy_threshold} nats",
    }
    table = "\n".join(f"| {name} | {text} |" for name, text in rows.items())
    figures = (
        f"Its figures, written below: `sparserefine bench bundle {bundle.name} --card`.\n\n"
        if bundle.provenance.get("dataset")  # without one there are no frames to measure on
        else ""
    )
    marks = "<!-- table: start -->\n<!-- table: end -->\n"
    files.write_text(file, f"# {bundle.name}\n\n| | |\n|---|---|\n{table}\n\n{figures}{marks}")
