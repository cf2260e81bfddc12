"""The trial that decides which sparse engine "auto" is: real processes, on the CPU's engines in place of a GPU's."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparserefine_ros.errors import ParameterError
from sparserefine_ros.segmenter import engine_trial
from sparserefine_ros.segmenter.bundle import Bundle
from sparserefine_ros.segmenter.engine_trial import CHILD, Case, fastest, measure
from sparserefine_ros.segmenter.segmenter import Segmenter
from sparserefine_ros.sparse import KernelMap, Pyramid
from sparserefine_ros.sparse import backends as engines
from sparserefine_ros.sparse.backends import Backend, Output

CASE = Case(5, {"channels": [8, 16], "stride": "dilate"}, (64, 96), "cpu", "fp32")


@pytest.fixture(autouse=True)
def _tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The engine `cpu` is tried, without a trial it is torch; verdicts lie in a folder of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(engine_trial, "TRIED", {"cpu": {"cpu": "torch"}})
    monkeypatch.setattr(engines, "PREFERRED", {})
    monkeypatch.setattr(logging.getLogger("sparserefine_ros"), "propagate", True)


def verdicts(folder: Path) -> list[Any]:
    return [json.loads(file.read_text()) for file in (folder / "sparserefine_ros").glob("engines-*.json")]


def answer(monkeypatch: pytest.MonkeyPatch, **trials: dict[str, Any]) -> list[str]:
    """Trials end so; returns which engines were tried."""
    tried: list[str] = []

    def given(engine: str, case: Case) -> dict[str, Any]:
        tried.append(engine)
        return trials[engine]

    monkeypatch.setattr(engine_trial, "_try", given)
    return tried


def test_an_engine_is_tried_in_its_own_process_and_the_verdict_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    backend = fastest(CASE)
    [verdict] = verdicts(tmp_path)
    ms, torch_ms = verdict["cpu"]["ms"], verdict["cpu"]["torch_ms"]
    assert ms > 0 and torch_ms > 0
    assert backend.name == ("cpu" if ms < torch_ms else "torch")
    assert "trying sparse engines cpu on cpu" in caplog.text and f"{ms:.2f} ms a frame" in caplog.text
    tried = answer(monkeypatch)
    assert fastest(CASE).name == backend.name and not tried


@pytest.mark.parametrize(("ms", "torch_ms", "winner"), [(1.0, 2.0, "cpu"), (2.0, 1.0, "torch"), (1.0, 1.0, "torch")])
def test_the_faster_one_runs(monkeypatch: pytest.MonkeyPatch, ms: float, torch_ms: float, winner: str) -> None:
    answer(monkeypatch, cpu={"ms": ms, "torch_ms": torch_ms})
    assert fastest(CASE).name == winner


def test_of_several_the_one_that_gains_most_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its ratio to torch beside it: a slow minute of the machine says nothing about an engine."""
    monkeypatch.setattr(engine_trial, "TRIED", {"cpu": {"triton": "torch", "spconv": "torch", "cpu": "torch"}})
    trials = {"triton": {"error": "no"}, "spconv": {"ms": 2.0, "torch_ms": 3.0}, "cpu": {"ms": 4.0, "torch_ms": 9.0}}
    tried = answer(monkeypatch, **trials)
    assert fastest(CASE).name == "cpu"
    assert tried == ["triton", "spconv", "cpu"]


def test_what_is_not_installed_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_trial, "TRIED", {"cpu": {"cpu": "no_such_package"}})
    tried = answer(monkeypatch)
    assert fastest(CASE).name == "torch" and not tried


def test_another_network_size_or_precision_is_another_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = answer(monkeypatch, cpu={"ms": 1.0, "torch_ms": 2.0})
    cases = [CASE, replace(CASE, args={"channels": [8]}), replace(CASE, size=(96, 64)), replace(CASE, classes=6)]
    for case in (*cases, *cases):
        fastest(case)
    assert len(tried) == len(cases)


@pytest.mark.parametrize("broken", [b"", b"[]", b"{}", b'{"cpu": {"ms": "x"}}', b'{"cpu": {"ms": 1, "torch_ms": 0}}'])
def test_a_broken_verdict_is_made_anew(monkeypatch: pytest.MonkeyPatch, broken: bytes, tmp_path: Path) -> None:
    tried = answer(monkeypatch, cpu={"ms": 1.0, "torch_ms": 2.0})
    fastest(CASE)
    [file] = (tmp_path / "sparserefine_ros").glob("engines-*.json")
    file.write_bytes(broken)
    assert fastest(CASE).name == "cpu" and len(tried) == 2
    assert verdicts(tmp_path) == [{"cpu": {"ms": 1.0, "torch_ms": 2.0}}]


def test_an_engine_that_the_system_kills_is_tried_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engine_trial, "CHILD", (sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"))
    assert fastest(CASE).name == "torch" and not verdicts(tmp_path)


def test_an_engine_without_memory_is_tried_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tried = answer(monkeypatch, cpu={"error": "CUDA out of memory", "passing": True})
    assert fastest(CASE).name == fastest(CASE).name == "torch"
    assert len(tried) == 2 and not verdicts(tmp_path)


def test_an_engine_that_has_gone_leaves_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answer(monkeypatch, cpu={"ms": 1.0, "torch_ms": 2.0})

    def missing(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
        if name == "cpu":
            raise ParameterError("sparse backend 'cpu' cannot run on cpu: no C compiler")
        return Backend()

    monkeypatch.setattr(engine_trial, "pick_backend", missing)
    assert fastest(CASE).name == "torch"
    assert "no C compiler" in caplog.text and "torch runs instead" in caplog.text


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import os; os.abort()", "ended with status -6"),
        ("print('CUDA error: an illegal address'); raise SystemExit(3)", "status 3: CUDA error: an illegal address"),
        ("import time; time.sleep(60)", "longer than"),
        ("pass", "it said nothing"),
    ],
)
def test_an_engine_that_kills_or_hangs_its_process_is_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str, said: str
) -> None:
    monkeypatch.setattr(engine_trial, "CHILD", (sys.executable, "-c", program))
    monkeypatch.setattr(engine_trial, "LIMIT_S", 2.0)
    assert fastest(CASE).name == "torch"
    [verdict] = verdicts(tmp_path)
    assert said in verdict["cpu"]["error"]


