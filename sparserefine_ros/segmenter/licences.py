"""The licence that came with a checkpoint, and the model card that repeats it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparserefine_ros.segmenter.bundle import Bundle
from sparserefine_ros.untrusted import MAX_TEXT, parse_yaml
from sparserefine_ros.whole_files import write_whole

NAMES = ("license", "licence", "copying", "unlicense")  # what files begin with, in small letters
UNKNOWN = "none found with the checkpoint: ask those who published it before you use it"


def find_licence(checkpoint: Path) -> str:
    """What the folder of ``checkpoint``, or ``checkpoint`` where it is one, says of its licence; empty if nothing.

    That is the head of a README.md as the Hugging Face hub has it, or else a file of licence terms, by its first line.
    """
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    head = _front_matter(folder / "README.md") if checkpoint.is_dir() else {}
    if found := head.get("license"):
        named = str(head.get("license_name") or found)
        return f"{named} ({head['license_link']})" if head.get("license_link") else named
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name.lower().startswith(NAMES):
            lines = [line.strip() for line in _beginning(file).splitlines()]
            found = f"{file.name}, which begins: {next(filter(None, lines), '(empty)')}"
            return found if checkpoint.is_dir() else f"{found} (it lies beside the file; is it meant for it?)"
    return ""


def write_import_card(bundle: Bundle, report: str) -> None:
    """A model card that says where the weights are from and under which licence."""
    source = bundle.provenance
    height, width = bundle.native_size
    rows = {
        "imported from": f"{source['checkpoint']}, as {source['imported_as']}",
        "sha256 of it": source["checkpoint_sha256"],
        "licence": source["licence"] or UNKNOWN,
        "classes": f"{len(bundle.classes)}, {bundle.classes.name}: {', '.join(bundle.classes.names)}",
        "frames": f"{width}x{height}, seen at scale {bundle.scale:g}",
        "entropy threshold": f"{bundle.entropy_threshold} nats, a guess; `sparserefine calibrate` writes a measured "
        "one into `model.yaml`",
    }
    if "revision" in source:
        rows["revision"] = source["revision"]
    cells = {name: " ".join(str(text).replace("|", "\\|").split()) for name, text in rows.items()}
    table = "\n".join(f"| {name} | {text} |" for name, text in cells.items())
    card = (
        f"# {bundle.name}\n\n| | |\n|---|---|\n{table}\n\nWhere each weight went: `{report}`.\n\n"
        "<!-- table: start -->\n<!-- table: end -->\n"
    )
    write_whole(bundle.path / "README.md", card.encode())


def _front_matter(file: Path) -> dict[str, Any]:
    """The YAML between two lines of dashes that a model card of the hub begins with."""
    if not file.is_file():
        return {}
    parts = _beginning(file).split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        data = parse_yaml(parts[1])
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


def _beginning(file: Path) -> str:
    """Text that somebody else wrote, as much of it as is read of any."""
    with file.open("rb") as stream:
        return stream.read(MAX_TEXT).decode("utf-8-sig", errors="replace")
