"""Results frame by frame: packing, the bootstrap, and two runs beside each other."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparserefine_ros import cli
from sparserefine_ros.commands import compare as compare_command
from sparserefine_ros.datasets.classes import ClassList
from sparserefine_ros.errors import ResultError
from sparserefine_ros.evaluation import bootstrap, per_frame, run_comparison
from sparserefine_ros.evaluation.boundary import boundary_counts
from sparserefine_ros.evaluation.metrics import ConfusionMatrix

TWO = ClassList("two", ("road", "sky"), ((1, 2, 3), (4, 5, 6)))
FRAMES = 40


def result(error: float, latency: float, frames: int = FRAMES) -> dict[str, Any]:
    """A run whose masks miss about ``error`` of the pixels; the same frames are hard in every run."""
    rng = np.random.default_rng(3)
    confusion, boundary = [], []
    for _ in range(frames):
        hard = rng.uniform(0.5, 1.5)
        label = rng.integers(0, 2, (12, 12), np.uint8)
        flip = rng.random(label.shape) < error * hard
        mask = np.where(flip, 1 - label, label).astype(np.uint8)
        matrix = ConfusionMatrix(TWO)
        matrix.update(label, mask)
        confusion.append(matrix.counts)
        boundary.append(boundary_counts(label, mask, 2))
    stamps = [1_700_000_000_000_000_000 + i for i in range(frames)]
    return {
        "model": "m", "mode": "offline", "parameters": {"scale": error}, "bag": {"name": "b", "sha256": "0" * 64},
        "classes": {"name": "two", "names": list(TWO.names)},
        "per_frame": {
            "stamps": stamps, "sent_s": list(range(frames)), "density": [0.2] * frames, "stages_ms": {},
            "latency_ms": [latency + i % 5 for i in range(frames)], "scored": stamps,
            "confusion": per_frame.pack(np.stack(confusion)), "boundary": per_frame.pack(np.stack(boundary)),
        },
    }  # fmt: skip


@given(st.lists(st.integers(0, 2**31 - 1), min_size=6, max_size=6))
def test_packing_keeps_every_count(values: list[int]) -> None:
    counts = np.array(values).reshape(1, 2, 3)
    np.testing.assert_array_equal(per_frame.unpack(json.loads(json.dumps(per_frame.pack(counts)))), counts)


@pytest.mark.parametrize(
    "change",
    [{"shape": [2**20, 2**20]}, {"shape": [-1, 2]}, {"shape": [3, 2]}, {"data": "AAAA"}, {"data": "!"}, {"data": None}],
)
def test_damaged_counts_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ResultError):
        per_frame.unpack({**per_frame.pack(np.ones((2, 2), int)), **change})


def test_a_bomb_is_not_inflated() -> None:
    bomb = {**per_frame.pack(np.zeros(10**6, int)), "shape": [4]}  # a few hundred bytes that announce 4 numbers
    with pytest.raises(ResultError, match="damaged"):
        per_frame.unpack(bomb)


def test_counts_beyond_int32_are_refused() -> None:
    with pytest.raises(ValueError, match="int32"):
        per_frame.pack(np.array([2**31]))


def test_resamples_are_sums_over_drawn_frames() -> None:
    counts = np.arange(12 * 6).reshape(12, 2, 3)
    drawn = bootstrap.weights(12, resamples=250)
    assert drawn.shape == (250, 12) and (drawn.sum(1) == 12).all()
    sums = bootstrap.resample_sums(counts, drawn)
    naive = sum(np.repeat(counts[None, f], drawn[7, f], 0).sum(0) for f in range(12))
    np.testing.assert_array_equal(sums[7], naive)
    assert len(bootstrap.weights(bootstrap.MIN_FRAMES - 1)) == 0


def test_quantiles_are_those_of_the_drawn_values() -> None:
    values = np.random.default_rng(0).permutation(np.arange(30.0))
    drawn = bootstrap.weights(30, resamples=120)
    for q in (0.5, 0.95, 0.99):
        found = bootstrap.resampled_quantiles(values, drawn, q)
        for r in (0, 55, 119):
            assert found[r] == pytest.approx(np.percentile(np.repeat(values, drawn[r]), 100 * q))


@pytest.mark.parametrize(("frames", "at_least"), [(30, 0.87), (200, 0.92)])
def test_the_interval_covers_as_often_as_it_says(frames: int, at_least: float) -> None:
    """Means of normal values: about 95 % of the intervals must hold the true mean, somewhat fewer for ten blocks."""
    rng, held = np.random.default_rng(1), 0
    drawn = bootstrap.weights(frames, resamples=400)
    for _ in range(600):
        values = rng.normal(5.0, 2.0, frames)
        found = bootstrap.interval(values.mean(), bootstrap.resample_sums(values, drawn) / frames)
        held += found.low <= 5.0 <= found.high
    assert at_least <= held / 600 <= 0.97


def test_blocks_are_of_neighbours() -> None:
    """1000 frames: of ten at a time, around the end, and each as often as another."""
    drawn = bootstrap.weights(1000, resamples=300).astype(int)
    assert (drawn.sum(1) == 1000).all()
    steps = np.abs(np.diff(drawn, axis=1, append=drawn[:, :1])).sum(1)
    assert (steps <= 2 * 100).all() and drawn.max() >= 4  # a hundred blocks have two ends each
    assert abs(drawn.mean(0) - 1).max() < 0.3


def test_frames_that_resemble_their_neighbours_widen_the_interval() -> None:
    """A hundred values, each half the one before and half chance: drawn one by one their interval holds the mean in 71
    of a hundred cases."""
    rng, held = np.random.default_rng(2), 0
    drawn = bootstrap.weights(100, resamples=400)
    for _ in range(300):
        values = np.zeros(150)
        for i in range(1, 150):
            values[i] = 0.5 * values[i - 1] + rng.normal()
        found = bootstrap.interval(values[50:].mean(), bootstrap.resample_sums(values[50:], drawn) / 100)
        held += found.low <= 0 <= found.high
    assert held / 300 >= 0.82


def test_a_class_of_few_frames_has_no_interval() -> None:
    """However sure those frames look: they would settle by themselves what chance put into them."""
    counts = np.zeros((100, 2, 3), int)
    counts[:, 0, 0] = 1000
    counts[:9, 1, 1], counts[:9, 1, 0] = 50, 50
    better = counts.copy()
    better[:9, 1, 1] += 1
    better[:9, 1, 0] -= 1
    runs = [result(0.1, 1.0, 100) for _ in range(2)]
    for run, its in zip(runs, (counts, better), strict=True):
        run["per_frame"]["confusion"] = per_frame.pack(its)
    assert list(bootstrap.frames_with(counts)) == [100, 9]
    road, sky = run_comparison.compare(*runs).classes
    assert np.isfinite(road.difference.low) and sky.difference.value > 0 and sky.verdict == "open"
    counts[9, 1, 1] = better[9, 1, 1] = 50
    for run, its in zip(runs, (counts, better), strict=True):
        run["per_frame"]["confusion"] = per_frame.pack(its)
    assert run_comparison.compare(*runs).classes[1].verdict == "better"


def test_metrics_are_the_confusion_matrixs() -> None:
    rng = np.random.default_rng(0)
    matrix = ConfusionMatrix(TWO)
    matrix.update(rng.integers(0, 2, (9, 9), np.uint8), rng.choice([0, 1, 255], (9, 9)).astype(np.uint8))
    assert bootstrap.iou_by_class(matrix.counts).tolist() == list(matrix.iou().values())
    assert bootstrap.class_mean(bootstrap.iou_by_class(matrix.counts)) == matrix.miou()
    assert bootstrap.accuracy(matrix.counts) == matrix.accuracy()
    assert np.isnan(bootstrap.class_mean(np.array([np.nan, np.nan])))


def test_a_better_run_is_found_better() -> None:
    a, b = result(0.20, 100.0), result(0.10, 80.0)
    found = run_comparison.compare(a, b)
    rows = {row.name: row for row in found.rows}
    total = [per_frame.unpack(r["per_frame"]["confusion"]).sum(0) for r in (a, b)]
    expected = bootstrap.class_mean(bootstrap.iou_by_class(total[1])) - bootstrap.class_mean(
        bootstrap.iou_by_class(total[0])
    )
    assert rows["mIoU"].difference.value == pytest.approx(expected)
    assert rows["mIoU"].verdict == "better" and rows["mIoU"].difference.low > 0
    assert rows["latency p50"].difference.value == -20.0 and rows["latency p50"].verdict == "changed"
    assert rows["refined pixels"].verdict == "open"
    assert (found.scored, found.answered) == (FRAMES, FRAMES)
    assert found.settings == [("parameters: scale", 0.2, 0.1)]
    back = {row.name: row for row in run_comparison.compare(b, a).rows}
    assert back["mIoU"].verdict == "worse" and back["latency p50"].verdict == "changed"
    assert back["latency p99"].verdict == "open", "40 frames tell nothing of their slowest hundredth"
    many = {row.name: row for row in run_comparison.compare(*(result(0.2, ms, 500) for ms in (100, 80))).rows}
    assert [many[f"latency {q}"].verdict for q in ("p50", "p95", "p99")] == ["changed"] * 3
    assert back["mIoU"].difference.high == pytest.approx(-rows["mIoU"].difference.low)  # the same resamples


def test_pairing_narrows_the_interval() -> None:
    """Both runs see the same resamples: against itself a run differs by exactly nothing."""
    run = result(0.2, 50.0)
    for row in run_comparison.compare(run, run).rows:
        if row.name not in ("latency p95", "latency p99"):
            assert (row.difference.value, row.difference.low, row.difference.high) == (0.0, 0.0, 0.0)


def test_frames_are_joined_by_stamp() -> None:
    a, b = result(0.2, 50.0), result(0.2, 50.0)
    frames = b["per_frame"]  # the same frames in another order, the first without a mask
    turned = list(range(FRAMES - 1, 0, -1))
    for name in ("confusion", "boundary"):
        frames[name] = per_frame.pack(per_frame.unpack(frames[name])[turned])
    frames["scored"] = [frames["scored"][i] for i in turned]
    frames["latency_ms"][0] = None
    found = run_comparison.compare(a, b)
    assert (found.scored, found.answered) == (FRAMES - 1, FRAMES - 1)
    assert {row.difference.value for row in found.rows} == {0.0}


def test_the_bags_topics_are_part_of_the_setting() -> None:
    a, b = (
        {**result(0.2, 50.0), "bag": {"name": "b", "sha256": "0" * 64, "image_topic": t}} for t in ("/left", "/right")
    )
    assert run_comparison.compare(a, b).settings == [("bag: image_topic", "/left", "/right")]


def test_names_tell_the_runs_apart() -> None:
    assert compare_command.short_names(Path("x/a.json"), Path("y/b.json")) == ("a", "b")
    assert compare_command.short_names(Path("/x/q/r.json"), Path("/y/q/r.json")) == ("x/q/r", "y/q/r")
    assert compare_command.short_names(Path("r.json"), Path("y/r.json")) == ("r", "y/r")
    assert compare_command.short_names(Path("r.json"), Path("r.json")) == ("r.json", "r.json")


def test_few_frames_have_no_interval() -> None:
    found = run_comparison.compare(result(0.2, 50.0, 5), result(0.1, 50.0, 5))
    assert all(np.isnan(row.difference.low) and row.verdict == "open" for row in found.rows)
    assert json.loads(json.dumps(run_comparison.as_data(found), allow_nan=False))["rows"][0]["low"] is None


def broken(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(result(0.1, 1.0, 12)), **changes}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (broken(bag={"name": "c", "sha256": "1" * 64}), "different bags.*within one bag"),
        (broken(classes={"names": ["a", "b"]}), "different classes"),
        (broken(per_frame={}), "damaged"),
        (broken(bag=[]), "damaged"),
        (broken(classes={"names": [1, 1]}), "damaged.*no text"),
    ],
)
def test_runs_that_cannot_be_compared(other: dict[str, Any], message: str) -> None:
    with pytest.raises(ResultError, match=message):
        run_comparison.compare(result(0.1, 1.0, 12), other)


@pytest.mark.parametrize("text", ["", "[]", '{"model": "m"}', '{"per_frame": 3}', "[" * 200_000, '{"rate": NaN}'])
def test_files_that_are_no_results(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ResultError, match=r"a\.json"):
        run_comparison.load(tmp_path / "a.json")
    with pytest.raises(ResultError, match="cannot read"):
        run_comparison.load(tmp_path / "missing.json")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, run in (("a", result(0.2, 100.0)), ("b", result(0.1, 80.0))):
        (tmp_path / f"{name}.json").write_text(json.dumps(run))
    files = [str(tmp_path / name) for name in ("a.json", "b.json", "c.html", "c.json")]
    assert cli.main(["compare", files[0], files[1], "--html", files[2], "--json", files[3]]) == 0
    page, data = Path(files[2]).read_text(), json.loads(Path(files[3]).read_text())
    row = data["rows"][0]
    assert row["name"] == "mIoU" and row["low"] < row["difference"] < row["high"] and row["verdict"] == "better"
    assert f"{100 * row['difference']:+.2f}" in page and "2000 bootstrap resamples" in page
    assert "better" in capsys.readouterr().out
    assert cli.main(["compare", files[0], files[1], "--json", files[1]]) == 2
    assert "would write over" in capsys.readouterr().err and json.loads(Path(files[1]).read_text())["per_frame"]
    assert cli.main(["compare", files[0], files[2]]) == 2
    assert "error: cannot read" in capsys.readouterr().err
    assert cli.main(["compare", files[0], files[1], "--json", f"{files[0]}/c.json"]) == 2
    assert "error: cannot make the folder" in capsys.readouterr().err


def test_names_are_text_in_any_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets are no markup, and what the terminal's encoding lacks ends nothing."""
    run = {**result(0.2, 100.0, 5), "device": "\x1b]0;title\x07", "classes": {"names": ["[/b]road", "[red]straße"]}}
    (tmp_path / "[i]a.json").write_text(json.dumps(run))
    (tmp_path / "b.json").write_text(json.dumps({**run, "device": "cpu"}))
    command = [sys.executable, "-m", "sparserefine_ros.cli", "compare", "[i]a.json", "b.json", "--html", "[b].html"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "200"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for text in (
        "[/b]road",
        r"[red]stra\xdfe",
        r"\u2013",
        "a: [i]a, b: b",
        "wrote [b].html",
        r"\x1b]0;title\x07 | cpu",
    ):
        assert text in done.stdout
    assert cli.main(["compare", str(tmp_path / "\x1b[2Jnone"), "b"]) == 2
    assert r"\x1b[2Jnone" in capsys.readouterr().err
