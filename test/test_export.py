"""What is exported, against torch: operations written out for ONNX, the plain refiner, and both files value by value.

Shape shorthand: B images, K classes, C channels, H, W native size, h, w low resolution, N selected pixels.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from conftest import DECODERS, write_decoder_bundle, write_tiny_bundle
from torch.nn import functional as F

from sparserefine_ros import cli
from sparserefine_ros.cli import main
from sparserefine_ros.datasets.classes import CAMVID
from sparserefine_ros.errors import ExportError
from sparserefine_ros.networks import association, exporting, local_attention
from sparserefine_ros.networks import entropy as entropy_module
from sparserefine_ros.networks.registry import DENSE, build
from sparserefine_ros.networks.unet import SparseUNet
from sparserefine_ros.segmenter import export
from sparserefine_ros.segmenter.bundle import Bundle, save_network
from sparserefine_ros.segmenter.export import export_dense, export_pipeline, is_dynamic
from sparserefine_ros.segmenter.importing import import_checkpoint
from sparserefine_ros.segmenter.plain_pipeline import PipelineOutput, PlainPipeline, shrink
from sparserefine_ros.segmenter.plain_refiner import PlainUNet, coarser, finest
from sparserefine_ros.segmenter.preprocess import low_resolution_size, resize
from sparserefine_ros.segmenter.segmenter import Segmentation, Segmenter
from sparserefine_ros.sparse import Pyramid
from sparserefine_ros.sparse.maps import STRIDE_MODES


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bins", [1, 2, 4])
@pytest.mark.parametrize("size", [(8, 12), (7, 13), (3, 2), (1, 5)])
def test_adaptive_average_equals_torchs(size: tuple[int, int], bins: int) -> None:
    x = draw(2, 3, *size)
    torch.testing.assert_close(exporting.adaptive_average(x, bins), F.adaptive_avg_pool2d(x, bins))


@pytest.mark.parametrize(("axis", "size", "step"), [(-2, 3, 1), (1, 3, 1), (2, 4, 2), (1, 6, 4)])
def test_windows_equal_unfold(axis: int, size: int, step: int) -> None:
    x = draw(2, 10, 8, 3)
    assert torch.equal(exporting.windows(x, axis, size, step), x.unfold(axis, size, step))


@pytest.mark.parametrize("kind", association.ASSOCIATIONS)
def test_superpixels_written_for_export_give_the_same(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Attention both ways and projection, 2x2 pixels a cell of a 3x4 grid, two heads."""
    sides = [
        local_attention.QueryKeyValue(*(draw(2, 3, 4, *more, 8, seed=seed + i) for i in range(3)))
        for seed, more in ((0, (4,)), (3, ()))
    ]
    pixels, superpixels, classes = draw(2, 3, 4, 4, 8), draw(2, 3, 4, 8), draw(2, 3, 4, 5)

    def both() -> list[torch.Tensor]:
        logits = association.project(pixels, superpixels, classes, (2, 2), 4, kind)
        return [*local_attention.plain_local_attention(sides[0], sides[1], 2), logits]

    with torch.no_grad():
        expected = both()
        for module in (local_attention, association):
            monkeypatch.setattr(module, "exporting", lambda: True)
        found = both()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_entropy_written_for_export_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    p = torch.cat([draw(50, 7).mul(9).softmax(1), F.one_hot(torch.arange(7)).float()])
    expected = entropy_module.entropy(p)
    monkeypatch.setattr(entropy_module, "exporting", lambda: True)
    torch.testing.assert_close(entropy_module.entropy(p), expected)


def masks() -> dict[str, torch.Tensor]:
    draw_mask = torch.rand(13, 22, generator=torch.Generator().manual_seed(3))
    corner = torch.zeros(9, 9, dtype=torch.bool)
    corner[8, 0] = True
    return {
        "sparse": draw_mask < 0.1, "half": draw_mask < 0.5, "all": draw_mask < 2, "none": draw_mask < 0,
        "corner": corner, "pixel": torch.ones(1, 1, dtype=torch.bool), "row": torch.ones(2, 7, dtype=torch.bool),
    }  # fmt: skip


@pytest.mark.parametrize("stride", STRIDE_MODES)
@pytest.mark.parametrize("name", list(masks()))
def test_plain_levels_have_the_pyramids_sites(name: str, stride: str) -> None:
    pyramid = Pyramid.build(masks()[name][None], 4, stride)
    level = finest(masks()[name])
    for index, sites in enumerate(pyramid.levels):
        assert torch.equal(torch.stack([level.row, level.column], 1), sites.sites[:, 1:])
        assert (level.height, level.width) == tuple(max(0, size) for size in sites.shape[1:])
        assert torch.equal(level.neighbours, pyramid.submanifold[index].out_to_in.long())
        level = coarser(level, {"dilate": 0, "floor": 1}[stride])


