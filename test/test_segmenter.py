"""The pipeline against a plain formulation of the paper's, at full resolution and in float64 where it matters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sparserefine_ros.cli import main
from sparserefine_ros.errors import BundleError, FrameError, ParameterError
from sparserefine_ros.networks.fused_unet import FusedUNet
from sparserefine_ros.networks.refiner import SparseRefiner
from sparserefine_ros.networks.registry import DENSE, REFINERS, build
from sparserefine_ros.segmenter import segmenter as segmenter_module
from sparserefine_ros.segmenter.bundle import Bundle, load_network, save_network
from sparserefine_ros.segmenter.preprocess import MEAN, STD, low_resolution_size, resize
from sparserefine_ros.segmenter.segmenter import ENTROPY_SAMPLE, Choose, Segmenter
from sparserefine_ros.segmenter.stage_clock import STAGES
from sparserefine_ros.training.bundle import copy_dense


def plain_pipeline(bundle: Bundle, image: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """SparseRefine as the paper writes it: logits upsampled first, everything at native resolution, no batching."""
    dense = load_network(bundle.path, bundle.dense, build(DENSE, bundle.dense.network, 11, bundle.dense.args))
    assert bundle.refiner is not None
    refiner = load_network(
        bundle.path, bundle.refiner, build(REFINERS, bundle.refiner.network, 11, bundle.refiner.args)
    )
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    low = resize(image, low_resolution_size(image.shape, bundle.scale))
    with torch.no_grad():
        x = (torch.from_numpy(low).float() / 255 - mean) / std
        logits = F.interpolate(dense(x.permute(2, 0, 1)[None]), image.shape[:2], mode="nearest")  # [1, K, H, W]
        p = logits.double().softmax(1)
        e = torch.special.entr(p).sum(1)
        chosen = e > threshold
        pyramid = refiner.pyramid(chosen)
        native = (torch.from_numpy(image).float() / 255 - mean) / std
        final = logits[0].permute(1, 2, 0).clone()
        final[chosen[0]] = refiner(native[chosen[0]], final[chosen[0]], pyramid).ensembled
    top = final.softmax(-1).max(-1)
    return top.indices.numpy().astype(np.uint8), (top.values * 255).numpy(), e[0].numpy()


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (33, 50)])
def test_pipeline_equals_the_plain_formulation(tiny_bundle: Path, frame: np.ndarray, size: tuple[int, int]) -> None:
    image = resize(frame, size)
    bundle = Bundle.load(tiny_bundle)
    mask, confidence, entropy = plain_pipeline(bundle, image, bundle.entropy_threshold)
    result = Segmenter(bundle, "cpu").segment([image])[0]
    assert result.mask.dtype == result.confidence.dtype == np.uint8 and result.entropy.dtype == np.float32
    assert result.mask.shape == result.confidence.shape == result.entropy.shape == size
    assert (result.mask == mask).mean() > 0.999  # a tie may fall the other way by rounding
    np.testing.assert_allclose(result.confidence, confidence, atol=1.01)
    np.testing.assert_allclose(result.entropy, entropy, atol=1e-4)
    assert result.density == pytest.approx((entropy > bundle.entropy_threshold).mean(), abs=1e-3)
    assert 0.05 < result.density < 0.95
    assert set(result.stage_ms) == set(STAGES) and all(ms > 0 for ms in result.stage_ms.values())


def test_refinement_changes_selected_pixels_only(tiny_bundle: Path, frame: np.ndarray) -> None:
    segmenter = Segmenter(Bundle.load(tiny_bundle), "cpu")
    refined, plain = segmenter.segment([frame])[0], segmenter.segment([frame], refine=False)[0]
    changed = refined.mask != plain.mask
    assert changed.any()
    assert not changed[refined.entropy <= segmenter.entropy_threshold].any()


def test_batches_and_mixed_sizes_give_what_single_frames_give(tiny_bundle: Path, frame: np.ndarray) -> None:
    segmenter = Segmenter(Bundle.load(tiny_bundle), "cpu")
    images = [frame, resize(frame, (40, 56)), np.ascontiguousarray(frame[::-1])]
    together = segmenter.segment(images)
    for image, result in zip(images, together, strict=True):
        alone = segmenter.segment([image])[0]
        assert (result.mask == alone.mask).mean() > 0.999
        assert result.density == pytest.approx(alone.density, abs=2e-3)
    assert segmenter.segment([]) == []


def test_a_threshold_may_be_chosen_for_each_batch(tiny_bundle: Path, frame: np.ndarray) -> None:
    segmenter = Segmenter(Bundle.load(tiny_bundle), device="cpu")
    seen: list[tuple[np.ndarray, int]] = []

    def choose(threshold: float | None) -> Choose:
        return lambda entropy, pixels: (seen.append((entropy, pixels)), threshold)[1]

    chosen = segmenter.segment([frame, frame, frame[:32]], choose=choose(0.7))
    assert [(entropy.shape, pixels) for entropy, pixels in seen] == [((2, 32, 48), 2 * 64 * 96), ((1, 16, 48), 32 * 96)]
    np.testing.assert_array_equal(seen[0][0][1], chosen[1].low_entropy)
    dense = segmenter.segment([frame], choose=choose(None))[0]
    segmenter.entropy_threshold = 0.7
    expected = segmenter.segment([frame], choose=None)[0]
    assert chosen[0].density == expected.density > 0
    assert chosen[0].threshold == expected.threshold == 0.7
    np.testing.assert_array_equal(dense.mask, segmenter.segment([frame], refine=False)[0].mask)
    assert dense.density == 0 and dense.threshold is None
    seen.clear()
    segmenter.segment([frame], refine=False, choose=choose(0.1))
    assert not seen, "there is nothing to choose where nothing is refined"
    segmenter.segment([np.tile(frame, (8, 8, 1))], choose=choose(None))
    assert seen[0][0].size <= ENTROPY_SAMPLE and seen[0][1] == 64 * 64 * 96


def test_threshold_bounds_select_everything_or_nothing(tiny_bundle: Path, frame: np.ndarray) -> None:
    segmenter = Segmenter(Bundle.load(tiny_bundle), "cpu", entropy_threshold=math.log(11))
    nothing = segmenter.segment([frame])[0]
    assert nothing.density == 0
    np.testing.assert_array_equal(nothing.mask, segmenter.segment([frame], refine=False)[0].mask)
    segmenter.entropy_threshold = 0.0
    assert segmenter.segment([frame])[0].density == 1


@pytest.mark.parametrize("value", [-0.1, 2.5, math.nan, math.inf, "0.3"])
def test_threshold_out_of_range_names_value_and_range(tiny_bundle: Path, value: float) -> None:
    segmenter = Segmenter(Bundle.load(tiny_bundle), "cpu", entropy_threshold=0.5)
    with pytest.raises(ParameterError, match=rf"entropy_threshold {value!r}.*0 to 2\.398"):
        segmenter.entropy_threshold = value
    assert segmenter.entropy_threshold == 0.5


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4), np.uint8), r"shape \(4, 4\)"),
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (None, "NoneType"),
    ],
)
def test_bad_arrays_are_refused(tiny_bundle: Path, array: np.ndarray, message: str) -> None:
    with pytest.raises(FrameError, match=message):
        Segmenter(Bundle.load(tiny_bundle), "cpu").segment([array])


@pytest.mark.parametrize("part", ["dense", "refiner"])
def test_weights_that_are_not_finite_are_reported(tiny_bundle: Path, frame: np.ndarray, part: str) -> None:
    segmenter = Segmenter(Bundle.load(tiny_bundle), "cpu")
    with torch.no_grad():
        *_, last = getattr(segmenter, part).parameters()
        last.fill_(math.nan)
    with pytest.raises(FrameError, match="not finite.*check its weights"):
        segmenter.segment([frame])


@pytest.mark.parametrize(("classes", "images"), [(10, 2), (12, 2), (11, 1)])
def test_logits_of_another_form_are_refused(tiny_bundle: Path, frame: np.ndarray, classes: int, images: int) -> None:
    """As an ONNX file may give: no file's hash tells, and kernels would read and write beside their memory."""
    segmenter = Segmenter(Bundle.load(tiny_bundle), device="cpu")
    segmenter.dense = lambda batch: torch.zeros(images, classes, *batch.shape[2:])  # type: ignore[assignment]
    message = rf"'tiny' gave logits of shape \[{images}, {classes}, .*\] for 2 images of 11 classes; do the classes"
    with pytest.raises(BundleError, match=message):
        segmenter.segment([frame, frame])


