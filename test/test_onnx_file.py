"""Somebody's own segmenter as an ONNX file, and models of the hub: what becomes of them and what is refused.

Shape shorthand: B images, K classes, h, w low resolution.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparserefine_ros.cli import main
from sparserefine_ros.datasets.base import Sample
from sparserefine_ros.datasets.classes import CAMVID
from sparserefine_ros.errors import BundleError, ParameterError
from sparserefine_ros.evaluation.compare import HR, LR, compare
from sparserefine_ros.networks.patches import PatchRefiner
from sparserefine_ros.segmenter.bundle import Bundle, save_network
from sparserefine_ros.segmenter.bundle_files import rehash
from sparserefine_ros.segmenter.importing import REPORT, import_checkpoint
from sparserefine_ros.segmenter.licences import UNKNOWN, find_licence
from sparserefine_ros.segmenter.preprocess import normalise, resize
from sparserefine_ros.segmenter.segmenter import Segmenter
from sparserefine_ros.training.distill import distill

K, SIZE = len(CAMVID), (64, 96)
DYNAMIC = {"pixels": {0: "b", 2: "h", 3: "w"}, "scores": {0: "b", 2: "h", 3: "w"}}


class Own(nn.Module):
    """A user's segmenter: logits at stride 4, with batch normalisation and dropout."""

    def __init__(self, classes: int = K) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.Dropout(0.5),
            nn.Conv2d(8, classes, 1),
        )  # fmt: skip
        with torch.no_grad():
            self.layers[-1].weight.mul_(40)

    def forward(self, pixels: Tensor) -> Tensor:
        scores: Tensor = self.layers(pixels)
        return scores


class Then(nn.Module):
    """A network and what somebody put behind it."""

    def __init__(self, network: nn.Module, what: Any) -> None:
        super().__init__()
        self.network, self.what = network, what

    def forward(self, pixels: Tensor) -> Tensor:
        result: Tensor = self.what(self.network(pixels))
        return result


def write(network: nn.Module, file: Path, dynamic: bool = True, external: bool = False) -> Path:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    file.parent.mkdir(parents=True, exist_ok=True)
    dtype = next(network.parameters()).dtype
    torch.onnx.export(
        network, (torch.zeros(1, 3, 32, 48, dtype=dtype),), str(file), input_names=["pixels"],
        output_names=["scores"], dynamic_axes=DYNAMIC if dynamic else {}, opset_version=17, dynamo=False,
    )  # fmt: skip
    if external:
        onnx.save_model(onnx.load(file), file, save_as_external_data=True, location="own.data", size_threshold=0)
    return file


