"""`sparserefine bench node` and `bench budget` say what they measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_priority import permitted

from sparserefine_ros import cli
from sparserefine_ros.benchmarks import budget_live, budget_simulation, node_cameras, node_overhead
from sparserefine_ros.benchmarks.node_overhead import Resources, cores_of, running_on


def test_bench_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rclpy")
    file = tmp_path / "node.json"
    arguments = ["bench", "node", "--size", "64x96", "--rate", "20", "--duration", "1.5", "--json", str(file)]
    assert cli.main(arguments) == 0
    result = json.loads(file.read_text())
    assert {"p50", "p99"} <= set(result["overhead_ms"]) and result["overhead_ms"]["p50"] > 0
    assert result["overhead_ms"]["p50"] <= result["overhead_ms"]["p99"] <= result["overhead_ms"]["max"]
    whole, segmenter = result["stamp_to_publish_ms"]["max"], result["segmenter_ms"]["p50"]
    assert result["overhead_ms"]["p50"] < whole and segmenter < whole
    assert 5 < result["rate_hz"] < 25
    assert result["frames"]["sent"] == pytest.approx(30, abs=2)
    assert result["frames"]["masks"] + result["frames"]["lost"] == result["frames"]["sent"]
    assert result["camera"]["size"] == [64, 96] and result["camera"]["hz"] == 20
    assert len(result["memory"]["rss_mb"]) >= 2 and result["memory"]["handles"][0] > 0
    assert {"cpu", "cores"} <= set(result["hardware"]) and {"rclpy", "rmw", "torch"} <= set(result["versions"])
    copies = result["overhead_ms"]["p50"] / result["copy_ms"]
    said = capsys.readouterr().out
    assert f"overhead's p50 is as long as {copies:.1f} copies" in said
    assert f"| overhead | {result['overhead_ms']['p50']:.2f} |" in said and "96x64 rgb8 at 20 Hz" in said
    assert result["cores"] == cores_of(split=False)
    assert result["receive_priority"] == (1 if permitted() else 0)
    assert result["memory"]["rss_mb_per_hour"] is None and "an hour" not in said and "Second half of the run: " in said


def test_bench_node_of_several_cameras(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rclpy")
    file = tmp_path / "node.json"
    arguments = ["bench", "node", "--cameras", "3", "--size", "64x96", "--rate", "8", "--duration", "0.5"]
    assert cli.main([*arguments, "--split-cores", "--receive-priority", "0", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    rows = result["by_camera"]["cameras"]
    assert [row["camera"] for row in rows] == ["camera1", "camera2", "camera3"]
    assert [row["sent"] for row in rows] == [12] * 3  # 1.5 s with the warm-up
    for row in rows:
        assert row["received"] == row["processed"] + row["dropped"] <= row["sent"]
        assert 0 < row["masks"] <= row["processed"] and row["stamp_to_publish_ms"]["p50"] > 0
    assert result["by_camera"]["strays"] == 0 and result["camera"]["cameras"] == 3
    assert result["cores"] == cores_of(split=True) and result["receive_priority"] == 0
    assert "8 Hz from each of 3 cameras for 0.5 s" in capsys.readouterr().out


def test_a_copy_is_one_of_bytes_that_no_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_overhead, "COPIED", 1 << 20)
    clock = iter([0.0, 0.5, 1.0, 1.25, 2.0, 4.0, 5.0, 5.5])
    monkeypatch.setattr(node_overhead.time, "perf_counter", lambda: next(clock))
    assert node_overhead.copy_ms(1 << 18) == 500  # median of 500, 250, 2000, 500
    assert next(clock, None) is None  # four, of 256 kB each: 1 MB


@pytest.mark.parametrize(
    ("cores", "split", "camera", "node"),
    [({3}, True, [3], [3]), ({2, 5, 7}, True, [2], [5, 7]), ({2, 5, 7}, False, [2, 5, 7], [2, 5, 7])],
)
def test_a_camera_has_a_core_to_itself(
    monkeypatch: pytest.MonkeyPatch, cores: set[int], split: bool, camera: list[int], node: list[int]
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cores)
    assert cores_of(split) == {"camera": camera, "node": node}


def test_what_is_started_on_a_core_stays_there() -> None:
    before = os.sched_getaffinity(0)
    one = {max(before)}
    with running_on(sorted(one)):
        read = "import os; print(os.sched_getaffinity(0))"
        done = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(one) and os.sched_getaffinity(0) == before


def test_cameras_are_told_apart() -> None:
    pytest.importorskip("rclpy")
    from sparserefine_ros.node.load import LoadLog

    log = LoadLog(sent=list(range(1, 9)), camera={s: "ab"[s % 2] for s in range(1, 9)})  # a even, b odd
    log.masks = dict.fromkeys((2, 4, 6, 8, 3, 5), 9)
    log.timing = {s: {"latency_ms": 10.0 * s} for s in (2, 4, 6, 8, 3)}
    log.counters = {"a": {"received": 4, "processed": 4, "dropped": 0, "stale": 0}}
    result = node_cameras.by_camera(log, ["a", "b"], first_ns=3)
    a, b = result["cameras"]
    assert (a["sent"], a["masks"], a["processed"], a["dropped"]) == (4, 4, 4, 0)
    assert (b["sent"], b["masks"], b["processed"], b["dropped"]) == (4, 2, None, None)
    assert a["stamp_to_publish_ms"]["p50"] == 60 and a["stamp_to_publish_ms"]["max"] == 80  # of 40, 60, 80
    assert b["stamp_to_publish_ms"]["p50"] == 30 and result["fairness"] == 2
    assert "| a | 4 | 4 | 4 | 0 | 60.0 | 78.0 | 80.0 |\n| b | 4 | – | – | – | 30.0" in node_cameras.markdown(result)
    log.masks = {2: 9}
    starved = node_cameras.by_camera(log, ["a", "b"], first_ns=3)
    assert starved["fairness"] is None and "starved" in node_cameras.markdown(starved)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["node", "--rate", "0"], "--rate 0"),
        (["node", "--cameras", "0"], "--cameras 0"),
        (["budget", "--rate", "-1"], "-1"),
    ],
)
def test_bad_arguments(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_resources_are_this_process_own_and_slopes_are_per_hour() -> None:
    resources = Resources(os.getpid())
    resources.look(0.0)
    resources.look(0.5)  # too soon
    assert resources.seconds == [0.0] and resources.handles[0] == pytest.approx(len(os.listdir("/proc/self/fd")), abs=3)
    assert 20 < resources.rss_mb[0] < 20000 and resources.threads[0] >= 1
    grown = Resources(0, [float(s) for s in range(100)], [100 + 0.01 * s for s in range(100)], [5] * 100, [3] * 100)
    report = grown.report()
    assert report["rss_mb_per_hour"] == pytest.approx(36) and report["handles_per_hour"] == pytest.approx(0, abs=1e-9)
    assert report["rss_mb_first_last"] == [pytest.approx(100.5), pytest.approx(100.99)]
    short = Resources(0, [float(s) for s in range(40)], [100 + 0.01 * s for s in range(40)], [5] * 40, [3] * 40)
    assert short.report()["rss_mb_per_hour"] is None and short.report()["rss_mb_first_last"][0] == pytest.approx(100.2)


def test_simulated_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    scene = {"steady": budget_simulation.Plant(frames=60)}
    monkeypatch.setattr(budget_simulation, "SCENES", scene)
    file = tmp_path / "simulated.json"
    assert cli.main(["bench", "budget", "--simulate", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["controller"] for row in rows] == list(budget_simulation.CONTROLLERS)
    assert all(0 <= row["density"] <= 1 and row["p95_ms"] > 0 for row in rows)
    assert f"| steady | feedback alone | {rows[1]['p95_ms']:.1f} |" in capsys.readouterr().out


def made_up() -> dict[str, Any]:
    """A result as `budget_live.measure` gives it: four frames, one of them dense."""

    def run(latencies: list[float], thresholds: list[float | None]) -> dict[str, Any]:
        rows = [
            {"frame": i, "latency_ms": ms, "entropy_threshold": t, "density": 0.1 * i}
            for i, (ms, t) in enumerate(zip(latencies, thresholds, strict=True))
        ]
        quantiles = {p: float(np.quantile(latencies, q)) for p, q in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))}
        return {
            "latency_ms": quantiles, "miou": 0.5, "density": 0.15, "masks": 4, "late": 0.25, "timeline": rows,
        }  # fmt: skip

    runs = {"fixed": run([10, 20, 30, 40], [0.3] * 4), "budget": run([10, 20, 25, 25], [0.3, 0.4, None, 1.2])}
    return {
        "budget_ms": 25.0, "model": "tiny", "entropy_threshold": 0.3, "frames": 4, "rate_hz": 2.0, "stretch": 2,
        "runs": runs, "hardware": {"cpu": "c", "cores": 2},
    }  # fmt: skip


def test_the_budget_between_calm_and_cluttered_frames() -> None:
    timeline = made_up()["runs"]["fixed"]["timeline"]
    assert budget_live._middle(timeline) == pytest.approx((19.5 + 35) / 2)


def test_the_picture_and_the_table(tmp_path: Path) -> None:
    import cv2

    result = made_up()
    assert "| fixed | 25 | 38 | 40 | 25.0 % | 15.0 % | 50.00 | 4 |" in budget_live.markdown(result)
    budget_live.draw(result, tmp_path / "plots" / "budget.png")
    picture = cv2.imread(str(tmp_path / "plots" / "budget.png"))
    assert picture.shape[0] > 400 and picture.std() > 10
