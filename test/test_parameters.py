"""The parameter table: what it lets in, and that everything that shows parameters reads it."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sparserefine_ros.errors import BundleError, ParameterError, is_out_of_memory
from sparserefine_ros.node import model, parameters
from sparserefine_ros.node.model import load_segmenter
from sparserefine_ros.node.parameters import AUTO, BY_NAME, PARAMETERS, Value
from sparserefine_ros.segmenter.bundle import DECODERS, Bundle

ROOT = Path(__file__).resolve().parents[1]


def defaults(**changes: Value) -> dict[str, Value]:
    return {p.name: p.default for p in PARAMETERS} | changes


def test_every_default_fits_and_every_parameter_is_described():
    assert len(BY_NAME) == len(PARAMETERS)
    for p in PARAMETERS:
        assert p.check(p.default) == p.default
        assert len(p.description) > 20 and p.values


def test_decoders_are_those_of_the_bundles():
    assert BY_NAME["decoder"].choices == (AUTO, *DECODERS)


@pytest.mark.parametrize(
    ("name", "given_value", "expected"),
    [
        ("entropy_threshold", "auto", "auto"),
        ("entropy_threshold", 0.4, 0.4),
        ("entropy_threshold", 1, 1.0),
        ("entropy_threshold", "0.4", 0.4),
        ("entropy_threshold", 0.0, 0.0),
        ("refine", True, "true"),
        ("refine", False, "false"),
        ("refine", "auto", "auto"),
        ("threads", 4, 4),
        ("threads", "4", 4),
        ("threads", 4.0, 4),
        ("overlay_opacity", 1, 1.0),
        ("device", "cuda:1", "cuda:1"),
        ("model", "a folder/with spaces", "a folder/with spaces"),
        ("cameras", None, []),
        (
            "cameras",
            ["front", "/camera/*/image_raw", "rig/left", "*"],
            ["front", "/camera/*/image_raw", "rig/left", "*"],
        ),
    ],
)
def test_good_values_take_the_parameters_type(name, given_value, expected):
    result = BY_NAME[name].check(given_value)
    assert result == expected and type(result) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("entropy_threshold", -0.01, ["-0.01", "auto, 0 to 5.5413"]),
        ("entropy_threshold", 5.6, ["5.6"]),
        ("entropy_threshold", math.nan, ["nan"]),
        ("entropy_threshold", math.inf, ["inf"]),
        ("entropy_threshold", "high", ["'high'", "auto"]),
        ("entropy_threshold", True, ["True"]),
        ("refine", "yes", ["'yes'", "auto, true, false"]),
        ("refine", 1, ["1", "auto, true, false"]),
        ("decoder", "offset", ["'offset'", "sparserefine", "dense"]),
        ("decoder", True, ["True"]),
        ("device", "gpu", ["'gpu'", "cuda:N"]),
        ("device", "cuda:x", ["'cuda:x'"]),
        ("model", "", ["''", "a name or a folder"]),
        ("model", " ", ["' '"]),
        ("threads", 1.5, ["1.5", "0 to 256"]),
        ("threads", 257, ["257"]),
        ("threads", False, ["False"]),
        ("qos_depth", 0, ["0", "1 to 1000"]),
        ("overlay_opacity", [0.5], ["[0.5]"]),
        ("overlay_opacity", None, ["None"]),
        ("precision", "fp8", ["'fp8'", "fp32, fp16, bf16"]),
        ("cameras", ["front", "front"], ["['front', 'front']", "each once"]),
        ("cameras", ["2nd"], ["['2nd']", "names (front)"]),
        ("cameras", ["a//b"], ["['a//b']"]),
        ("cameras", "front", ["'front'", "list of names"]),
    ],
)
def test_bad_values_are_named_with_the_remedy(name, value, words):
    with pytest.raises(ParameterError) as error:
        BY_NAME[name].check(value)
    for word in [f"'{name}'", *words]:
        assert word in str(error.value)


ANYTHING = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers()) | st.binary()


@given(st.sampled_from(PARAMETERS), ANYTHING)
def test_check_gives_a_fitting_value_or_a_parameter_error(parameter, value):
    try:
        result = parameter.check(value)
    except ParameterError:
        return
    assert parameter.check(result) == result
    if isinstance(result, float | int):
        assert parameter.minimum <= result <= parameter.maximum
    if parameter.choices:
        assert result in parameter.choices


def test_table_needs_no_ros():
    code = "import sys; import sparserefine_ros.node.parameters; print('rclpy' in sys.modules, 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


def test_parameter_file_is_the_table(capsys):
    assert parameters.main(["--yaml"]) == 0
    text = (ROOT / "config" / "segment.yaml").read_text()
    assert capsys.readouterr().out == text, "run python -m sparserefine_ros.node.parameters --yaml"
    values = yaml.safe_load(text)["/**"]["ros__parameters"]
    assert {name: BY_NAME[name].check(value) for name, value in values.items()} == defaults()


def test_markdown_has_a_row_for_each_parameter(capsys):
    assert parameters.main([]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 + len(PARAMETERS)
    for row, p in zip(rows[2:], PARAMETERS, strict=True):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells == [f"`{p.name}`", f"`{p.default}`", p.values, "yes" if p.live else "no", p.description]


def test_unknown_option_is_refused(capsys):
    assert parameters.main(["--html"]) == 2
    assert "usage" in capsys.readouterr().err


def test_descriptors_carry_the_table():
    pytest.importorskip("rclpy")
    from sparserefine_ros.node.declare import descriptor

    threshold = descriptor(BY_NAME["entropy_threshold"])
    assert threshold.dynamic_typing
    assert (threshold.floating_point_range[0].from_value, threshold.floating_point_range[0].to_value) == (0.0, 5.5413)
    depth = descriptor(BY_NAME["qos_depth"])
    assert (depth.integer_range[0].from_value, depth.integer_range[0].to_value) == (1, 1000)
    queue = descriptor(BY_NAME["queue"])
    assert descriptor(BY_NAME["cameras"]).dynamic_typing, "an empty list has no type in ROS"
    assert queue.additional_constraints == "newest, all" and not queue.dynamic_typing


@pytest.mark.parametrize(
    ("changes", "refines"),
    [
        ({}, True),
        ({"decoder": "sparserefine"}, True),
        ({"decoder": "dense"}, False),
        ({"decoder": "dense", "refine": "true"}, True),
        ({"decoder": "sparserefine", "refine": "false"}, False),
    ],
)
def test_decoder_and_refine_choose_the_refiner(tiny_bundle, changes, refines):
    segmenter = load_segmenter(defaults(model=str(tiny_bundle), device="cpu", **changes))
    assert segmenter.refines is refines


def test_threads_of_one_life_are_not_those_of_the_next(tiny_bundle: Path) -> None:
    """0 is what torch takes by itself, also after another number."""
    before = torch.get_num_threads()
    try:
        for asked, taken in ((0, before), (3, 3), (0, before)):
            load_segmenter(defaults(model=str(tiny_bundle), device="cpu", threads=asked))
            assert torch.get_num_threads() == taken
    finally:
        torch.set_num_threads(before)


def test_numbers_reach_the_segmenter(tiny_bundle):
    segmenter = load_segmenter(defaults(model=str(tiny_bundle), entropy_threshold=0.25, scale=1.0))
    assert (segmenter.entropy_threshold, segmenter.scale) == (0.25, 1.0)
    segmenter = load_segmenter(defaults(model=str(tiny_bundle)))
    bundle = Bundle.load(tiny_bundle)
    assert (segmenter.entropy_threshold, segmenter.scale) == (bundle.entropy_threshold, bundle.scale)


def test_decoder_and_model_must_agree(tiny_bundle, tmp_path):
    dense = tmp_path / "dense"
    dense.mkdir()
    (dense / "dense.safetensors").write_bytes((tiny_bundle / "dense.safetensors").read_bytes())
    data = yaml.safe_load((tiny_bundle / "model.yaml").read_text())
    (dense / "model.yaml").write_text(yaml.safe_dump(data | {"refiner": None}))
    assert load_segmenter(defaults(model=str(dense))).refines is False
    with pytest.raises(BundleError) as error:
        load_segmenter(defaults(model=str(dense), decoder="sparserefine"))
    for word in ("'sparserefine'", "serves dense", str(dense)):
        assert word in str(error.value)
    with pytest.raises(BundleError, match="refine"):
        load_segmenter(defaults(model=str(dense), refine="true"))


def test_out_of_memory_is_told_from_other_errors():
    class OutOfMemoryError(RuntimeError):
        """Named as torch names it."""

    assert is_out_of_memory(OutOfMemoryError())
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    tegra = 'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/pytorch/c10/cuda/CUDACachingAllocator.cpp":838'
    assert is_out_of_memory(RuntimeError(tegra))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_out_of_memory(RuntimeError("out of resource: shared memory, Required: 196608"))


def test_the_readme_shows_the_table() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    shown = readme.split("<!-- parameters: start -->\n")[1].split("<!-- parameters: end -->")[0]
    assert shown == parameters.markdown().rstrip("\n") + "\n", "run: python -m sparserefine_ros.node.parameters"


@pytest.mark.parametrize(
    ("device", "runtime", "values", "batches"),
    [
        ("cpu", "torch", {}, [1]),
        ("cpu", "torch", {"cameras": ["front", "left"]}, [1]),
        ("cpu", "torch_compile", {"cameras": ["front", "left"], "max_batch": 2}, [1, 2]),
        ("cuda", "torch", {}, [1, 1, 1]),
        ("cuda", "torch", {"cameras": ["front", "left"], "max_batch": 2}, [1, 1, 1, 2, 2, 2]),
        ("cuda", "torch", {"cameras": ["/camera/*/image_raw"], "max_batch": 64}, [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]),
    ],
)
def test_warming_up_runs_what_frames_will(
    monkeypatch: pytest.MonkeyPatch, device: str, runtime: str, values: dict[str, Any], batches: list[int]
) -> None:
    """With a selection that is denser than frames' are, so that what grows has grown."""
    seen: list[int] = []

    class Segmenter:
        bundle = SimpleNamespace(native_size=(40, 60))

        def __init__(self) -> None:
            self.device, self.runtime = SimpleNamespace(type=device), runtime

        def segment(self, images: list[np.ndarray], choose: Any) -> None:
            assert all(image.shape == (40, 60, 3) for image in images)
            entropies = np.linspace(0, 1, 1001, dtype=np.float32)
            assert (entropies > choose(entropies, 2400)).mean() == pytest.approx(0.3, abs=0.002)
            seen.append(len(images))

    monkeypatch.setattr(model, "load_segmenter", lambda values, announce: Segmenter())
    announced: list[str] = []
    model.start_segmenter({**defaults(), **values}, announced.append)
    assert seen == batches and announced == ["warming up"]
