"""The dense segmenter in ONNX Runtime against torch's. CUDA and TensorRT are stood in for: what they are asked for."""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from conftest import write_decoder_bundle
from torch import Tensor

from sparserefine_ros import native
from sparserefine_ros.errors import ParameterError
from sparserefine_ros.networks.compact import CompactSegmenter
from sparserefine_ros.node.logs import RosHandler
from sparserefine_ros.node.model import load_segmenter
from sparserefine_ros.node.parameters import BY_NAME, PARAMETERS
from sparserefine_ros.segmenter import dense as dense_module
from sparserefine_ros.segmenter import export, onnx_dense
from sparserefine_ros.segmenter.bundle import Bundle
from sparserefine_ros.segmenter.dense import RUNTIMES
from sparserefine_ros.segmenter.onnx_dense import ExportedNetwork, OnnxDense, drop_unused, onnx_folder
from sparserefine_ros.segmenter.onnx_session import PROVIDERS, Progress, pick_providers
from sparserefine_ros.segmenter.preprocess import resize
from sparserefine_ros.segmenter.segmenter import Segmenter

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "sparserefine_ros" / "onnx"


def needs_onnx() -> None:
    """Skips the test that calls it."""
    for name in ("onnx", "onnxruntime"):
        pytest.importorskip(name)


def tiny_network() -> CompactSegmenter:
    torch.manual_seed(0)
    return CompactSegmenter(5, widths=[8, 8, 8, 8], depths=[1, 1, 1]).eval()


def exported(identity: list[str], folder: Path, half: bool = False, device: torch.device = CPU) -> OnnxDense:
    return OnnxDense(ExportedNetwork(tiny_network, identity, half, folder), device, half=half, folder=folder)


def test_logits_equal_torchs_and_the_file_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_onnx()
    network, dense = tiny_network(), exported(["a"], tmp_path)
    for shape in [(1, 3, 32, 48), (2, 3, 33, 40), (2, 3, 33, 40)]:
        images = torch.randn(shape).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            torch.testing.assert_close(dense(images), network(images), rtol=1e-4, atol=1e-5)
    assert dense.provider == "cpu" and len(list(tmp_path.iterdir())) == 1
    options = next(iter(dense.sessions.values())).get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0", "the refiner needs the cores"

    def refuse(*_: Any) -> None:
        raise AssertionError("exported again")

    monkeypatch.setattr(export, "export_dense", refuse)
    again = exported(["a"], tmp_path)
    assert torch.equal(again(images), dense(images))
    for identity, half in ((["b"], False), (["a"], True)):  # other weights, another format: another file
        with pytest.raises(AssertionError, match="exported again"):
            exported(identity, tmp_path, half).prepare((32, 48))


def test_sessions_of_one_size_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that has not been used for longest goes; its size is served again when it comes again."""
    needs_onnx()
    monkeypatch.setattr(onnx_dense, "MAX_SESSIONS", 2)
    network, dense = tiny_network(), exported(["a"], tmp_path)
    dense.fixed = True
    for width, kept in ((32, [32]), (48, [32, 48]), (32, [48, 32]), (64, [32, 64]), (48, [64, 48])):
        images = torch.randn(1, 3, 32, width)
        with torch.no_grad():
            torch.testing.assert_close(dense(images), network(images), rtol=1e-4, atol=1e-5)
        assert list(dense.sessions) == [(32, each) for each in kept]


def test_files_of_one_size_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above; and a file that another process drops while it is about to be read is made anew."""
    needs_onnx()
    monkeypatch.setattr(onnx_dense, "MAX_FILES", 2)
    dense = exported(["a"], tmp_path)
    dense.fixed = True
    files = {}
    for age, width in enumerate((32, 48, 32, 64)):
        files[width] = dense.source.file((32, width), True)
        os.utime(files[width], (1000 + age, 1000 + age))  # as if a second lay between
    assert set(tmp_path.iterdir()) == {files[32], files[64]}
    os.utime(files[64], (2**31, 2**31))
    os.utime(files[32], (2**31, 2**31))  # by a clock that has been set back since
    assert dense.source.file((32, 48), True).exists()
    assert len(list(tmp_path.iterdir())) == 2 and files[48].exists()
    there = dense.source.file

    def dropped(size: tuple[int, int], fixed: bool) -> Path:
        monkeypatch.setattr(dense.source, "file", there)
        file = there(size, fixed)
        file.unlink()
        return file

    monkeypatch.setattr(dense.source, "file", dropped)
    with torch.no_grad():
        images = torch.randn(1, 3, 32, 48)
        torch.testing.assert_close(dense(images), tiny_network()(images), rtol=1e-4, atol=1e-5)
    assert files[48].exists() and not dense.degraded


