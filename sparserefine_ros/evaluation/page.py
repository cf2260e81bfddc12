"""Self-contained pages: a template, its style and its script in one file that loads nothing from anywhere.

Whatever comes from bags, bundles or result files is text to the templates and is escaped. Should any of it ever get
through, the page's own policy forbids it to run: only the script whose hash is in the policy may.
"""

from __future__ import annotations

import base64
import hashlib
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sparserefine_ros.evaluation import files

FOLDER = Path(__file__).parent / "templates"
DASH = "–"


def render(template: str, context: dict[str, Any]) -> str:
    """The page of ``template`` (a file of ``templates``). Charts in ``context`` are SVG, everything else is text."""
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, ms=milliseconds, points=points)
    script, style = ((FOLDER / name).read_text("utf-8") for name in ("page.js", "page.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return environment.get_template(template).render(script=script, style=style, script_hash=digest, **context)


def write(template: str, context: dict[str, Any], path: Path) -> None:
    """Renders to ``path``; folders are made. Raises ResultError where it cannot be written."""
    files.write_text(path, render(template, context))


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction as per cent."""
    return DASH if value is None or math.isnan(value) else f"{100 * value:.{digits}f} %"


def points(value: float | None, digits: int = 2) -> str:
    """A difference of fractions in percentage points, with its sign."""
    return DASH if value is None or math.isnan(value) else f"{100 * value:+.{digits}f}"


def milliseconds(value: float | None) -> str:
    """Milliseconds with as many digits as they deserve."""
    if value is None or math.isnan(value):
        return DASH
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"
