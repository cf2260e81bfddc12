"""What makes the pipeline fast changes no value, and nothing waits for the device on the way.

Shape shorthand: B images, K classes, H, W native size, h, w low resolution.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DECODERS
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sparserefine_ros import networks
from sparserefine_ros.cli import main
from sparserefine_ros.errors import ParameterError
from sparserefine_ros.networks.graphed import AGE, FORMS, Graphed, Recent, Replay
from sparserefine_ros.networks.hrnet import HRNet
from sparserefine_ros.networks.registry import DENSE, build
from sparserefine_ros.networks.segnext import SegNeXt
from sparserefine_ros.segmenter.bundle import Bundle
from sparserefine_ros.segmenter.dense import Autocast, Compiled, fold_batch_norm
from sparserefine_ros.segmenter.head import Head
from sparserefine_ros.segmenter.preprocess import resize, shrink
from sparserefine_ros.segmenter.segmenter import Segmenter

CPU = torch.device("cpu")
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    **{name: partial(build, DENSE, of, 11, args) for name, (of, args) in DECODERS.items()},
    "hrnet": lambda: HRNet(11, 18),
    "segnext": lambda: SegNeXt(11, "T"),
}


def network(name: str) -> nn.Module:
    """With statistics and scales that a trained network may have."""
    torch.manual_seed(0)
    module = NETWORKS[name]()
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.running_mean, norm.bias):
                nn.init.normal_(tensor, std=0.2)
            for tensor in (norm.running_var, norm.weight):
                nn.init.uniform_(tensor, 0.5, 1.5)
    return module.eval()


@pytest.mark.parametrize("name", list(NETWORKS))
@torch.inference_mode()
def test_batch_norm_is_folded_wherever_it_follows_a_convolution(name: str) -> None:
    module, images = network(name), torch.randn(2, 3, 64, 96)
    expected = module(images)
    folded = fold_batch_norm(copy.deepcopy(module))
    difference = (folded(images) - expected).abs().max() / expected.abs().max()
    assert difference < 1e-5
    left = [key for key, part in folded.named_modules() if isinstance(part, nn.BatchNorm2d)]
    if name == "segnext":  # norms that stand before their convolution, behind a sum
        assert left and all(key.split(".")[-1] in ("norm1", "norm2") for key in left)
    else:
        assert left == []


class NormAndRelu(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).relu()


class SmallConv(nn.Conv2d):
    """As timm's StdConv2d: what it multiplies by is made of its weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight / self.weight.norm(), self.bias)


@torch.inference_mode()
def test_layers_that_do_more_are_not_folded() -> None:
    images = torch.randn(1, 3, 8, 8)
    for layers in ((nn.Conv2d(3, 4, 3), NormAndRelu(4)), (SmallConv(3, 4, 3), nn.BatchNorm2d(4))):
        module = nn.Sequential(*layers).eval()
        nn.init.uniform_(layers[1].running_var, 0.2, 0.5)
        expected = module(images)
        torch.testing.assert_close(fold_batch_norm(module)(images), expected)


@torch.inference_mode()
def test_batch_norm_of_transformers_is_folded() -> None:
    transformers = pytest.importorskip("transformers", "5.23")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[2, 1])
    module, images = transformers.ResNetModel(config).eval(), torch.randn(1, 3, 32, 48)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean, std=0.2)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    expected = module(images).last_hidden_state
    found = fold_batch_norm(module)(images).last_hidden_state
    assert not any(isinstance(part, nn.BatchNorm2d) for part in module.modules())
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", list(NETWORKS))
@torch.inference_mode()
def test_weights_cast_once_give_what_autocast_gives(name: str) -> None:
    module, images = fold_batch_norm(network(name)), torch.randn(1, 3, 64, 96)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = module(images)
    cast = Autocast(copy.deepcopy(module), torch.bfloat16)
    assert torch.equal(cast(images), expected)
    assert {p.dtype for p in cast.parameters()} >= {torch.bfloat16}


@pytest.mark.parametrize(
    ("size", "low"), [((64, 96), (32, 48)), ((64, 96), (64, 96)), ((65, 97), (32, 48)), ((64, 96), (40, 60)),
                      ((90, 70), (30, 20)), ((64, 96), (13, 31))],
)  # fmt: skip
def test_shrinking_on_the_device_equals_opencvs(size: tuple[int, int], low: tuple[int, int]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    found = shrink(torch.from_numpy(images), low).numpy()
    expected = np.stack([resize(image, low) for image in images])
    assert found.shape == expected.shape and found.flags["C_CONTIGUOUS"]
    difference = np.abs(found.astype(int) - expected)
    if low == size or (low[0] * 2, low[1] * 2) == size:
        assert not difference.any()
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


@pytest.mark.parametrize("low", [(180, 240), (120, 100), (91, 160)])
def test_a_frame_smaller_than_what_a_file_takes_grows_as_opencvs(low: tuple[int, int]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 90, 120, 3), dtype=np.uint8)
    found = shrink(torch.from_numpy(images), low).numpy()
    expected = np.stack([resize(image, low) for image in images])
    assert found.shape == expected.shape and np.abs(found.astype(int) - expected).max() <= 1


