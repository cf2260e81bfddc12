"""Memory that ends, values that are not finite, models replaced while they run, disks that are full. docs/faults.md."""

from __future__ import annotations

import errno
import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import yaml
from conftest import write_tiny_bundle
from safetensors.torch import load_file, save_file

pytest.importorskip("rclpy")

import test_cameras  # noqa: E402
from rclpy.lifecycle import TransitionCallbackReturn  # noqa: E402
from rclpy.parameter import Parameter  # noqa: E402
from rclpy.serialization import serialize_message  # noqa: E402
from ros_client import fill_image  # noqa: E402
from sensor_msgs.msg import Image  # noqa: E402
from std_msgs.msg import Header  # noqa: E402
from test_cameras import Bench, rows  # noqa: E402

from sparserefine_ros import native  # noqa: E402
from sparserefine_ros.errors import BundleError, FrameError, is_out_of_memory  # noqa: E402
from sparserefine_ros.node.segment_node import SegmentNode  # noqa: E402
from sparserefine_ros.segmenter import export, head, onnx_dense  # noqa: E402
from sparserefine_ros.segmenter.bundle import Bundle  # noqa: E402
from sparserefine_ros.segmenter.head import Head, NativeGated  # noqa: E402
from sparserefine_ros.segmenter.segmenter import Segmenter  # noqa: E402

context = test_cameras.context
SIZE = (64, 96)


class Live(Bench):
    """A node with a real model, fed by hand, and the masks it would have published."""

    def __init__(self, context: Any, bundle: Path, **parameters: Any) -> None:
        values = {"model": str(bundle), "device": "cpu", "threads": 1} | parameters
        overrides = [Parameter(name, value=value) for name, value in values.items()]
        self.node = SegmentNode(context=context, parameter_overrides=overrides)
        self.masks: dict[str, Any] = {}

    def watch(self, camera: Any) -> None:
        seen = self.masks.setdefault(camera.name, [])
        camera.outputs.publish = lambda header, image, result, opacity: seen.append(result.mask)

    @property
    def model(self) -> Segmenter:
        assert self.node._segmenter is not None
        return self.node._segmenter

    def see(self, image: np.ndarray) -> None:
        """Feeds the image and waits for what becomes of it."""
        message = fill_image(Image(), Header(), image, "rgb8")
        self.node._receive(self.camera(""), serialize_message(message))
        self.settled()


@pytest.fixture
def live(context: Any) -> Iterator[Callable[..., Live]]:
    made: list[Live] = []

    def one(*arguments: Any, **parameters: Any) -> Live:
        made.append(Live(context, *arguments, **parameters))
        return made[-1]

    yield one
    for bench in made:
        bench.node.destroy_node()


@pytest.fixture(scope="module")
def offline(tiny_bundle: Path) -> Segmenter:
    return Segmenter(Bundle.load(tiny_bundle), device="cpu")


def hungry(*_: Any) -> Any:
    """Asks torch's own allocator for more than a machine has."""
    return torch.empty(2**50)


# Memory


def test_out_of_memory_at_the_allocator(
    live: Callable[..., Live], tiny_bundle: Path, offline: Segmenter, frame: np.ndarray, monkeypatch: Any
) -> None:
    """The refiner: the dense mask, and a degraded mode that is named. The dense stage: the frame. Then all is well."""
    bench = live(tiny_bundle).start()
    refined, dense = (offline.segment([frame], refine)[0].mask for refine in (True, False))
    assert (refined != dense).any()
    with monkeypatch.context() as patch:
        patch.setattr(bench.model.refiner, "features", hungry)
        bench.see(frame)
    assert bench.counts("") == {"received": 1, "processed": 1, "unrefined": 1}
    status = bench.diagnostics()[0]
    assert status.level == b"\1" and rows(status)["degraded"] == "out of memory: 1 frames without refinement"
    with monkeypatch.context() as patch:
        patch.setattr(bench.model.dense, "forward", hungry)
        bench.see(frame)
    assert bench.counts("") == {"received": 2, "processed": 1, "unrefined": 1, "failed": 1}
    assert bench.diagnostics()[0].level == b"\2"
    bench.see(frame)
    assert bench.counts("") == {"received": 3, "processed": 2, "unrefined": 1, "failed": 1}
    for mask, expected in zip(bench.masks[""], (dense, refined), strict=True):
        np.testing.assert_array_equal(mask, expected)


def test_out_of_memory_while_decoding_is_no_fault_of_the_message(
    live: Callable[..., Live], tiny_bundle: Path, frame: np.ndarray, monkeypatch: Any
) -> None:
    bench = live(tiny_bundle).start()

    def full(*_: Any) -> Any:
        return np.empty(2**50, np.uint8)

    with monkeypatch.context() as patch:
        patch.setattr("sparserefine_ros.node.worker.to_rgb", full)
        bench.see(frame)
    bench.see(frame)
    assert bench.counts("") == {"received": 2, "processed": 1, "failed": 1}


