"""`bench pipeline`: three ways to the same class ids, their times, and what is said where memory runs out."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparserefine_ros.benchmarks import pipeline
from sparserefine_ros.benchmarks.paper_models import MODELS, PaperModel, gmacs
from sparserefine_ros.benchmarks.pipeline import OUT_OF_MEMORY, Pipeline, Setting, markdown, measure
from sparserefine_ros.cli import main
from sparserefine_ros.commands.arguments import parse_size
from sparserefine_ros.segmenter.preprocess import normalise
from sparserefine_ros.segmenter.refiner_input import refiner_input

TINY = PaperModel("compact", {"widths": [4, 4, 4, 4], "depths": [1, 1, 1]}, 0.25, channels=(4, 6))
SETTING = Setting((64, 96), warmup=1, repeats=4)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "tiny", TINY)


@torch.inference_mode()
def test_ways_end_in_class_ids_of_native_size() -> None:
    line = Pipeline("tiny", SETTING, "fp32", 2)
    hr, lr, refined = (getattr(line, way)() for way in pipeline.WAYS)
    assert hr.shape == lr.shape == refined.shape == (2, 64, 96)
    assert torch.equal(hr, line.network(line.images).argmax(1))
    low = line.network(line.low).argmax(1)
    assert low.shape == (2, 32, 48)
    assert torch.equal(lr, low.repeat_interleave(2, 1).repeat_interleave(2, 2))
    selected = line.seen.selected
    assert float(selected.float().mean()) == pytest.approx(0.25, abs=1e-3)
    assert not torch.equal(selected[0], selected[1])
    assert torch.equal(refined[~selected].long(), lr[~selected])  # only the selected may change


@torch.inference_mode()
def test_refined_pixels_are_the_refiners() -> None:
    line = Pipeline("tiny", SETTING, "fp32", 1)
    refined = line.refined()
    refiner, selected = line.refining.network, line.seen.selected
    pyramid = refiner.pyramid(selected)
    sites = pyramid.levels[0]
    batch, row, column = sites.sites.unbind(1)
    initial = line.network(line.low)[batch, :, row // 2, column // 2]
    refiner.fused = None
    expected = refiner(refiner_input(sites, line.seen.native), initial, pyramid).ensembled.argmax(1)
    assert (refined[selected] == expected).float().mean() > 0.99  # ties aside


def test_table_and_json() -> None:
    result = measure(["tiny"], SETTING, ["bf16"], [1, 2])
    entry = result["models"]["tiny"]
    assert [(row["precision"], row["batch"]) for row in entry["rows"]] == [("bf16", 1), ("bf16", 2)]
    net, refiner = TINY.dense(), TINY.refiner()
    assert result["params_m"]["tiny"] == sum(p.numel() for p in net.parameters()) / 1e6
    assert entry["params_m"]["refiner"] == sum(p.numel() for p in refiner.parameters()) / 1e6
    for row in entry["rows"]:
        for way in pipeline.WAYS:
            assert 0 < row[way]["p10"] <= row[way]["ms"] <= row[way]["p90"]
        assert row["speedup"] == pytest.approx(row["hr"]["ms"] / row["refined"]["ms"])
        assert set(row["stages"]) == set(pipeline.STAGES) and min(row["stages"].values()) > 0
    text = markdown(result)
    assert text.count("| tiny |") == 2 and "Random weights" in text
    assert f"{entry['rows'][0]['speedup']:.2f}" in text
    json.dumps(result)


def test_repetition_beside_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With all pixels selected it is HR dense, in values and in work; what cannot be repeated has no such figures."""
    with torch.inference_mode():
        line = Pipeline("tiny", replace(SETTING, repeat=True), "fp32", 2)
        repeated, lr, selected = line.repeated(), line.lr(), line.seen.selected
        assert torch.equal(repeated[~selected].long(), lr[~selected]) and not torch.equal(repeated.long(), lr)
        line.seen = replace(line.seen, selected=torch.ones_like(selected))
        line.images = normalise(line.seen.native)
        assert (line.repeated() == line.hr()).float().mean() > 0.999  # ties aside
        gmac = line.repeated_gmac()
    assert gmac == pytest.approx(gmacs(TINY, SETTING.size)["hr"], rel=0.05)
    file = tmp_path / "p.json"
    words = ["--models", "tiny", "offsets", "--device", "cpu", "--size", "64x96", "--repeats", "2", "--repeat"]
    MODELS["offsets"] = replace(TINY, args={**TINY.args, "offsets": True})
    try:
        assert main(["bench", "pipeline", *words, "--json", str(file)]) == 0
    finally:
        del MODELS["offsets"]
    models = json.loads(file.read_text())["models"]
    [row], [without] = models["tiny"]["rows"], models["offsets"]["rows"]
    assert row["repeated_speedup"] == pytest.approx(row["hr"]["ms"] / row["repeated"]["ms"])
    assert 0 < row["repeated_gmac"] < models["tiny"]["gmac"]["hr"]
    assert without["refined"]["ms"] > 0 and not {"repeated", "repeated_gmac", "repeated_speedup"} & set(without)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1 and rows[-1].endswith("| – | – | – |")