@pytest.mark.parametrize("stride", STRIDE_MODES)
@pytest.mark.parametrize("name", list(masks()))
def test_plain_unet_equals_the_sparse_unet(name: str, stride: str) -> None:
    torch.manual_seed(1)
    unet = SparseUNet(3, [4, 6, 8, 8], blocks=1).double().eval()
    for module in unet.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    mask = masks()[name]
    x = draw(int(mask.sum()), 3).double()
    with torch.no_grad():
        expected = unet(x, Pyramid.build(mask[None], 4, stride))
        found = PlainUNet(unet, stride)(x, finest(mask))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert len(found) < 10 or found.abs().max() > 0.1


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (63, 96), (90, 121), (3, 3), (1, 2), (14, 13)])
@pytest.mark.parametrize("scale", [0.5, 0.25, 0.4, 1 / 3, 0.75, 0.1])
def test_shrink_equals_opencvs_area_resize(size: tuple[int, int], scale: float) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    low = low_resolution_size(size, scale)
    expected = cv2.resize(image, low[::-1], interpolation=cv2.INTER_AREA)
    found = shrink(torch.from_numpy(image), scale).numpy()
    assert found.shape == expected.shape
    differs = found != expected
    if size == (64, 96) and scale == 0.5:
        assert not differs.any()
    assert np.abs(found - expected).max() <= 1 and differs.mean() <= 0.01  # ties of a mean, broken by rounding


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("export")
    return {name: write_decoder_bundle(folder / name, name) for name in DECODERS}


def needs_onnx() -> None:
    """Skips the test that calls it."""
    for name in ("onnx", "onnxruntime"):
        pytest.importorskip(name)