def expected(network: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return F.interpolate(network.eval()(images), images.shape[2:], mode="bilinear")


def under_the_refiner(bundle: Bundle, tiny: Path) -> Bundle:
    """``bundle`` with the tiny bundle's refiner."""
    refiner = Bundle.load(tiny).refiner
    assert refiner is not None
    (bundle.path / refiner.weights).write_bytes((tiny / refiner.weights).read_bytes())
    bundle = replace(bundle, refiner=refiner, entropy_threshold=1.0)
    bundle.save()
    return Bundle.load(bundle.path)


@pytest.mark.parametrize("external", [False, True])
def test_a_file_of_any_size_runs_under_the_refiner(
    external: bool, tmp_path: Path, tiny_bundle: Path, frame: np.ndarray
) -> None:
    file = write(Own(), tmp_path / "theirs" / "own.onnx", external=external)
    assert (tmp_path / "theirs" / "own.data").exists() == external
    bundle = import_checkpoint(file, None, CAMVID, tmp_path / "mine", SIZE, 0.5)
    file.unlink()
    assert bundle.dense.network == "onnx" and bundle.dense.args["size"] is None
    assert (bundle.dense.args["input"], bundle.dense.args["output"]) == ("pixels", "scores")
    assert not bundle.dense.args["one_image"]
    assert (bundle.path / REPORT).read_text().splitlines()[:2] == [
        "input pixels: normalised images float32, any size, any number",
        "output scores: logits of 8x12, resized to the images' size",
    ]
    segmenter = Segmenter(under_the_refiner(bundle, tiny_bundle), "cpu")
    assert segmenter.runtime == "onnxruntime (cpu)" and segmenter.refines
    for size in (SIZE, (70, 101)):
        image = resize(frame, size)
        low = normalise(torch.from_numpy(resize(image, segmenter.low_size(size)))[None])
        wanted = expected(Own(), low)
        torch.testing.assert_close(segmenter.dense(low), wanted, rtol=1e-4, atol=1e-5)
        both = torch.cat([low, low.flip(3)])
        torch.testing.assert_close(segmenter.dense(both), expected(Own(), both), rtol=1e-4, atol=1e-5)
        result = segmenter.segment([image])[0]
        entropy = torch.special.entr(wanted.softmax(1)).sum(1)[0]
        np.testing.assert_allclose(result.low_entropy, entropy, atol=1e-4)
        assert 0.02 < result.density < 0.98
        dense = segmenter.segment([image], refine=False)[0]
        changed = dense.mask != result.mask
        assert changed.any() and not changed[result.entropy <= 1.0].any()
    with pytest.raises(ParameterError, match="'mine' is an ONNX file, which runtime 'torch' cannot run; set runtime"):
        Segmenter(bundle, "cpu", runtime="torch")
    with pytest.raises(ParameterError, match="its own number format; precision fp16 is for provider tensorrt.*'cpu'"):
        Segmenter(bundle, "cpu", "fp16")


def test_temperature_divides_its_logits(tmp_path: Path) -> None:
    file = write(Own(), tmp_path / "own.onnx")
    bundle = import_checkpoint(file, None, CAMVID, tmp_path / "mine", SIZE, 0.5)
    images = torch.randn(1, 3, 32, 48)
    tempered = Segmenter(replace(bundle, temperature=2.0), "cpu").dense(images)
    torch.testing.assert_close(tempered * 2, Segmenter(bundle, "cpu").dense(images))


def test_a_file_of_one_size_runs_one_image_at_a_time(tmp_path: Path, frame: np.ndarray) -> None:
    file = write(Own(), tmp_path / "own.onnx", dynamic=False)
    with pytest.raises(BundleError, match="takes images of 32x48 alone, but frames of 64x96 at scale 1 give 64x96"):
        import_checkpoint(file, None, CAMVID, tmp_path / "mine", SIZE, 1.0)
    assert not (tmp_path / "mine").exists()
    bundle = import_checkpoint(file, None, CAMVID, tmp_path / "mine", SIZE, 0.5)
    assert bundle.dense.args["size"] == [32, 48] and bundle.dense.args["one_image"]
    segmenter = Segmenter(bundle, "cpu")
    other = resize(frame, (80, 100))  # another camera: resized to what the file takes
    results = segmenter.segment([frame, frame[::-1].copy(), other])
    for image, result in zip([frame, frame[::-1].copy(), other], results, strict=True):
        assert result.mask.shape == image.shape[:2] and result.low_entropy.shape == (32, 48)
        wanted = expected(Own(), normalise(torch.from_numpy(resize(image, (32, 48)))[None]))
        np.testing.assert_allclose(result.low_entropy, torch.special.entr(wanted.softmax(1)).sum(1)[0], atol=1e-4)
    with pytest.raises(ParameterError, match="for images of 32x48 alone: it cannot run at scale 1.0; export it anew"):
        Segmenter(bundle, "cpu", scale=1.0)
    args = {"size": 16}
    patches = save_network(bundle.path, PatchRefiner(K, **args), "patches", args, "refiner.safetensors")
    with pytest.raises(BundleError, match="'patches' shows .* parts of frames, .* 'mine' is an ONNX file for images"):
        Segmenter(replace(bundle, refiner=patches), "cpu")


def test_nothing_runs_but_what_was_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = import_checkpoint(write(Own(), tmp_path / "own.onnx"), None, CAMVID, tmp_path / "mine", SIZE)
    file, onnx = bundle.path / "dense.onnx", pytest.importorskip("onnx")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])  # after the bundle was loaded
    with pytest.raises(BundleError, match="dense.onnx have sha256 .*, but .*model.yaml says"):
        Segmenter(bundle, "cpu")
    file.write_bytes(whole)
    onnx.save_model(onnx.load(file), file, save_as_external_data=True, location="w.data", size_threshold=0)
    rehash(bundle.path)
    monkeypatch.chdir(bundle.path)  # where the runtime would look for w.data, which no hash covers
    with pytest.raises(BundleError, match="dense.onnx has weights in other files; import it again"):
        Segmenter(Bundle.load(bundle.path), "cpu")