def test_bf16_stays_close_to_fp32(tiny_bundle: Path, frame: np.ndarray) -> None:
    bundle = Bundle.load(tiny_bundle)
    full, half = (
        Segmenter(bundle, "cpu", precision).segment([frame], refine=False)[0] for precision in ("fp32", "bf16")
    )
    assert np.abs(full.entropy - half.entropy).mean() < 0.1
    assert (full.mask == half.mask).mean() > 0.9


def test_a_frame_that_found_no_memory_leaves_the_next_one_whole(
    tiny_bundle: Path, frame: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    segmenter = Segmenter(Bundle.load(tiny_bundle), "cpu", entropy_threshold=0.3)
    expected = segmenter.segment([frame])[0]
    assert expected.density > 0
    original, calls = FusedUNet._buffer, []

    def buffer(self: FusedUNet, name: str, rows: int, channels: int) -> torch.Tensor:
        calls.append(name)
        if len(calls) == 4:
            raise MemoryError
        return original(self, name, rows, channels)

    monkeypatch.setattr(FusedUNet, "_buffer", buffer)
    with pytest.raises(MemoryError):
        segmenter.segment([frame])
    again = segmenter.segment([frame])[0]
    np.testing.assert_array_equal(again.mask, expected.mask)
    np.testing.assert_array_equal(again.confidence, expected.confidence)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"precision": "int8"}, ParameterError, "'int8'.*fp32, fp16, bf16"),
        ({"sparse_backend": "cuda"}, ParameterError, "'cuda' is unknown.*auto, torch"),
        ({"device": "gpu7"}, ParameterError, "'gpu7'.*auto, cpu"),
        ({"device": "mps"}, ParameterError, "'mps' is unknown.*auto, cpu"),
        ({"device": "meta"}, ParameterError, "'meta' is unknown.*auto, cpu"),
        ({"device": "cuda:63"}, ParameterError, "'cuda:63'.*auto or cpu"),
        ({"scale": 0.0}, ParameterError, "scale 0.0.*above 0"),
        ({"entropy_threshold": 9.0}, ParameterError, "entropy_threshold 9.0"),
    ],
)
def test_bad_arguments(tiny_bundle: Path, arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Segmenter(Bundle.load(tiny_bundle), **arguments)


def test_refining_without_a_refiner_is_refused(tiny_bundle: Path) -> None:
    bundle = replace(Bundle.load(tiny_bundle), refiner=None)
    assert not Segmenter(bundle, "cpu").refines
    with pytest.raises(BundleError, match="'tiny' has no refiner"):
        Segmenter(bundle, "cpu", refine=True)


def with_refiner(source: Path, path: Path, args: dict) -> Bundle:
    """``source`` with a sparse refiner of random weights and statistics."""
    torch.manual_seed(5)
    refiner = SparseRefiner(11, **args)
    with torch.no_grad():
        for tensor in refiner.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.2 * torch.randn_like(tensor).clamp(-2, 2))
    bundle = copy_dense(Bundle.load(source), path)
    replace(bundle, refiner=save_network(path, refiner, "sparserefine", args, "refiner.safetensors")).save()
    return Bundle.load(path)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_a_mask_does_not_depend_on_the_frames_beside_it(tiny_bundle: Path, tmp_path: Path, backend: str) -> None:
    """Also with "dilate", which bounds the coarse sites of a batch by the largest site of any of its images."""
    args = {"channels": [8, 8, 8], "blocks": 1, "ensembler": "direct"}
    segmenter = Segmenter(with_refiner(tiny_bundle, tmp_path, args), "cpu", sparse_backend=backend)
    rng = np.random.default_rng(2)
    images = [rng.integers(0, 256, (40, 40, 3), np.uint8) for _ in range(3)]
    uncertain = torch.zeros(3, 20, 20, dtype=torch.bool)
    uncertain[0, :6, :6] = uncertain[2, :15, 3:] = True  # nothing in the second
    image, row, column = torch.meshgrid(torch.arange(3), torch.arange(20), torch.arange(20), indexing="ij")

    def dense(of: list[int]) -> Callable[[torch.Tensor], torch.Tensor]:
        logits = torch.zeros(3, 11, 20, 20).scatter_(1, ((image + row + column) % 11)[:, None], 20.0)
        return lambda _: torch.where(uncertain[:, None], 0.0, logits)[of]

    segmenter.dense = dense([0, 1, 2])  # type: ignore[assignment]
    together = segmenter.segment(images)
    assert [round(result.density * 1600) for result in together] == [144, 0, 30 * 34]
    for index, result in enumerate(together):
        segmenter.dense = dense([index])  # type: ignore[assignment]
        alone = segmenter.segment([images[index]])[0]
        np.testing.assert_array_equal(result.mask, alone.mask)
        assert np.abs(result.confidence.astype(int) - alone.confidence).max() <= 1