def test_the_worker_outlives_an_error_anywhere(
    live: Callable[..., Live], tiny_bundle: Path, frame: np.ndarray, monkeypatch: Any
) -> None:
    bench = live(tiny_bundle).start()

    def full(*_: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(bench.node._worker.scheduler, "measured", full)
        bench.see(frame)
    bench.see(frame)
    assert bench.counts("") == {"received": 2, "processed": 1, "failed": 1}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[ONNXRuntimeError] : Failed to allocate memory for requested buffer of size 8"), True),
        (RuntimeError("OpenCV(4.9) error: (-4:Insufficient memory) Failed to allocate 8 bytes"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (FrameError("logits that are not finite"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


# Values that are not finite


@pytest.mark.parametrize("kind", [Head, NativeGated])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("stage", ["dense", "refiner"])
def test_logits_that_are_not_finite_fail_the_frame(
    live: Callable[..., Live], tiny_bundle: Path, frame: np.ndarray, monkeypatch: Any, caplog: Any,
    kind: type[Head], value: float, stage: str,
) -> None:  # fmt: skip
    """One value of one pixel is enough: no mask, a clear error, and the next frame is fine."""
    bench = live(tiny_bundle).start()
    model, said = bench.model, []
    model.head = kind(model.refiner)
    monkeypatch.setattr(bench.node._worker._logger, "error", lambda text, **_: said.append(text), raising=False)
    target, name = (model.dense, "forward") if stage == "dense" else (model.refiner, "features")
    real = getattr(target, name)

    def broken(*arguments: Any) -> Any:
        result = real(*arguments).clone()
        result[tuple(size // 2 for size in result.shape)] = value
        return result

    with monkeypatch.context() as patch:
        patch.setattr(target, name, broken)
        bench.see(frame)
    assert bench.masks[""] == [] and bench.counts("") == {"received": 1, "failed": 1}
    what = "dense segmenter" if stage == "dense" else "refiner"
    assert f"the {what} of bundle 'tiny' gave logits that are not finite; check its weights" in said[0]
    assert bench.diagnostics()[0].level == b"\2"
    bench.see(frame)
    assert bench.counts("") == {"received": 2, "processed": 1, "failed": 1} and len(bench.masks[""]) == 1


@pytest.mark.parametrize("file", ["dense", "refiner"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, file: str, value: float) -> None:
    bundle = write_tiny_bundle(tmp_path / "tiny")
    weights = bundle / f"{file}.safetensors"
    tensors = load_file(weights)
    name = sorted(name for name, tensor in tensors.items() if tensor.is_floating_point())[-1]
    tensors[name].view(-1)[-1] = value
    save_file(tensors, weights)
    described = yaml.safe_load((bundle / "model.yaml").read_text())
    described[file]["sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    (bundle / "model.yaml").write_text(yaml.safe_dump(described))
    with pytest.raises(BundleError, match=f"weight '{name}' in .*{file}.safetensors has values that are not finite"):
        Segmenter(Bundle.load(bundle), device="cpu")


# Models replaced while they run


def mapped(folder: Path) -> list[str]:
    """Files of the folder that this process has in its address space, removed or not."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]


def test_a_model_replaced_while_it_runs(
    live: Callable[..., Live], offline: Segmenter, frame: np.ndarray, tmp_path: Path
) -> None:
    """The node keeps the weights it has, whatever becomes of the files; configured again, it reads what is there."""
    bundle = write_tiny_bundle(tmp_path / "tiny")
    bench = live(bundle).start()
    old = offline.segment([frame])[0].mask
    bench.see(frame)
    assert not mapped(bundle), "a mapped file that is cut short would end the process with SIGBUS"
    for spoil in (
        lambda: [file.write_bytes(b"") for file in bundle.glob("*.safetensors")],
        lambda: shutil.rmtree(bundle),
        lambda: write_tiny_bundle(bundle, seed=1),
    ):
        spoil()
        bench.see(frame)
    for mask in bench.masks.pop(""):
        np.testing.assert_array_equal(mask, old)
    assert bench.counts("") == {"received": 4, "processed": 4}

    done, failed = TransitionCallbackReturn.SUCCESS, TransitionCallbackReturn.FAILURE
    node, state = bench.node, lambda: bench.node._state_machine.current_state[1]
    assert node.trigger_deactivate() == node.trigger_cleanup() == done
    moved = bundle.rename(tmp_path / "away")
    assert node.trigger_configure() == failed and state() == "unconfigured"
    assert isinstance(node._failure, BundleError) and str(bundle) in str(node._failure)
    moved.rename(bundle)
    bench.start()
    bench.see(frame)
    new = Segmenter(Bundle.load(bundle), device="cpu").segment([frame])[0].mask
    assert (new != old).any()
    np.testing.assert_array_equal(bench.masks[""][0], new)


# Full disks


class FakeSession:
    """As much of an inference session as opening one needs."""

    def __init__(self, file: str, options: Any, providers: Any) -> None:
        self.content = Path(file).read_bytes()
        if self.content != b"whole":
            raise RuntimeError("InvalidProtobuf")  # as onnxruntime's, which is no OSError

    def get_providers(self) -> list[str]:
        return ["CPUExecutionProvider"]


@pytest.fixture
def fake_runtime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Stands in for onnxruntime; the folder of its files."""
    runtime = SimpleNamespace(
        __version__="0", SessionOptions=MagicMock, InferenceSession=FakeSession,
        get_available_providers=lambda: ["CPUExecutionProvider"],
    )  # fmt: skip
    monkeypatch.setattr(onnx_dense, "onnxruntime", lambda: runtime)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "sparserefine_ros" / "onnx"


def write_half(network: Any, inputs: Any, path: Path, *_: Any) -> None:
    path.write_bytes(b"who")
    raise OSError(errno.ENOSPC, "No space left on device")


def write_whole(network: Any, path: Path, *_: Any) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"whole")
    return SimpleNamespace(difference=0.0)


def test_a_full_disk_leaves_the_dense_segmenter_to_torch(
    live: Callable[..., Live], tiny_bundle: Path, offline: Segmenter, frame: np.ndarray, fake_runtime: Path,
    monkeypatch: Any,
) -> None:  # fmt: skip
    """Masks are torch's, the diagnostics say why, nothing half-written stays; with room again onnxruntime runs."""
    monkeypatch.setattr(export, "_write", write_half)
    bench = live(tiny_bundle, runtime="onnxruntime").start()
    bench.see(frame)
    np.testing.assert_array_equal(bench.masks[""][0], offline.segment([frame])[0].mask)
    bench.camera("").publishers = lambda: 1
    status = bench.diagnostics()[0]
    assert status.level == b"\1" and "torch runs the dense segmenter in place of onnxruntime" in status.message
    assert "No space left on device" in rows(status)["degraded"] and "XDG_CACHE_HOME" in rows(status)["degraded"]
    assert bench.model.runtime == "torch" and list(fake_runtime.iterdir()) == []
    monkeypatch.setattr(export, "export_dense", write_whole)
    again = Segmenter(Bundle.load(tiny_bundle), device="cpu", runtime="onnxruntime")
    assert again.degraded == "" and again.runtime == "onnxruntime (cpu)"
    assert [file.read_bytes() for file in fake_runtime.iterdir()] == [b"whole"]


def test_a_file_that_a_power_cut_left_short_is_made_anew(
    tiny_bundle: Path, fake_runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "export_dense", write_whole)
    Segmenter(Bundle.load(tiny_bundle), device="cpu", runtime="onnxruntime")
    [file] = fake_runtime.iterdir()
    file.write_bytes(b"")
    again = Segmenter(Bundle.load(tiny_bundle), device="cpu", runtime="onnxruntime")
    assert again.degraded == "" and file.read_bytes() == b"whole"
    monkeypatch.setattr(export, "export_dense", lambda network, path, *_: path.write_bytes(b"bad") and write_bad())
    file.unlink()
    with pytest.raises(BundleError, match="InvalidProtobuf"):  # what was just made cannot be helped by making it again
        Segmenter(Bundle.load(tiny_bundle), device="cpu", runtime="onnxruntime")


def write_bad() -> Any:
    return SimpleNamespace(difference=0.0)


@pytest.mark.parametrize("where", ["disk", "compiler"])
def test_a_full_disk_leaves_the_kernels_to_torch(
    tiny_bundle: Path, tmp_path: Path, offline: Segmenter, frame: np.ndarray, monkeypatch: Any, caplog: Any, where: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(head, "load", native.load.__wrapped__)  # which keeps nothing
    if where == "compiler":
        compiler = tmp_path / "cc"
        compiler.write_text(
            '#!/bin/sh\nfor word; do [ "$last" = -o ] && printf half > "$word"; last=$word; done\n'
            "[ \"$1\" = --version ] || { echo 'ld: error: No space left on device' >&2; exit 1; }\n"
        )
        compiler.chmod(0o755)
        monkeypatch.setenv("CC", str(compiler))
    else:

        def full(*_: Any, **__: Any) -> Any:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(native.os, "fsync", full)
    with caplog.at_level("WARNING", "sparserefine_ros"):
        segmenter = Segmenter(Bundle.load(tiny_bundle), device="cpu")
    assert type(segmenter.head) is Head
    assert "No space left on device" in caplog.text and "torch does this kernel's work" in caplog.text
    assert list((tmp_path / "sparserefine_ros").iterdir()) == []
    assert (segmenter.segment([frame])[0].mask == offline.segment([frame])[0].mask).mean() > 0.999