def test_the_runtime_tells_nobody(tmp_path: Path) -> None:
    """Its wheels name the machine to Microsoft unless this stands in the environment before they are imported."""
    pytest.importorskip("onnxruntime")
    code = "from sparserefine_ros.segmenter.onnx_session import onnxruntime; import os, sys\n"
    code += "onnxruntime(); print(os.environ['ORT_DISABLE_TELEMETRY'])"
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"} | {
        "XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)
    }  # fmt: skip
    for given, said in (({}, "1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0")):  # unless the user wants it
        done = subprocess.run(
            [sys.executable, "-c", code], env={**environment, **given}, capture_output=True, text=True
        )
        assert done.stdout.strip() == said, done.stderr
        if not given:
            assert not list(tmp_path.iterdir())


def test_functions_of_its_own_are_no_foreign_operators(tmp_path: Path, frame: np.ndarray) -> None:
    """As torch's exporter of dynamo wrote its operators before it dissolved them."""
    onnx = pytest.importorskip("onnx")
    file = write(Own(), tmp_path / "own.onnx")
    model = onnx.load(file)
    [relu] = (node for node in model.graph.node if node.op_type == "Relu")
    opset = [onnx.helper.make_opsetid("", 17)]
    body = onnx.helper.make_node("Relu", ["x"], ["y"])
    model.functions.append(onnx.helper.make_function("pkg.own", "MyRelu", ["x"], ["y"], [body], opset))
    relu.op_type, relu.domain = "MyRelu", "pkg.own"
    model.opset_import.append(onnx.helper.make_opsetid("pkg.own", 1))
    onnx.save(model, tmp_path / "functions.onnx")
    masks = [
        Segmenter(import_checkpoint(given, None, CAMVID, tmp_path / given.stem, SIZE), "cpu").segment([frame])[0].mask
        for given in (file, tmp_path / "functions.onnx")
    ]
    np.testing.assert_array_equal(*masks)
    assert len(np.unique(masks[0])) > 1


def test_half_precision_files_keep_their_format(tmp_path: Path) -> None:
    file = write(Own().half(), tmp_path / "own.onnx")
    bundle = import_checkpoint(file, None, CAMVID, tmp_path / "mine", SIZE, 0.5)
    assert bundle.dense.args["dtype"] == "float16"
    images = torch.randn(1, 3, 32, 48)
    logits = Segmenter(bundle, "cpu").dense(images)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected(Own(), images), rtol=2e-2, atol=2e-2)


def test_a_graph_that_only_says_any_number_of_images_gets_one(tmp_path: Path) -> None:
    class Written(Own):
        def forward(self, pixels: Tensor) -> Tensor:
            scores = super().forward(pixels)
            return scores.reshape(1, K, scores.shape[2], scores.shape[3])

    file = write(Written(), tmp_path / "own.onnx")
    bundle = import_checkpoint(file, None, CAMVID, tmp_path / "mine", SIZE, 0.5)
    assert bundle.dense.args["one_image"]
    both = torch.randn(2, 3, 32, 48)
    torch.testing.assert_close(Segmenter(bundle, "cpu").dense(both), expected(Own(), both), rtol=1e-4, atol=1e-5)


def gray(scores: Tensor) -> Tensor:
    return scores.argmax(1)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Own(7), r"outputs scores float32 \[1, 7, 8, 12\].*wanted are logits \[B, 11, h, w\] of the 11 classes"),
        (Then(Own(), gray), "class ids are no logits, export it without its argmax"),
        (
            Then(Own(), lambda scores: scores.softmax(1)),
            "gives probabilities: .*; export it without its softmax or sigmoid",
        ),
        (Then(Own(), lambda scores: scores / 0.0), "values that are not finite; check its weights"),
        (Then(Own(), lambda scores: scores + torch.randn_like(scores)), "other logits every time; export it for inf"),
        (nn.Sequential(nn.Conv2d(3, K, 1), nn.Flatten()), r"outputs scores float32 \[1, 16896\]"),
    ],
)
def test_other_outputs_are_refused(network: nn.Module, message: str, tmp_path: Path) -> None:
    file = write(network.eval(), tmp_path / "own.onnx")
    with pytest.raises(BundleError, match=message):
        import_checkpoint(file, None, CAMVID, tmp_path / "mine", SIZE, 0.5)


