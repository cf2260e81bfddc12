"""What was measured, as a table and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparserefine_ros.evaluation import files


def markdown(result: dict[str, Any]) -> str:
    """One table by level, one of totals beside peers, and the setting."""
    case, peak = result["case"], result["peak_gflops"]
    lines = ["| level | ms | GMAC | GFLOP/s | of the machine's matrix product |", "|---|---|---|---|---|"]
    for row in result["levels"]:
        lines.append(
            f"| {row['level']} | {row['ms']:.2f} | {row['gmac']:.2f} | {row['gflops']:.0f} | {row['share']:.0%} |"
        )
    lines += ["", "| | ms | of which maps | time / ours |", "|---|---|---|---|"]
    mine = result["totals"][result["ours"]]
    for name, ms in sorted(result["totals"].items(), key=lambda item: item[1]):
        maps = f"{result['maps'][name]:.1f}" if name in result["maps"] else "–"
        lines.append(
            f"| {'**' + name + '**' if name == result['ours'] else name} | {ms:.1f} | {maps} | {ms / mine:.2f} |"
        )
    missing = "".join(f" Not measured: {name} ({why})." for name, why in result["missing"].items())
    height, width = case["size"]
    setting = [
        f"{case['sites']:,} of {width}x{height} pixels ({case['density']:.1%})",
        f"channels {'/'.join(map(str, case['channels']))}, {case['stride']} strides, {case['dtype']}",
        f"{result['gmac']:.1f} GMAC; {case['device']}, {case['threads']} threads, torch {case['torch']}",
        f"matrix product {peak:.0f} GFLOP/s, peak memory {result['memory_mb'] / 1e3:.2f} GB",
    ]
    setting.append(f"selection, classifier and ensembler {result['ends_ms']:.1f} ms ({result['ends_ms'] / mine:.1%})")
    method = (
        f"Medians of {case['repeats']} rounds in turn after one, maps included; the peers after them: spconv on one "
        "thread, where alone its CPU build is right; dense once. GMAC are the plain convolution's, also where blocks "
        f"of pixels need fewer.{missing}"
    )
    lines += ["", ", ".join(setting) + ". " + method]
    return "\n".join(lines)


def draw(result: dict[str, Any], sweep: dict[str, list[dict[str, float]]], file: Path) -> None:
    """Time by level beside peers, over density and over image size."""
    from matplotlib.figure import Figure  # imported late: slow, and only drawing needs it

    case = result["case"]
    figure = Figure(figsize=(13, 4), layout="constrained")
    bars, density, size = figure.subplots(1, 3)
    totals = sorted(result["totals"].items(), key=lambda item: item[1])
    colours = ["#d62728" if name == result["ours"] else "#7f7f7f" for name, _ in totals]
    drawn = bars.barh([name for name, _ in totals], [ms for _, ms in totals], color=colours)
    bars.bar_label(drawn, [f" {ms:,.0f} ms" if ms >= 100 else f" {ms:.2f} ms" for _, ms in totals])
    bars.set(xlabel="ms", title=f"{case['sites']:,} sites, {case['dtype']}")
    bars.margins(x=0.3)
    for axis, name, label in ((density, "density", "density, %"), (size, "size", "image, megapixels")):
        points = sweep[name]
        xs = [100 * p["density"] if name == "density" else p["megapixels"] for p in points]
        axis.plot(xs, [p["ms"] for p in points], "o-", color="#d62728", label=result["ours"])
        last = points[-1]
        line = [last["ms"] * p["sites"] / max(1, last["sites"]) for p in points]
        axis.plot(xs, line, ":", color="grey", label="proportional to the selected pixels")
        axis.set(xlabel=label, ylabel="ms", xlim=(0, None), ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(f"Sparse U-Net {'/'.join(map(str, case['channels']))}, maps included, {case['device']}")
    files.write_figure(file, figure)
