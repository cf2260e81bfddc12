"""What a replay measured, computed from what it saw: joins, percentiles, counts, report."""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sparserefine_ros.commands import evaluate
from sparserefine_ros.datasets.classes import CAMVID, ClassList
from sparserefine_ros.datasets.pictures import read_ids, read_rgb
from sparserefine_ros.evaluation import gallery, picture, replay_metrics, report
from sparserefine_ros.evaluation.mask_spool import MaskSpool
from sparserefine_ros.evaluation.replay_metrics import ReplayLog

THREE = ClassList("three", ("a", "b", "c"), ((255, 0, 0), (0, 255, 0), (0, 0, 255)))
FACTS = {
    "mode": "live",
    "model": "tiny",
    "decoder": "sparserefine",
    "entropy_threshold": 0.5,
    "bag": {"name": "drive", "duration_s": 2.0, "sha256": "0" * 64},
}


class Masks(dict[int, np.ndarray]):
    """A mask store in memory."""


def log(sent: dict[int, float], answered: dict[int, float], received: int | None = None) -> ReplayLog:
    counters = None if received is None else {"received": received, "processed": len(answered), "malformed": 0}
    return ReplayLog(sent=sent, answered=answered, counters=counters)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300))
def test_percentiles_are_numpys(values: list[float]) -> None:
    result = replay_metrics.percentiles(values)
    assert list(result) == ["p50", "p90", "p95", "p99", "max"]
    assert result["max"] == max(values)
    for name, q in (("p50", 0.5), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99)):
        rank = q * (len(values) - 1)  # linear interpolation between the closest ranks, by hand
        low, high = sorted(values)[math.floor(rank)], sorted(values)[math.ceil(rank)]
        assert result[name] == pytest.approx(low + (high - low) * (rank - math.floor(rank)), rel=1e-9, abs=1e-9)


def test_percentiles_of_nothing() -> None:
    assert replay_metrics.percentiles([]) == {"p50": None, "p90": None, "p95": None, "p99": None, "max": None}


def test_latency_joins_by_stamp_whatever_the_order_of_arrival() -> None:
    seen = log({10: 1.0, 20: 2.0, 30: 3.0}, {30: 3.5, 10: 1.25})  # 30 before 10; 20 never
    assert replay_metrics.latencies_ms(seen) == [250.0, 500.0]


def test_counts_distinguish_received_from_processed() -> None:
    seen = log(dict.fromkeys(range(5), 0.0), {1: 1.0, 4: 2.0}, received=4)
    assert replay_metrics.count_frames(seen) == {"sent": 5, "received": 4, "processed": 2, "dropped": 3}
    assert replay_metrics.count_frames(log({1: 0.0}, {}))["received"] is None


def test_stage_percentiles_and_density() -> None:
    seen = ReplayLog(stage_ms={1: {"dense": 10.0, "refine": 1.0}, 2: {"dense": 30.0}}, density={1: 0.1, 2: 0.3})
    stages = replay_metrics.stage_percentiles(seen)
    assert stages["dense"]["p50"] == 20.0 and stages["dense"]["max"] == 30.0
    assert stages["refine"]["p99"] == 1.0
    assert replay_metrics.mean_density(seen) == pytest.approx(0.2)
    assert replay_metrics.mean_density(ReplayLog()) is None


def test_output_rate_and_jitter() -> None:
    seen = log({}, {1: 0.0, 2: 0.1, 3: 0.4})
    assert replay_metrics.rates(seen) == pytest.approx({"output_hz": 5.0, "jitter_ms": 100.0})
    assert replay_metrics.rates(log({}, {1: 0.0, 2: 1.0})) == {"output_hz": None, "jitter_ms": None}


def test_score_joins_by_stamp_and_leaves_out_frames_without_a_mask() -> None:
    label = np.array([[0, 0, 1, 255]], np.uint8)
    masks = Masks({3: np.array([[0, 1, 1, 2]], np.uint8), 1: np.array([[0, 0, 1, 0]], np.uint8), 9: label})
    score = replay_metrics.score([(1, label), (2, label), (3, label)], masks, THREE)
    # a: 3 hits, 4 in the union; b: 2 hits, 3 in the union; c only where the label is ignored
    assert (score.labelled, score.scored, score.absent) == (3, 2, ["c"])
    assert score.matrix.iou()["a"] == 3 / 4 and score.matrix.iou()["b"] == 2 / 3
    assert score.matrix.miou() == pytest.approx((3 / 4 + 2 / 3) / 2)