def test_other_inputs_are_refused(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, kinds = onnx.helper, onnx.TensorProto

    def file(name: str, kind: int, shape: list[Any]) -> Path:
        graph = helper.make_graph(
            [helper.make_node("Identity", ["x"], ["y"])], "g", [helper.make_tensor_value_info("x", kind, shape)],
            [helper.make_tensor_value_info("y", kind, shape)],
        )  # fmt: skip
        opset = [helper.make_opsetid("", 17)]
        onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / name)
        return tmp_path / name

    for made in (
        file("bytes.onnx", kinds.UINT8, [1, 3, "h", "w"]), file("last.onnx", kinds.FLOAT, [1, 64, "w", 3]),
        file("four.onnx", kinds.FLOAT, [4, 3, "h", "w"]), file("flat.onnx", kinds.FLOAT, [1, 3]),
    ):  # fmt: skip
        with pytest.raises(BundleError, match=r"has inputs x .*export it with one input of normalised images"):
            import_checkpoint(made, None, CAMVID, tmp_path / "mine", SIZE)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    good = write(Own(), tmp_path / "good" / "own.onnx", external=True)
    for what, message in (
        ("cut", "cannot read .*give a whole ONNX file"),
        ("beside", "cannot read .*own.data.*give a whole ONNX file"),
        ("foreign", "operators of com.somebody; export it with standard operators alone"),
    ):
        file = tmp_path / f"{what}.onnx"
        if what == "cut":
            file.write_bytes(write(Own(), tmp_path / "whole.onnx").read_bytes()[:300])
        elif what == "beside":
            file.write_bytes(good.read_bytes())
        else:
            model = onnx.load(tmp_path / "whole.onnx")
            model.graph.node[0].domain = "com.somebody"
            model.opset_import.append(onnx.helper.make_opsetid("com.somebody", 1))
            onnx.save(model, file)
        with pytest.raises(BundleError, match=message):
            import_checkpoint(file, None, CAMVID, tmp_path / "mine", SIZE, 0.5)
    written = Then(Own(), lambda scores: scores.reshape(1, K, 8, 12)).eval()  # a size that only says it is any
    with pytest.raises(BundleError, match="fails on images of 40x50: .*choose --native-size and --scale"):
        import_checkpoint(write(written, tmp_path / "w.onnx"), None, CAMVID, tmp_path / "mine", (80, 100), 0.5)


def test_the_command_states_size_and_licence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx = pytest.importorskip("onnx")
    file = write(Own(), tmp_path / "theirs" / "own.onnx")
    words = ["--classes", "camvid", "--models", str(tmp_path), "--native-size", "64x96", "--scale", "0.5"]
    assert main(["import", str(file), "--name", "a", *words]) == 0
    assert f"licence: {UNKNOWN}" in capsys.readouterr().out
    assert f"| licence | {UNKNOWN} |" in (tmp_path / "a" / "README.md").read_text()
    (tmp_path / "theirs" / "LICENSE.txt").write_text("\n  BSD 3-Clause License\n\nCopyright\n")
    assert main(["import", str(file), "--name", "b", *words]) == 0
    assert "licence: LICENSE.txt, which begins: BSD 3-Clause License (it lies beside" in capsys.readouterr().out
    model = onnx.load(file)
    onnx.helper.set_model_props(model, {"license": "CC-BY-4.0"})
    onnx.save(model, file)
    assert main(["import", str(file), "--name", "c", *words]) == 0
    assert "licence: CC-BY-4.0\n" in capsys.readouterr().out
    assert Bundle.load(tmp_path / "c").provenance["licence"] == "CC-BY-4.0"
    assert main(["import", str(file), "--name", "d", "--network", "hrnet-w18", *words]) == 2
    assert "leave --network hrnet-w18 out" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "c"), "--output", str(tmp_path / "out")]) == 2
    assert "is an ONNX file" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert main(["import", str(file), "--name", "e", *words]) == 2
    assert "needs the package onnx: pip install onnx onnxruntime" in capsys.readouterr().err