def test_folders_of_engines_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_dense, "MAX_FILES", 2)
    for age, name in enumerate("abcd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "engine").write_bytes(b"x")
        os.utime(tmp_path / name, (1000 + age, 1000 + age))
    drop_unused(tmp_path, "*", tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "d"]


def test_results_are_not_overwritten_by_the_next_call(tmp_path: Path) -> None:
    needs_onnx()
    dense = exported(["a"], tmp_path)
    first = dense(torch.ones(1, 3, 32, 48))
    copy = first.clone()
    dense(torch.zeros(1, 3, 32, 48))
    assert torch.equal(first, copy)


def test_a_network_of_one_size_runs_image_by_image(tmp_path: Path, frame: np.ndarray, cache: Path) -> None:
    needs_onnx()
    bundle = Bundle.load(write_decoder_bundle(tmp_path / "bundle", "superpixel"))
    torchs, ours = Segmenter(bundle, "cpu"), Segmenter(bundle, "cpu", runtime="onnxruntime")
    frames = [frame, frame[::-1]]
    for a, b in zip(torchs.segment(frames), ours.segment(frames), strict=True):  # one at a time, joined
        assert (a.mask != b.mask).mean() < 1e-3
        np.testing.assert_allclose(a.low_entropy, b.low_entropy, atol=1e-4)
    assert len(list(cache.iterdir())) == 1 and isinstance(ours.dense, OnnxDense)
    assert list(ours.dense.sessions) == [(32, 48)]
    assert ours.has_superpixels and ours.superpixels(frame).shape == (64, 96)


def test_segmenter_gives_the_same_masks(tiny_bundle: Path, frame: np.ndarray, cache: Path) -> None:
    needs_onnx()
    bundle = replace(Bundle.load(tiny_bundle), temperature=1.5)
    torchs = Segmenter(bundle, "cpu")
    values: dict[str, Any] = {p.name: p.default for p in PARAMETERS}
    values |= {"model": str(tiny_bundle), "device": "cpu", "runtime": "onnxruntime", "provider": "cpu"}
    plain = load_segmenter(values)
    assert plain.runtime == "onnxruntime (cpu)" and torchs.runtime == "torch"
    ours = Segmenter(bundle, "cpu", runtime="onnxruntime")
    assert len(list(cache.iterdir())) == 2  # temperatures 1 and 1.5
    for image in (frame, resize(frame, (51, 77))):
        [a], [b] = torchs.segment([image]), ours.segment([image])
        assert (a.mask != b.mask).mean() < 1e-3 and a.density == pytest.approx(b.density, abs=1e-3)
        np.testing.assert_allclose(a.low_entropy, b.low_entropy, atol=1e-5)
        assert not np.allclose(plain.segment([image])[0].low_entropy, b.low_entropy, atol=1e-2)


def test_torchs_network_is_gone_once_it_is_exported(tiny_bundle: Path, cache: Path, monkeypatch: Any) -> None:
    needs_onnx()
    loaded: list[weakref.ref[torch.nn.Module]] = []
    load = dense_module.load_registered

    def remembered(*arguments: Any) -> torch.nn.Module:
        network = load(*arguments)
        loaded.append(weakref.ref(network))
        return network

    monkeypatch.setattr(dense_module, "load_registered", remembered)
    segmenter = Segmenter(Bundle.load(tiny_bundle), "cpu", runtime="onnxruntime")
    gc.collect()
    assert len(loaded) == 2 and all(ref() is None for ref in loaded)  # to look at, and to export
    assert list(segmenter.dense.parameters()) == []


def test_half_precision_through_the_segmenter(tiny_bundle: Path, frame: np.ndarray, cache: Path) -> None:
    needs_onnx()
    exact = Segmenter(Bundle.load(tiny_bundle), "cpu").segment([frame], refine=False)[0]
    half = Segmenter(Bundle.load(tiny_bundle), "cpu", "fp16", runtime="onnxruntime").segment([frame], refine=False)[0]
    difference = np.abs(exact.low_entropy - half.low_entropy)
    assert difference.max() > 1e-5 and difference.mean() < 2e-2
    assert (exact.mask == half.mask).mean() > 0.98


def test_a_cache_that_cannot_be_written_is_read(
    tiny_bundle: Path, frame: np.ndarray, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the image of a container brings it; what is damaged or missing there is made in a temporary folder."""
    needs_onnx()
    bundle, made, export_dense = Bundle.load(tiny_bundle), [], export.export_dense

    def count(network: Any, file: Path, *rest: Any) -> Any:
        made.append(file)
        return export_dense(network, file, *rest)

    def mask() -> np.ndarray:
        return Segmenter(bundle, "cpu", runtime="onnxruntime").segment([frame])[0].mask

    expected = mask()
    (kept,) = cache.iterdir()
    (cache / "tensorrt" / "0").mkdir(parents=True)
    (cache / "tensorrt" / "0" / "of.engine").write_bytes(b"built")
    access = os.access
    monkeypatch.setattr(native.os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    monkeypatch.setattr(export, "export_dense", count)
    folder = onnx_folder()
    assert folder != cache and (folder / "tensorrt" / "0" / "of.engine").read_bytes() == b"built"
    assert np.array_equal(mask(), expected) and not made
    kept.write_bytes(damaged := b"no model")
    assert np.array_equal(mask(), expected) and made == [folder / kept.name]
    assert kept.read_bytes() == damaged and not made[0].is_symlink()
    assert np.array_equal(mask(), expected) and len(made) == 1


def test_errors_name_the_remedy(tiny_bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.load(tiny_bundle)
    with pytest.raises(
        ParameterError, match="runtime 'tvm' is unknown; choose one of auto, torch, torch_compile, torch_graph, onnxr"
    ):
        Segmenter(bundle, "cpu", runtime="tvm")
    with pytest.raises(ParameterError, match="bf16 is for runtime torch"):
        Segmenter(bundle, "cpu", "bf16", runtime="onnxruntime")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ParameterError, match="pip install onnxruntime onnx .*onnxruntime-gpu"):
        Segmenter(bundle, "cpu", runtime="onnxruntime")


def test_providers_are_chosen_by_availability_and_by_name() -> None:
    everything = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    plain = ["AzureExecutionProvider", "CPUExecutionProvider"]
    assert pick_providers("auto", CUDA, everything) == (["tensorrt", "cuda", "cpu"], False)
    assert pick_providers("auto", CUDA, everything[1:]) == (["cuda", "cpu"], False)
    assert pick_providers("auto", CPU, everything) == pick_providers("auto", CUDA, plain) == (["cpu"], False)
    assert pick_providers("cuda", CUDA, everything) == (["cuda", "cpu"], True)
    assert pick_providers("cpu", CUDA, everything) == (["cpu"], True)
    with pytest.raises(ParameterError, match="'tensorrt' is not there; .*has: cpu; .*pip install onnxruntime-gpu"):
        pick_providers("tensorrt", CUDA, plain)
    with pytest.raises(ParameterError, match="'cuda' runs on CUDA, but device is 'cpu'"):
        pick_providers("cuda", CPU, everything)
    assert BY_NAME["runtime"].choices == RUNTIMES
    assert sorted(BY_NAME["provider"].choices) == sorted(["auto", *PROVIDERS])


class StandIn:
    """ONNX Runtime on a machine with a GPU, where ``starts`` is what starts."""

    __version__ = "0"
    SessionOptions = MagicMock

    def __init__(self, starts: str) -> None:
        self.starts, self.asked, self.runs = starts, [], 0

    def get_available_providers(self) -> list[str]:
        return list(PROVIDERS.values())

    def InferenceSession(self, file: str, options: Any, providers: list[Any]) -> StandIn:  # noqa: N802
        self.asked = providers
        return self

    def get_providers(self) -> list[str]:
        return [PROVIDERS[self.starts], "CPUExecutionProvider"]

    def run(self, names: Any, feeds: dict[str, np.ndarray]) -> None:
        assert feeds["images"].shape == (1, 3, 90, 120)
        self.runs += 1


def test_tensorrt_keeps_its_engines_and_says_what_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = StandIn("tensorrt")
    monkeypatch.setattr(onnx_dense, "onnxruntime", lambda: stand_in)
    monkeypatch.setattr(ExportedNetwork, "file", lambda self, size, fixed: tmp_path / "dense.onnx")
    (tmp_path / "dense.onnx").write_bytes(b"weights")
    source = ExportedNetwork(tiny_network, ["a"], True, tmp_path)
    dense = OnnxDense(source, CUDA, "tensorrt", half=True, folder=tmp_path)
    lines: list[str] = []
    handler = RosHandler(SimpleNamespace(info=lines.append, warning=lines.append))
    try:
        dense.prepare((90, 120))
        dense.prepare((90, 120))
    finally:
        handler.close()
    assert [name for name, _ in stand_in.asked] == list(PROVIDERS.values())[::2]
    settings = stand_in.asked[0][1]
    assert settings["trt_engine_cache_enable"] == settings["trt_fp16_enable"] == "1"
    engines = tmp_path / "tensorrt" / hashlib.sha256(b"weights").hexdigest()[:24]
    assert settings["trt_engine_cache_path"] == settings["trt_timing_cache_path"] == str(engines) and engines.is_dir()
    assert dense.fixed and stand_in.runs == 1 and dense.provider == "tensorrt"
    assert "TensorRT builds an engine of dense.onnx for 90x120" in lines[0]
    (tmp_path / "dense.onnx").write_bytes(b"other weights")  # another bundle's file of that name
    OnnxDense(source, CUDA, "tensorrt", half=True, folder=tmp_path).prepare((90, 120))
    assert stand_in.asked[0][1]["trt_engine_cache_path"] != str(engines)


def test_a_provider_that_does_not_start_is_refused_only_where_it_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(onnx_dense, "onnxruntime", lambda: StandIn("cpu"))
    monkeypatch.setattr(ExportedNetwork, "file", lambda self, size, fixed: tmp_path / "dense.onnx")
    (tmp_path / "dense.onnx").touch()
    source = ExportedNetwork(tiny_network, ["a"], False, tmp_path)
    with pytest.raises(ParameterError, match="'cuda' does not start here and onnxruntime took 'cpu' instead"):
        OnnxDense(source, CUDA, "cuda", folder=tmp_path).prepare((90, 120))
    auto = OnnxDense(source, CUDA, "auto", folder=tmp_path)
    with caplog.at_level("WARNING", logger="sparserefine_ros"):
        auto.prepare((90, 120))
    assert auto.provider == "cpu" and "the dense segmenter runs on the CPU, with device cuda" in caplog.text


def test_a_session_on_the_cpu_takes_images_from_a_gpu_through_the_host(tmp_path: Path) -> None:
    """It can neither read nor write a GPU's memory: without CUDA's provider, or where that does not start."""
    images = torch.rand(2, 3, 32, 48)
    dense = exported(["a"], tmp_path)
    right = dense(images)

    class OnGpu:
        device, shape, is_cuda = torch.device("meta"), images.shape, True  # the only other device there is here

        def cpu(self) -> Tensor:
            fetched.append(images)
            return images

    fetched: list[Tensor] = []
    session = dense.prepare((32, 48))
    logits = dense._run(session, OnGpu())  # type: ignore[arg-type]
    assert len(fetched) == 1 and logits.device.type == "meta" and logits.shape == right.shape
    assert torch.equal(dense._run(session, images), right)


def test_progress_is_told_again_and_again_and_reaches_the_nodes_log() -> None:
    lines: list[str] = []
    handler = RosHandler(SimpleNamespace(info=lines.append, warning=lines.append))
    try:
        progress = Progress(every_s=0.02)
        assert progress.text == ""
        with progress("building"):
            deadline = time.monotonic() + 5
            while len(lines) < 3 and time.monotonic() < deadline:
                time.sleep(0.005)
            assert progress.text == "building: 0 s so far"  # what diagnostics say
        assert progress.text == ""
    finally:
        handler.close()
    assert lines[0] == "building; this can take minutes" and lines[1] == "building: 0 s so far"
    assert len(lines) >= 4 and lines[-1].startswith("building: done after")
    logging.getLogger("sparserefine_ros").info("unheard")
    assert "unheard" not in lines