def test_labels_without_an_image_are_told_apart_from_frames_without_a_mask() -> None:
    label = np.zeros((1, 1), np.uint8)
    seen = log({1: 0.0, 2: 0.0}, {1: 1.0}, received=2)
    score = replay_metrics.score([(1, label), (2, label), (7, label)], Masks({1: label, 7: label}), THREE, seen.sent)
    assert (score.labelled, score.scored, score.without_image) == (2, 1, 1)
    text = "\n".join(report.remarks(report.build(seen, score, FACTS)))
    assert "1 of 2 labelled frames" in text and "1 labels are left out: no image has their stamp" in text
    none = replay_metrics.score([(8, label)], Masks(), THREE, seen.sent)
    text = "\n".join(report.remarks(report.build(seen, none, FACTS)))
    assert "1 labels are left out" in text and "holds no message" not in text and "no mask" not in text


def test_labels_of_another_size_are_left_out_and_told() -> None:
    """One of a thousand, found when all have been segmented, must not cost the rest."""
    label, larger = np.zeros((3, 4), np.uint8), np.zeros((3, 5), np.uint8)
    score = replay_metrics.score([(1, larger), (2, label)], Masks({1: label, 2: label}), THREE)
    assert (score.labelled, score.scored, score.other_size) == (1, 1, 1) and list(score.frames) == [2]
    seen = log({1: 0.0, 2: 0.0}, {1: 1.0, 2: 1.0}, received=2)
    text = "\n".join(report.remarks(report.build(seen, score, FACTS)))
    assert "1 labels are left out: they are of another size than their images" in text and "got no mask" not in text


@given(st.integers(0, 50), st.integers(1, 8))
def test_evenly_spaced(length: int, count: int) -> None:
    chosen = replay_metrics.evenly_spaced(list(range(length)), count)
    assert len(chosen) == min(length, count) == len(set(chosen))
    assert chosen == sorted(chosen)
    if length and count > 1:
        assert (chosen[0], chosen[-1]) == (0, length - 1)


def scored_report() -> dict[str, object]:
    label = np.array([[0, 1]], np.uint8)
    seen = log({1: 0.0, 2: 1.0, 3: 2.0}, {1: 0.5, 2: 1.5, 3: 2.5}, received=3)
    seen.stage_ms[1] = {"dense": 4.0}
    seen.density[1] = 0.25
    return report.build(seen, replay_metrics.score([(1, label)], Masks({1: label}), THREE), FACTS)


def test_report_keys_and_values(tmp_path: Path) -> None:
    report.write_json(scored_report(), tmp_path / "deep" / "results.json")
    read = json.loads((tmp_path / "deep" / "results.json").read_text())
    assert read["miou"] == 1.0
    assert read["iou"] == {"a": 1.0, "b": 1.0, "c": None}  # absent: null, not NaN
    assert read["absent_classes"] == ["c"]
    assert read["density"] == 0.25
    assert read["frames"] == {"sent": 3, "received": 3, "processed": 3, "dropped": 0}
    assert read["latency_ms"] == dict.fromkeys(("p50", "p90", "p95", "p99", "max"), 500.0)
    assert read["stages_ms"] == {"dense": dict.fromkeys(("p50", "p90", "p95", "p99", "max"), 4.0)}
    assert read["hardware"]["cores"] >= 1 and read["versions"]["numpy"] == np.__version__
    assert read["model"] == "tiny" and read["bag"]["name"] == "drive"


def test_report_without_ground_truth_says_so() -> None:
    result = report.build(log({1: 0.0}, {1: 1.0}, received=1), None, FACTS)
    assert result["miou"] is None and result["iou"] is None
    assert any("no ground truth" in line for line in report.remarks(result))