def test_it_teaches_a_refiner_of_its_own(tmp_path: Path, frame: np.ndarray) -> None:
    file = write(Own(), tmp_path / "own.onnx")
    bundle = import_checkpoint(file, None, CAMVID, tmp_path / "mine", SIZE, 0.5)
    frames = [Sample(np.roll(frame, 7 * i, 1), None, str(i), i) for i in range(6)]
    made, held_out = distill(bundle, frames, tmp_path / "new", tmp_path / "runs", torch.device("cpu"), "bilateral")
    assert made.dense == bundle.dense and made.refiner is not None
    table = compare(made, held_out * 4, "cpu")
    assert np.isnan(table["rows"][LR]["macs_g"]) and table["rows"][LR]["ms"] > 0  # counted in torch's operations
    assert table["rows"][HR]["agreement"] == 1 and 0 < table["rows"]["LR + bilateral"]["density"] < 1


@pytest.mark.parametrize(
    ("head", "found"),
    [
        ("---\nlicense: apache-2.0\ntags:\n- vision\n---\n# Model\n", "apache-2.0"),
        (
            "---\nlicense: other\nlicense_name: research-only\nlicense_link: https://x.org/L\n---\n",
            "research-only (https://x.org/L)",
        ),
        ("# Model\n---\nlicense: mit\n---\n", ""),
        ("---\nlicense: [\n---\n", ""),
        ("---\nlicense: mit\ndate: 2023-02-30\n---\n", ""),  # PyYAML's own ValueError
        ("---\na: &a [x, x]\nlicense: *a\n---\n", ""),  # aliases to aliases would print as gigabytes
        ("---\nlicense: " + 1000 * "[", ""),
        ("---\nlicense: " + 100_000 * "[" + "\n---\n", ""),
    ],
)
def test_licences_of_the_hubs_cards(head: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(head)
    assert find_licence(tmp_path) == found


class Hub(ModuleType):
    """huggingface_hub, with one model and no network."""

    def __init__(self, folder: Path) -> None:
        super().__init__("huggingface_hub")
        self.folder, self.asked = folder, []
        self.files = ["config.json", "model.safetensors", "pytorch_model.bin", "tf_model.h5"]

    def list_repo_files(self, name: str) -> list[str]:
        if name != "owner/model":
            raise ConnectionError("no network")
        return self.files

    def snapshot_download(self, name: str, allow_patterns: list[str]) -> str:
        self.asked.append((name, allow_patterns))
        if name != "owner/model":
            raise FileNotFoundError(f"404: {name}\nrequest id 1")
        return str(self.folder)


def test_a_download_happens_only_when_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_hub_import import segformer

    monkeypatch.chdir(tmp_path)
    commit = tmp_path / "snapshots" / "0123abc"
    segformer(commit)
    (commit / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    hub = Hub(commit)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    words = ["--classes", "camvid", "--name", "mine", "--models", str(tmp_path), "--native-size", "64x96"]
    assert main(["import", "owner/model", *words]) == 2
    assert "nothing is downloaded unasked; if it is a name on the hub, add --download" in capsys.readouterr().err
    assert hub.asked == []
    assert main(["import", "owner/other", "--download", *words]) == 2
    error = capsys.readouterr().err
    assert "cannot download owner/other: 404: owner/other; check its name" in error and "request id" not in error
    assert main(["import", "owner/model", "--download", *words]) == 0
    name, patterns = hub.asked[-1]
    assert name == "owner/model" and "model.safetensors" in patterns and "pytorch_model.bin" not in patterns
    source = Bundle.load(tmp_path / "mine").provenance
    assert (source["hub"], source["revision"], source["licence"]) == ("owner/model", "0123abc", "apache-2.0")
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "| licence | apache-2.0 |" in card and "| revision | 0123abc |" in card
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["import", "owner/model", "--download", *words[:3], "other", *words[4:]]) == 2
    assert "pip install huggingface_hub" in capsys.readouterr().err


class Heads(nn.Module):
    """A segmenter and the auxiliary head it was trained with."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary, self.main = Own(), Own()
        with torch.no_grad():
            self.main.layers[-1].weight.neg_()

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self.auxiliary(pixels), self.main(pixels)


def test_of_several_outputs_one_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    file = tmp_path / "heads.onnx"
    axes = {name: {0: "b", 2: "h", 3: "w"} for name in ("pixels", "aux", "out")}
    torch.onnx.export(
        Heads().eval(), (torch.zeros(1, 3, 32, 48),), str(file), input_names=["pixels"], output_names=["aux", "out"],
        dynamic_axes=axes, opset_version=17, dynamo=False,
    )  # fmt: skip
    words = ["import", str(file), "--classes", "camvid", "--models", str(tmp_path), "--native-size", "64x96"]
    assert main([*words, "--name", "mine"]) == 2
    error = capsys.readouterr().err
    assert "more than one may be meant" in error and "name it with --output aux or out" in error
    assert main([*words, "--name", "mine", "--output", "logits"]) == 2
    assert "has no output 'logits'; --output is one of aux, out" in capsys.readouterr().err
    assert main([*words, "--name", "mine", "--output", "out"]) == 0
    images = torch.randn(1, 3, *SIZE)
    dense = Segmenter(Bundle.load(tmp_path / "mine"), "cpu").dense
    torch.testing.assert_close(dense(images), expected(Heads().main, images), rtol=1e-4, atol=1e-5)


class Baked(nn.Module):
    """Pads to squares of 16 and crops, by sizes that a tracer writes down."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Own()

    def forward(self, pixels: Tensor) -> Tensor:
        height, width = (int(n) for n in pixels.shape[2:])
        padded = F.pad(pixels, (0, -width % 16, 0, -height % 16))
        scores: Tensor = self.network(padded)
        return scores[:, :, : height // 4, : width // 4]


def test_sizes_that_a_graph_calls_dynamic_are_tried(tmp_path: Path) -> None:
    """Elsewhere it gives the corner that it was traced for, which would be stretched over the frame."""
    file = write(Baked(), tmp_path / "baked.onnx")  # traced at 32x48
    bundle = import_checkpoint(file, None, CAMVID, tmp_path / "mine", (32, 48))
    assert bundle.dense.args["size"] == [32, 48]
    assert "its graph has that size in it" in (bundle.path / REPORT).read_text()
    segmenter = Segmenter(bundle, "cpu")
    assert segmenter.low_size((64, 96)) == (32, 48)
    images = torch.randn(1, 3, 32, 48)
    torch.testing.assert_close(segmenter.dense(images), expected(Baked(), images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("last", [torch.sigmoid, lambda scores: scores.softmax(1) * 255])
def test_scores_that_are_never_negative_are_no_logits(last: Any, tmp_path: Path) -> None:
    file = write(Then(Own(), last), tmp_path / "own.onnx")
    with pytest.raises(BundleError, match="no value of output scores is negative; export it without its softmax or si"):
        import_checkpoint(file, None, CAMVID, tmp_path / "mine", SIZE)


def test_a_remark_is_not_taken_for_the_name_of_a_file(tmp_path: Path) -> None:
    file = write(Own(), tmp_path / "own.ONNX")
    import onnx

    model = onnx.load(file)
    for key, value in (("location", "Bonn"), ("license", "mit")):
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    onnx.save(model, file)
    bundle = import_checkpoint(file, None, CAMVID, tmp_path / "mine", SIZE)
    assert bundle.provenance["licence"] == "mit"
    assert Segmenter(bundle, "cpu").dense(torch.zeros(1, 3, *SIZE)).shape == (1, K, *SIZE)


def test_options_of_other_files_are_refused(tmp_path: Path) -> None:
    file = write(Own(), tmp_path / "own.onnx")
    with pytest.raises(BundleError, match="leave --renames out"):
        import_checkpoint(file, None, CAMVID, tmp_path / "mine", SIZE, renames=(("a", "b"),))
    (tmp_path / "weights.pth").touch()
    with pytest.raises(BundleError, match="leave --output out out"):
        import_checkpoint(tmp_path / "weights.pth", None, CAMVID, tmp_path / "mine", SIZE, output="out")


@pytest.mark.parametrize("theirs", ["README.md", "dense.safetensors", "dense.onnx"])
def test_what_lies_in_the_folder_is_not_written_over(tmp_path: Path, theirs: str) -> None:
    file = write(Own(), tmp_path / "own.onnx")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / theirs).write_text("theirs")
    with pytest.raises(BundleError, match=f"holds {theirs} and no bundle; give another name, or move what is there"):
        import_checkpoint(file, None, CAMVID, tmp_path / "mine", SIZE)
    assert (tmp_path / "mine" / theirs).read_text() == "theirs"
    (tmp_path / "mine" / REPORT).write_text("")  # an import that was cut off
    import_checkpoint(file, None, CAMVID, tmp_path / "mine", SIZE)