def test_what_libraries_print_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    program = """print("Warning"); print('{"ms": 1.5, "torch_ms": 3.0}')"""
    monkeypatch.setattr(engine_trial, "CHILD", (sys.executable, "-c", program))
    assert engine_trial._try("cpu", CASE) == {"ms": 1.5, "torch_ms": 3.0}


def test_a_trial_ends_with_who_asked() -> None:
    child = subprocess.Popen(CHILD, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None
    slow = replace(CASE, size=(2048, 2048), args={"channels": [64] * 4})
    child.stdin.write(json.dumps({"engine": "torch", **asdict(slow)}).encode() + b"\n")
    child.stdin.flush()
    time.sleep(1)
    assert child.poll() is None
    child.stdin.close()
    assert child.wait(30) == 1


class OnePixelOff(Backend):
    def conv(self, x: Tensor, packed: Any, kernel_map: KernelMap, outputs: Sequence[Output], **sums: Any) -> None:
        super().conv(x, packed, kernel_map, outputs, **sums)
        for out in outputs:
            out.tensor[len(out.tensor) // 2] += 0.5


class NotANumber(Backend):
    def conv(self, x: Tensor, packed: Any, kernel_map: KernelMap, outputs: Sequence[Output], **sums: Any) -> None:
        super().conv(x, packed, kernel_map, outputs, **sums)
        outputs[0].tensor[0] = float("nan")


class OtherPixels(Backend):
    def pyramid(self, mask: Tensor, levels: int, stride: str) -> Pyramid:
        return super().pyramid(mask.flip(2), levels, stride)


class Fails(Backend):
    def pack(self, weight: Tensor, shortcut: Tensor | None = None) -> Any:
        raise RuntimeError("PTXAS failed\nwith a long story")


@pytest.mark.parametrize(
    ("message", "passing"),
    [("CUDA out of memory", True), ("CUDA error: an illegal memory access was encountered", False)],
)
def test_memory_that_ends_is_told_from_memory_that_is_misused(
    monkeypatch: pytest.MonkeyPatch, message: str, passing: bool
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(engine_trial, "_frame", fail)
    assert measure("torch", CASE) == {"error": message, "passing": passing}


@pytest.mark.parametrize(
    ("engine", "said"),
    [(OnePixelOff, "a pixel differs"), (NotANumber, "nan"), (OtherPixels, "nan"), (Fails, "PTXAS failed")],
)
def test_an_engine_that_is_wrong_is_out(monkeypatch: pytest.MonkeyPatch, engine: type[Backend], said: str) -> None:
    monkeypatch.setitem(engines.BACKENDS, "new", f"{__name__}:{engine.__name__}")
    result = measure("new", CASE)
    assert said in result["error"] and not result.get("passing") and "ms" not in result
    assert "story" not in result["error"]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("context", [False, True])
def test_rounding_alone_rules_no_engine_out(precision: str, context: bool) -> None:
    """What torch in that number format gives, beside what it gives in float32 of the same weights."""
    case = replace(CASE, precision=precision, args={"channels": [16, 32, 64], "context": context}, size=(96, 128))
    seen = engine_trial._frame(case, 0.25, 0)
    with torch.inference_mode():
        rounded = engine_trial._refiner(case, Backend())(seen)
        assert rounded is not None
        exact = engine_trial._refiner(replace(case, precision="fp32"), Backend())(seen)
        difference = engine_trial._difference(rounded, exact)
    assert difference < engine_trial.TOLERANCES[precision] / 4
    assert precision == "fp32" or difference > 0


@pytest.mark.parametrize("size", [(64, 96), (33, 47), (1, 1), (360, 480)])
@pytest.mark.parametrize("density", engine_trial.DENSITIES)
def test_made_frames_have_the_density_asked_for(size: tuple[int, int], density: float) -> None:
    seen = engine_trial._frame(replace(CASE, size=size), density, 3)
    assert seen.selected.shape == (1, *size) and seen.native.shape == (1, *size, 3)
    assert seen.selected.any()
    if size != (1, 1):
        assert seen.selected.float().mean() == pytest.approx(density, abs=0.04)


@pytest.mark.parametrize(("asked", "runs", "trials"), [("auto", "cpu", 1), ("torch", "torch", 0)])
def test_the_segmenter_asks_where_nobody_chose(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, asked: str, runs: str, trials: int
) -> None:
    tried = answer(monkeypatch, cpu={"ms": 1.0, "torch_ms": 2.0})
    segmenter = Segmenter(Bundle.load(tiny_bundle), "cpu", sparse_backend=asked)
    assert segmenter.sparse_backend == runs and len(tried) == trials
    tried.clear()
    assert Segmenter(Bundle.load(tiny_bundle), "cpu", refine=False).sparse_backend == "torch" and not tried