class Sent(TorchDispatchMode):
    """What crosses from one device to another."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            devices = {tensor.device.type for tensor in (*args, result) if isinstance(tensor, torch.Tensor)}
            self.copies += [str(func)] * (len(devices) > 1)
        return result


@pytest.mark.parametrize("name", list(NETWORKS))
@torch.inference_mode()
def test_networks_send_nothing_to_their_device_once_they_are_warm(name: str) -> None:
    """A host waits for what it sends, and a CUDA graph cannot contain it. Device "meta" computes nothing."""
    module, images = network(name).to("meta"), torch.zeros(1, 3, 64, 96, device="meta")
    module(images)
    with Sent() as sent:
        module(images)
    assert sent.copies == []


def test_networks_make_no_tensors_of_numbers() -> None:
    """The same for what device "meta" cannot show: on a GPU `new_tensor` and `torch.tensor` send what they get."""
    for name in ("freqfusion", "offseg", "segnext", "hrnet", "compact", "pyramid", "superpixel"):
        text = (Path(networks.__file__).parent / f"{name}.py").read_text()
        assert "new_tensor(" not in text and "torch.tensor(" not in text, name


@pytest.mark.parametrize("batch", [1, 2, 4, 8])
def test_batches_give_what_single_frames_give(batch: int, tiny_bundle: Path) -> None:
    segmenter = Segmenter(Bundle.load(tiny_bundle), "cpu")
    rng = np.random.default_rng(batch)
    coarse = rng.integers(0, 256, (batch, 8, 12, 3)).repeat(8, 1).repeat(8, 2)
    images = list((0.8 * coarse + rng.uniform(0, 50, coarse.shape)).astype(np.uint8))
    for image, together in zip(images, segmenter.segment(images), strict=True):
        alone = segmenter.segment([image])[0]
        np.testing.assert_allclose(together.low_entropy, alone.low_entropy, atol=1e-5)
        assert together.density == pytest.approx(alone.density, abs=1e-3) and 0.02 < alone.density < 0.98
        assert (together.mask != alone.mask).mean() <= 1e-3  # ties
        assert (np.abs(together.confidence.astype(int) - alone.confidence) > 1).mean() <= 1e-3


class Waits(TorchFunctionMode):
    """Notes whatever would make the host wait for a GPU."""

    NAMES = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
    READS = ("nonzero", "unique", "masked_select", "bincount", "equal", "allclose")

    def __init__(self) -> None:
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        sends = func is torch.tensor and (kwargs or {}).get("device") is not None  # from memory that is not pinned
        if name in self.NAMES + self.READS or sends:
            self.found.append(name)
        if name == "__getitem__" or name == "__setitem__":
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(part, Tensor) and part.dtype == torch.bool for part in index):
                self.found.append("mask as index")
            if any(isinstance(part, list) for part in index):
                self.found.append("list as index")
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device_but_for_the_number_of_pixels(tiny_bundle: Path, frame: np.ndarray) -> None:
    segmenter = Segmenter(Bundle.load(tiny_bundle), "cpu", sparse_backend="torch")
    assert segmenter.refiner is not None
    segmenter.head = Head(segmenter.refiner)  # as on a GPU
    native = torch.from_numpy(np.stack([frame, frame[::-1]]))
    with torch.inference_mode():
        segmenter.shrunk_and_seen(native)  # constants are sent once
    with Waits() as waits, torch.inference_mode():
        low, logits = segmenter.shrunk_and_seen(native)
        segmenter.head.initial(logits)
    assert waits.found == []  # a GPU is given shrinking, network and selection without a pause
    with Waits() as waits:
        results = segmenter.segment([frame, np.ascontiguousarray(frame[::-1])])
    levels = segmenter.refiner.levels
    buffers = ["numpy"] * 2  # on the host, filled with native and low-resolution frames
    # How many sites each level has is asked, on this backend also how many have each parity; then nothing, until the
    # six results are read, all at the end.
    assert waits.found == buffers + ["nonzero"] * (levels + 4 * (levels - 1)) + ["numpy"] * 6
    assert 0.02 < results[0].density < 0.98


def test_a_graph_replays_forms_that_come_again() -> None:
    calls: list[Tensor] = []

    def double(x: Tensor) -> tuple[Tensor, ...]:
        calls.append(x)
        return x, x * 2

    graphed = Graphed(double)
    for turn in range(4):
        x = torch.full((2, 3), float(turn))
        same, twice = graphed(x)
        assert torch.equal(same, x) and torch.equal(twice, 2 * x)
    [(form, _)] = graphed.forms.kept.values()
    replay = form.replay
    assert isinstance(replay, Replay)
    assert calls[0] is not replay.x and all(x is replay.x for x in calls[1:])  # its own memory, from the second on
    for width in range(1, 2 * FORMS):
        for _ in range(3):
            assert torch.equal(graphed(torch.ones(width))[1], torch.full((width,), 2.0))
    assert len(graphed.forms.kept) == FORMS
    assert torch.equal(graphed(torch.ones(2, 3, dtype=torch.float64))[1], torch.full((2, 3), 2.0, dtype=torch.float64))


def test_forms_that_come_are_kept_and_those_that_do_not_give_way() -> None:
    recent: Recent[list[int]] = Recent(list)
    for width in range(FORMS):
        recent.of(width).append(width)
    for _ in range(AGE // 2 - 1):
        recent.of("more").append(0)  # no room: nobody keeps it
        assert recent.of(1) == [1]
    assert list(recent.kept) == [0, 2, 3, 1]
    recent.of("late").append(9)  # 0 has not come for longer than AGE calls
    assert recent.of("late") == [9] and list(recent.kept) == [2, 3, 1, "late"]


def test_where_capture_fails_calls_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Replay, function: Any, x: Tensor) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Replay, "__init__", fail)
    graphed = Graphed(lambda x: (x + 1,))
    graphed(torch.zeros(2))
    with pytest.warns(UserWarning, match="without a CUDA graph, its capture failed: operation not permitted"):
        assert torch.equal(graphed(torch.zeros(2))[0], torch.ones(2))
    assert torch.equal(graphed(torch.ones(2))[0], torch.full((2,), 2.0))  # and is not tried again


def test_the_segmenter_through_a_graph_gives_the_same(tiny_bundle: Path, frame: np.ndarray) -> None:
    segmenter = Segmenter(Bundle.load(tiny_bundle), "cpu")
    native = torch.from_numpy(frame)[None]
    expected = segmenter.shrunk_and_seen(native)
    graphed = Graphed(segmenter._shrink_and_see)
    for _ in range(3):
        for found, wanted in zip(graphed(native), expected, strict=True):
            assert torch.equal(found, wanted)
    with pytest.raises(ParameterError, match="torch_graph is for CUDA, but device is 'cpu'; set runtime to torch"):
        Segmenter(Bundle.load(tiny_bundle), "cpu", runtime="torch_graph")


def test_compiling_is_told_of_and_fails_with_a_remedy(
    tiny_bundle: Path, frame: np.ndarray, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "sparserefine_ros")
    monkeypatch.setattr(torch, "compile", lambda module, dynamic: module)  # the real one takes half a minute
    bundle = Bundle.load(tiny_bundle)
    plain, compiled = Segmenter(bundle, "cpu"), Segmenter(bundle, "cpu", runtime="torch_compile")
    assert isinstance(compiled.dense, Compiled) and compiled.runtime == "torch_compile" and compiled.under_way == ""
    told = [record.getMessage() for record in caplog.records if "compiles" in record.getMessage()]
    assert told[0] == "torch compiles the dense segmenter for 32x48; this can take minutes" and len(told) == 2
    np.testing.assert_array_equal(plain.segment([frame])[0].mask, compiled.segment([frame])[0].mask)
    assert len([r for r in caplog.records if "compiles" in r.getMessage()]) == 2  # not again for the same form

    def broken(module: nn.Module, dynamic: bool) -> Any:
        def call(images: Tensor) -> Tensor:
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nlong story")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ParameterError, match=r"torch_compile does not work here: .*compiler found; set runtime to"):
        Segmenter(bundle, "cpu", runtime="torch_compile")


def test_runtimes_side_by_side(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "runtimes", str(tiny_bundle), "--device", "cpu", "--repeats", "3", "--json"]
    assert main([*command, str(tmp_path / "a.json"), "--runtimes", "torch", "auto", "torch_graph"]) == 0
    table = json.loads((tmp_path / "a.json").read_text())
    assert table["rows"]["torch"]["ratio"] == 1 and table["rows"]["auto"]["difference"] == 0
    assert table["size"] == [32, 48] and table["rows"]["auto"]["p10"] <= table["rows"]["auto"]["ms"]
    assert "Not measured: torch_graph (runtime torch_graph is for CUDA" in capsys.readouterr().out
    assert main([*command, str(tmp_path / "b.json"), "--runtimes", "tvm"]) == 2
    assert "--runtimes has 'tvm'; choose from auto, torch" in capsys.readouterr().err