def test_an_ensembler_that_needs_labels_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = with_refiner(tiny_bundle, tmp_path, {"channels": [8], "blocks": 1, "ensembler": "oracle"})
    with pytest.raises(BundleError, match="is oracle, which needs labels"):
        Segmenter(bundle, "cpu")


def test_images_that_the_dense_segmenter_does_not_take_cost_the_frame(tiny_bundle: Path, frame: np.ndarray) -> None:
    segmenter = Segmenter(Bundle.load(tiny_bundle), "cpu")
    segmenter.dense = torch.nn.Conv2d(3, 11, 7)  # as a SegFormer's first layer, without padding
    with pytest.raises(FrameError, match="'tiny' fails on images of 4x8: .*[kK]ernel size.*a scale that make a size"):
        segmenter.segment([frame[:8, :16]])
    segmenter.dense = torch.nn.GroupNorm(3, 3)  # whose check is a ValueError
    with pytest.raises(FrameError, match="'tiny' fails on images of 1x1: Expected more than 1 value"):
        segmenter.segment([frame[:1, :1]])

    def full(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    segmenter.dense = full  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="can't allocate memory"):  # the node has an answer to that
        segmenter.segment([frame])


def test_command_says_what_it_could_not_write(
    tiny_bundle: Path, frame: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / name / "1.png" for name in ("left", "right")]
    for file in files:
        file.parent.mkdir()
        cv2.imwrite(str(file), frame[..., ::-1])
    words = ["segment", *map(str, files), "--model", str(tiny_bundle), "--output"]
    assert main([*words, str(tmp_path / "out")]) == 2
    assert "several images are called 1 but for folder or ending" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    del words[2]
    assert main([*words, str(tmp_path / "out")]) == 0
    assert f"-> {tmp_path / 'out' / '1_mask.png'}" in capsys.readouterr().out
    found = cv2.imread(str(tmp_path / "out" / "1_mask.png"), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(found, Segmenter(Bundle.load(tiny_bundle), "cpu").segment([frame])[0].mask)
    (tmp_path / "full" / "1_mask.png").mkdir(parents=True)
    for folder in ("full", "left/1.png"):
        assert main([*words, str(tmp_path / folder)]) == 2
        assert folder in capsys.readouterr().err


def test_a_picture_that_cannot_be_read_or_segmented_costs_itself(
    tiny_bundle: Path,
    frame: np.ndarray,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check = segmenter_module._check_image

    def no_pixel_alone(image: np.ndarray) -> None:
        check(image)
        if image.size == 3:
            raise FrameError("the dense segmenter fails on images of 1x1")

    monkeypatch.setattr(segmenter_module, "_check_image", no_pixel_alone)
    files = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    for file in files:
        cv2.imwrite(str(file), frame[..., ::-1])
    files[1].write_text("no picture")
    files.append(tmp_path / "tiny.png")
    cv2.imwrite(str(files[3]), frame[:1, :1])
    words = [
        "segment",
        *map(str, files),
        "--model",
        str(tiny_bundle),
        "--device",
        "cpu",
        "--output",
        str(tmp_path / "o"),
    ]
    assert main([*words, "--entropy-threshold", "auto", "--scale", "0.25"]) == 2
    said = capsys.readouterr().err
    assert "cannot decode" in said and f"{files[3]}: the dense segmenter" in said
    assert {file.name for file in (tmp_path / "o").glob("*_mask.png")} == {"a_mask.png", "c_mask.png"}
    low = Segmenter(Bundle.load(tiny_bundle), "cpu", scale=0.25).segment([frame])[0]
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "o" / "a_mask.png"), cv2.IMREAD_UNCHANGED), low.mask)
    assert main([*words[:2], str(tmp_path / "nowhere.png"), *words[2:]]) == 2
    assert "there is no " in (said := capsys.readouterr().err) and "nowhere.png" in said and "decode" not in said


def test_frames_unlike_the_bundles_are_told_once(
    tiny_bundle: Path, frame: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = Bundle.load(tiny_bundle)
    assert bundle.native_size == frame.shape[:2]
    large = frame.repeat(2, 0).repeat(2, 1)
    segmenter = Segmenter(bundle, "cpu", refine=False)
    segmenter.segment([frame])
    segmenter.segment([np.ascontiguousarray(frame[:50])])  # a little smaller
    Segmenter(bundle, "cpu", refine=False, scale=0.5).segment([large])  # who names a scale has thought of it
    assert not caplog.text
    for _ in range(2):
        segmenter.segment([large])
    height, width = frame.shape[:2]
    assert [record.getMessage() for record in caplog.records] == [
        f"frames are {2 * width}x{2 * height}, and 'tiny' was made for {width}x{height}: masks may be much worse; try "
        f"scale {bundle.scale / 2:.2g}"
    ]