def load(file: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # opens faster
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("decoder", ["per-pixel", "offseg"])  # superpixels: below
def test_dense_file_gives_the_logits_of_torch(bundles: dict[str, Path], tmp_path: Path, decoder: str) -> None:
    needs_onnx()
    segmenter = Segmenter(replace(Bundle.load(bundles[decoder]), temperature=1.7), "cpu")
    assert is_dynamic(segmenter.dense)
    done = export_dense(segmenter.dense, tmp_path / "dense.onnx", (32, 48), fixed=False)
    assert 0 < done.difference < 1e-5
    session = load(done.path)
    for shape in [(1, 3, 32, 48), (1, 3, 49, 31), (3, 3, 40, 64)]:
        images = draw(*shape, seed=4)
        with torch.no_grad():
            expected = segmenter.dense(images).numpy()  # divided by the temperature
        [found] = session.run(None, {"images": images.numpy()})
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_half_precision_is_close_and_not_equal(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_onnx()
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # not needed, hence the extra `onnx` does not name it
    network = Segmenter(Bundle.load(tiny_bundle), "cpu").dense
    done = export_dense(network, tmp_path / "half.onnx", (32, 48), fixed=False, half=True)
    assert 1e-5 < done.difference < 2e-2
    assert next(network.parameters()).dtype == torch.float32  # a copy was made


def tiny(path: Path, **refiner_changes: Any) -> Bundle:
    """A tiny bundle with another refiner."""
    bundle = Bundle.load(write_tiny_bundle(path))
    args = {"channels": [8, 12, 16], "stride": "floor", "blocks": 1} | refiner_changes
    torch.manual_seed(2)
    from sparserefine_ros.networks.refiner import SparseRefiner

    refiner = SparseRefiner(len(bundle.classes), **args)
    return replace(bundle, refiner=save_network(path, refiner, "sparserefine", args, "refiner.safetensors"))


@pytest.mark.parametrize(
    "changes",
    [{}, {"stride": "dilate", "context": True, "ensembler": "entropy"}],
    ids=str,
)
def test_pipeline_file_gives_the_masks_of_torch(tmp_path: Path, frame: np.ndarray, changes: dict[str, Any]) -> None:
    """One file for every size and selection: none, some, all; a pixel in 10000 may break a tie the other way."""
    needs_onnx()
    segmenter = Segmenter(tiny(tmp_path / "bundle", **changes), "cpu", sparse_backend="torch")
    done = export_pipeline(segmenter, tmp_path / "pipeline.onnx", (64, 96), fixed=False)
    assert done.flipped <= 1e-4
    densities, pixels, flipped, session = [], 0, 0, load(done.path)
    for size in [(64, 96), (90, 122), (40, 30), (2, 2), (65, 97), (7, 5)]:  # resized exactly as by OpenCV
        for threshold in (0.0, 1.0, 2.39):
            segmenter.entropy_threshold = threshold
            image = resize(frame, size)
            expected = segmenter.segment([image])[0]
            found = run_pipeline(session, image, threshold)
            np.testing.assert_allclose(found.entropy[0], expected.low_entropy, atol=1e-5)
            assert found.density == pytest.approx(expected.density, abs=1e-6)
            difference = found.confidence[0].astype(int) - expected.confidence
            assert np.abs(difference).max() <= 1
            densities.append(expected.density)
            pixels, flipped = pixels + expected.mask.size, flipped + int((found.mask[0] != expected.mask).sum())
    assert min(densities) == 0 and max(densities) == 1 and any(0.1 < d < 0.9 for d in densities)
    assert flipped <= 1e-4 * pixels


def run_pipeline(session: Any, image: np.ndarray, threshold: float) -> PipelineOutput:
    feeds = {"image": image[None], "entropy_threshold": np.array(threshold, np.float32)}
    arrays = session.run(None, feeds)
    assert [array.dtype for array in arrays] == [np.uint8, np.uint8, np.float32, np.float32]
    return PipelineOutput(*arrays)  # type: ignore[arg-type]


def test_pipeline_whose_resize_rounds_differently_stays_close(tiny_bundle: Path, frame: np.ndarray) -> None:
    """67 rows to 34 are no 1 : 2: a grey level may differ, and with it, rarely, a class."""
    segmenter = Segmenter(Bundle.load(tiny_bundle), "cpu", sparse_backend="torch")
    assert segmenter.refiner is not None
    pipeline = PlainPipeline(segmenter.dense, segmenter.refiner, 0.5).eval()
    image = resize(frame, (67, 96))
    expected: Segmentation = segmenter.segment([image])[0]
    with torch.no_grad():
        found = pipeline(torch.from_numpy(image)[None], torch.tensor(segmenter.entropy_threshold))
    assert (found.mask[0].numpy() == expected.mask).mean() > 0.998


def test_superpixels_refined_in_one_file(bundles: dict[str, Path], tmp_path: Path, frame: np.ndarray) -> None:
    needs_onnx()
    segmenter = Segmenter(Bundle.load(bundles["superpixel"]), "cpu", sparse_backend="torch")
    assert not is_dynamic(segmenter.dense)
    image = resize(frame, (64, 96))
    segmenter.entropy_threshold = float(np.median(segmenter.segment([image])[0].low_entropy))
    done = export_pipeline(segmenter, tmp_path / "pipeline.onnx", (64, 96), fixed=True)
    expected = segmenter.segment([image])[0]
    found = run_pipeline(load(done.path), image, segmenter.entropy_threshold)
    assert (found.mask[0] != expected.mask).sum() <= 1  # a tie
    assert found.density == pytest.approx(expected.density, abs=1e-3) and 0.4 < expected.density < 0.6


def test_weights_in_a_file_of_their_own(tiny_bundle: Path, tmp_path: Path) -> None:
    needs_onnx()
    network = Segmenter(Bundle.load(tiny_bundle), "cpu").dense
    for _ in range(2):  # the second replaces the first
        done = export_dense(network, tmp_path / "dense.onnx", (32, 48), fixed=False, external=True)
    weights = sum(p.numel() * 4 for p in network.parameters())
    assert 0.5 * weights < (tmp_path / "dense.onnx.data").stat().st_size < 1.5 * weights
    assert done.difference < 1e-5


def test_a_file_with_other_values_is_refused(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_onnx()
    segmenter = Segmenter(Bundle.load(tiny_bundle), "cpu", sparse_backend="torch")
    genuine = export._run
    monkeypatch.setattr(export, "_run", lambda *args: [array * 1.001 for array in genuine(*args)])
    with pytest.raises(ExportError, match=r"torch's by 1\.0e-03 of the largest for images of 32x48, allowed are 1e-04"):
        export_dense(segmenter.dense, tmp_path / "dense.onnx", (32, 48), fixed=False)
    monkeypatch.setattr(export, "_run", lambda *args: [a ^ 1 if a.dtype == np.uint8 else a for a in genuine(*args)])
    with pytest.raises(ExportError, match=r"another class than torch for 6144 of 6144 pixels, allowed are 1,"):
        export_pipeline(segmenter, tmp_path / "pipeline.onnx", (64, 96), fixed=False)


def test_errors_say_what_is_missing(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segmenter = Segmenter(replace(Bundle.load(tiny_bundle), refiner=None), "cpu")
    with pytest.raises(ExportError, match="no refiner to export; .*--what dense"):
        export_pipeline(segmenter, tmp_path / "pipeline.onnx", (64, 96), fixed=False)
    needs_onnx()
    for name in ("onnx", "onnxruntime"):
        with monkeypatch.context() as patch, pytest.raises(ExportError, match=f"pip install {name} "):
            patch.setitem(sys.modules, name, None)
            export_dense(segmenter.dense, tmp_path / "dense.onnx", (32, 48), fixed=False)

    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.entr(x)

    with pytest.raises(ExportError, match="cannot export Odd: .*special_entr"):
        export_dense(Odd(), tmp_path / "odd.onnx", (4, 4), fixed=False)


def test_command_writes_both_files(tiny_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    needs_onnx()
    assert cli.main(["export", str(tiny_bundle), "--output", str(tmp_path), "--size", "40x64"]) == 0
    out, _ = capfd.readouterr()
    lines = [line for line in out.splitlines() if line.startswith("wrote ")]  # libraries may print, too
    assert len(lines) == 2 and "dense.onnx: frames of 40x64 alone, 20x32 at low resolution; differs" in lines[0]
    [logits] = load(tmp_path / "dense.onnx").run(None, {"images": draw(1, 3, 20, 32).numpy()})
    assert logits.shape == (1, 11, 20, 32)
    with pytest.raises(SystemExit):
        cli.main(["export", str(tiny_bundle), "--output", str(tmp_path), "--size", "40"])
    (tmp_path / "taken" / "dense.onnx").mkdir(parents=True)
    assert cli.main(["export", str(tiny_bundle), "--output", str(tmp_path / "taken"), "--what", "dense"]) == 2
    assert "dense.onnx" in capfd.readouterr().err.splitlines()[-1]


def test_an_onnx_file_is_not_exported_again(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(tiny_bundle, tmp_path / "mine"))
    bundle = Bundle.load(path)
    replace(bundle, dense=replace(bundle.dense, network="onnx", args={})).save()
    assert cli.main(["export", str(path), "--output", str(tmp_path / "out")]) == 2
    assert f"is an ONNX file already: {path / 'dense.safetensors'}" in capsys.readouterr().err


@pytest.mark.parametrize("network", ["offseg", "segformer"])
def test_larger_networks_export(tmp_path: Path, network: str) -> None:
    needs_onnx()
    if network == "segformer":
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    module = build(DENSE, network, 5, {}).eval()
    done = export_dense(module, tmp_path / "dense.onnx", (64, 96), fixed=not is_dynamic(module))
    assert done.difference < 1e-4


def test_mask2former_is_exported_for_one_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Swin's padding and the attention's sizes are in the graph: at most other sizes it fails, at some it would err."""
    needs_onnx()
    from test_hub_import import mask2former

    mask2former(tmp_path / "hub")
    bundle = import_checkpoint(tmp_path / "hub", None, CAMVID, tmp_path / "mine", (64, 96))
    segmenter = Segmenter(bundle, "cpu")
    assert not is_dynamic(segmenter.dense)
    assert main(["export", str(bundle.path), "--output", str(tmp_path / "onnx")]) == 0
    assert "frames of 64x96 alone" in capsys.readouterr().out
    onnx = Segmenter(bundle, "cpu", runtime="onnxruntime")
    rng = np.random.default_rng(0)
    for size in ((64, 96), (192, 224)):
        image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        assert (onnx.segment([image])[0].mask == segmenter.segment([image])[0].mask).mean() > 0.999


class OfItsSize(torch.nn.Module):
    """Right at the size it is traced at alone."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images * int(images.shape[3])


def test_a_file_for_every_size_is_compared_at_another(tmp_path: Path) -> None:
    needs_onnx()
    assert export_dense(OfItsSize(), tmp_path / "fixed.onnx", (32, 48), fixed=True).difference < 1e-6
    with pytest.raises(ExportError, match=r"differ from torch's by .* for images of 65x65, .* one size alone"):
        export_dense(OfItsSize(), tmp_path / "any.onnx", (32, 48), fixed=False)
    assert not (tmp_path / "any.onnx").exists()


def test_a_size_that_the_network_does_not_take_is_told(tiny_bundle: Path, tmp_path: Path) -> None:
    needs_onnx()

    class Fails(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("Calculated padded input size per channel: (1 x 1)\nKernel size")

    with pytest.raises(ExportError, match=r"cannot make d.onnx for images of 20x20: Calculated padded .*\(1 x 1\); gi"):
        export_dense(Fails(), tmp_path / "d.onnx", (20, 20), fixed=True)


def test_what_an_export_that_was_killed_left_goes(tmp_path: Path) -> None:
    needs_onnx()
    old, new, other = (tmp_path / name for name in (".any-abcd1234", ".any-abcd5678", ".anyone-abcd1234"))
    for folder in (old, new, other):
        folder.mkdir()
        (folder / "any.onnx").touch()
    for folder in (old, other):
        os.utime(folder, (1, 1))
    export_dense(OfItsSize(), tmp_path / "any.onnx", (32, 48), fixed=True)
    assert not old.exists() and new.exists() and other.exists()


def test_a_bundle_is_not_exported_over(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tiny_bundle), "--output", str(tiny_bundle)]) == 2
    assert "holds a bundle, whose files would be written over; give another --output" in capsys.readouterr().err