def test_each_way_runs_as_often_as_said_and_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for way in pipeline.WAYS:
        original = getattr(Pipeline, way)

        def counted(self: Pipeline, *args: object, way: str = way, original: object = original) -> Tensor:
            calls.append(way)
            return original(self, *args)  # type: ignore[operator]

        monkeypatch.setattr(Pipeline, way, counted)
    measure(["tiny"], SETTING, ["fp32"], [1])
    assert calls == [*pipeline.WAYS * 5, "refined"]  # one warms up, four are timed; stages by themselves


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA"),
        RuntimeError("not enough memory: you tried ..."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError("Unable to allocate 3.00 GiB"),
    ],
)
@pytest.mark.parametrize("torch_2_4", [False, True])
def test_memory_that_runs_out_is_a_result(error: Exception, torch_2_4: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch_2_4:
        monkeypatch.delattr(torch, "OutOfMemoryError")

    def fail(self: Pipeline) -> Tensor:
        raise error

    monkeypatch.setattr(Pipeline, "hr", fail)
    result = measure(["tiny"], SETTING, ["fp32"], [1])
    [row] = result["models"]["tiny"]["rows"]
    assert row["hr"] == OUT_OF_MEMORY and row["speedup"] is None and row["refined"]["ms"] > 0
    assert "| out of memory |" in markdown(result)


def test_other_errors_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Pipeline) -> Tensor:
        raise RuntimeError("sizes do not match")

    monkeypatch.setattr(Pipeline, "lr", fail)
    with pytest.raises(RuntimeError, match="sizes do not match"):
        measure(["tiny"], SETTING, ["fp32"], [1])


def test_a_missing_package_leaves_its_models_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "odd", PaperModel("segnext", {"size": "?"}, 0.1))
    result = measure(["odd", "tiny"], SETTING, ["fp32"], [1])
    assert set(result["models"]) == {"tiny"} and "unknown SegNeXt size" in result["missing"]["odd"]
    assert "Not measured: odd (" in markdown(result)


def test_parameters_are_counted_where_a_package_is_missing_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    file = tmp_path / "p.json"
    assert main(["bench", "pipeline", "--params-only", "--json", str(file)]) == 0
    saved = json.loads(file.read_text())
    assert {"hrnet-w48", "segnext-l"} <= set(saved["params_m"]) and saved["params_m"]["hrnet-w48"] == 65.858659
    assert set(saved["params_m"]) | set(saved["missing"]) == set(MODELS)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(MODELS)
    [line] = [line for line in lines if line.startswith("mask2former-l ")]
    assert "not counted: " in line and "needs the package transformers" in line
    for words in (["--params-only"], ["--device", "cpu"]):
        assert main(["bench", "pipeline", "--models", "mask2former-t", *words]) == 2
        assert "needs the package transformers" in capsys.readouterr().err


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "p.json"
    assert main(["bench", "pipeline", "--models", "hrnet-w48", "segnext-l", "--params-only", "--json", str(file)]) == 0
    assert json.loads(file.read_text()) == {"params_m": {"hrnet-w48": 65.858659, "segnext-l": 48.792275}}
    assert "hrnet-w48 65.86 M" in capsys.readouterr().out
    words = ["bench", "pipeline", "--models", "tiny", "--device", "cpu", "--size", "64x96", "--repeats", "2"]
    assert main([*words, "--json", str(file)]) == 0
    saved = json.loads(file.read_text())
    assert saved["setting"]["weights"] == "random" and saved["setting"]["repeats"] == 2
    assert "| tiny |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models", "unet"], "'unet'; choose from hrnet-w48"),
        (["--size", "65x96"], "--size 65x96: give even numbers"),
        (["--repeats", "0"], "--repeats is 0; give 1 or more"),
        (["--warmup", "-1"], "give 0, 1 and 1 or more"),
        (["--sparse-backend", "x"], "'x' is unknown"),
        (["--models", "tiny", "--precisions", "fp32", "bf16", "--sparse-backend", "cpu"], "cannot run on cpu"),
    ],
)
def test_command_refuses_before_it_measures(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "measure", lambda *_: pytest.fail("measured"))
    assert main(["bench", "pipeline", "--device", "cpu", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_size_is_height_by_width(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_size("64x96") == (64, 96)
    with pytest.raises(SystemExit) as ended:
        main(["bench", "pipeline", "--size", "64"])
    assert ended.value.code == 2 and "--size: '64' is no size; give HEIGHTxWIDTH" in capsys.readouterr().err
