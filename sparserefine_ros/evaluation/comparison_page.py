"""The comparison of two runs for people: tables in a terminal, or a page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparserefine_ros.evaluation import bootstrap, page
from sparserefine_ros.evaluation.report_charts import interval_chart
from sparserefine_ros.evaluation.run_comparison import Comparison, Row
from sparserefine_ros.untrusted import printable

WORDS = {"better": "better", "worse": "worse", "changed": "changed", "open": "not settled"}


def write(comparison: Comparison, names: tuple[str, str], path: Path) -> None:
    """Writes the page; ``names`` are those of the result files."""
    context = {
        "title": f"{names[1]} against {names[0]}",
        "names": names,
        "c": comparison,
        "rows": [(row.name, *cells(row), row.verdict) for row in comparison.rows],
        "class_rows": [(row.name, *cells(row), row.verdict) for row in comparison.classes],
        "words": WORDS,
        "chart": chart(comparison.classes),
        "method": bootstrap.METHOD,
        "too_few": too_few(comparison),
        "min_frames": bootstrap.MIN_FRAMES,
    }
    page.write("comparison.html.j2", context, path)


def too_few(comparison: Comparison) -> bool:
    """Whether there are too few frames for intervals."""
    counts = [count for count in (comparison.scored, comparison.answered) if count]
    return min(counts, default=0) < bootstrap.MIN_FRAMES


def show(comparison: Comparison, names: tuple[str, str], console: Console) -> None:
    """Prints the tables and what differs in the setting."""
    for title, rows in (("all", comparison.rows), ("IoU by class", comparison.classes)):
        if not rows:
            continue
        table = Table(title=title)
        for heading in ("", "a", "b", "b - a", "95 %", ""):
            table.add_column(heading, justify="left" if not heading else "right")
        for row in rows:
            table.add_row(escape(printable(row.name)), *cells(row), WORDS[row.verdict])
        console.print(table)
    method = f"fewer than {bootstrap.MIN_FRAMES} frames in both: no intervals"
    if not too_few(comparison):
        method = f"{bootstrap.METHOD}, paired by stamp"
    console.print(f"a: {names[0]}, b: {names[1]}; {method}", highlight=False, markup=False)
    frames = f"{comparison.scored} frames scored in both, {comparison.answered} answered in both"
    console.print(frames, highlight=False)
    for name, left, right in comparison.settings:
        line = printable(f"differs: {name}: {left} | {right}")
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def cells(row: Row) -> tuple[str, str, str, str]:
    """a, b, their difference and its interval, as text in the row's unit."""
    d = row.difference
    if row.unit == "%":
        ends = page.DASH if np.isnan(d.low) else f"{page.points(d.low)} to {page.points(d.high)}"
        return page.percent(row.a, 2), page.percent(row.b, 2), page.points(d.value), ends
    ends = page.DASH if np.isnan(d.low) else f"{d.low:+.1f} to {d.high:+.1f}"
    return f"{row.a:.1f} ms", f"{row.b:.1f} ms", f"{d.value:+.1f}", ends


def chart(rows: list[Row]) -> str | None:
    """Differences of IoU by class, in percentage points; None where no interval is known."""
    known = [(r.name, 100 * r.difference.value, 100 * r.difference.low, 100 * r.difference.high)
             for r in rows if np.isfinite([r.difference.value, r.difference.low]).all()]  # fmt: skip
    return interval_chart(known, "difference of IoU, percentage points") if known else None