def test_remarks_name_each_loss() -> None:
    label = np.zeros((1, 1), np.uint8)
    seen = log({1: 0.0, 2: 0.0, 3: 0.0}, {1: 1.0}, received=2)
    assert seen.counters is not None
    seen.counters["malformed"] = 1
    seen.timeouts.append(2)
    result = report.build(seen, replay_metrics.score([(1, label), (2, label)], Masks({1: label}), THREE), FACTS)
    text = "\n".join(report.remarks(result))
    parts = ("1 of 2 labelled frames", "b, c", "1 of 3 frames never reached", "1 frames could not", "1 frames got")
    for part in parts:
        assert part in text
    assert report.remarks(scored_report()) == ["left out of mIoU, neither labelled nor predicted: c"]


def test_tables_show_the_numbers() -> None:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    report.show(scored_report(), console)
    text = console.export_text()
    assert "100.00 % over 1 frames" in text and "3 sent, 3 received, 3 processed, 0 dropped" in text
    assert "500.0" in text and "tiny on drive (live)" in text


def test_help_lists_the_values_of_the_nodes_parameters() -> None:
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    text = " ".join(parser.format_help().split())
    assert "(auto, true, false; default: auto)" in text and "(auto, 0.05 to 1; default: auto)" in text


def test_brackets_in_names_are_text() -> None:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    facts = {**FACTS, "model": "[/red]", "bag": {**FACTS["bag"], "name": "drive[/x] [red]"}}
    classes = ClassList("odd", ("[/i]", "[b]road"), ((0, 0, 0), (1, 1, 1)))
    label = np.ones((1, 1), np.uint8)
    result = report.build(
        log({1: 0.0}, {1: 0.5}), replay_metrics.score([(1, label)], Masks({1: label}), classes), facts
    )
    report.show(result, console)
    text = console.export_text()
    assert "[/red] on drive[/x] [red] (live)" in text and "predicted: [/i]" in text and "[b]road" in text


def test_wrong_pixels_are_red_and_unlabelled_black() -> None:
    image = np.full((1, 3, 3), 100, np.uint8)
    drawn = picture.errors(image, np.array([[0, 1, 2]], np.uint8), np.array([[0, 0, 255]], np.uint8))
    assert drawn[0].tolist() == [[60, 60, 60], [255, 40, 40], [0, 0, 0]]


def test_overlay_blends_and_leaves_unlabelled_pixels() -> None:
    image = np.full((1, 2, 3), 100, np.uint8)
    drawn = picture.overlay(image, np.array([[0, 255]], np.uint8), THREE)
    assert drawn[0].tolist() == [[193, 40, 40], [100, 100, 100]]  # 0.6 * colour + 0.4 * image


@pytest.mark.parametrize("with_label", [True, False])
def test_picture_is_drawn(tmp_path: Path, with_label: bool) -> None:
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 11, (60, 90), np.uint8)
    panel = picture.Panel(
        "first", rng.integers(0, 256, (60, 90, 3), np.uint8), mask, mask if with_label else None, mask > 5
    )
    picture.draw([panel, panel], CAMVID, tmp_path / "new" / "p.png", "title")
    drawn = cv2.imread(str(tmp_path / "new" / "p.png"))
    columns = 5 if with_label else 3
    assert drawn.shape[1] == round(columns * picture.TILE_INCHES * 110)
    selected = np.all(drawn == picture.SELECTED[::-1], axis=2)
    assert selected.mean() > 0.01  # the yellow of the selected pixels is in it


def test_spool_serves_score() -> None:
    label = np.array([[0, 2, 1]], np.uint8)
    with MaskSpool() as spool:
        spool.put_mask(4, label)
        assert replay_metrics.score([(4, label)], spool, THREE).matrix.accuracy() == 1.0


def test_masks_go_into_a_folder_of_any_name(tmp_path: Path) -> None:
    """cv2.imwrite ends the process where a name is no UTF-8."""
    folder = tmp_path / os.fsdecode(b"masken_f\xfcr_heute")
    mask = np.array([[0, 2, 255]], np.uint8)
    with MaskSpool() as spool:
        spool.put_mask(4, mask)
        assert gallery.save_masks(spool, THREE, folder) == 1
    np.testing.assert_array_equal(read_ids(folder / "4.png"), mask)
    np.testing.assert_array_equal(read_rgb(folder / "4_color.png"), THREE.lut()[mask])
