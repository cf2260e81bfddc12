"""Checkpoints of the official release of offset learning load, are told apart and mean what they meant there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import official_names
import pytest
import torch
from official_names import Shapes, drawn
from torch import Tensor, nn

from sparserefine_ros.cli import main
from sparserefine_ros.datasets.classes import CAMVID
from sparserefine_ros.errors import BundleError
from sparserefine_ros.networks.registry import DENSE, build
from sparserefine_ros.segmenter.bundle import Bundle
from sparserefine_ros.segmenter.checkpoints import read_checkpoint
from sparserefine_ros.segmenter.importing import REPORT, Row, detect, fill, import_checkpoint, rename
from sparserefine_ros.segmenter.mmseg_names import ARCHITECTURES
from sparserefine_ros.segmenter.preprocess import normalise
from sparserefine_ros.segmenter.segmenter import Segmenter

K = len(CAMVID)
LISTS: dict[str, Callable[[str, int], Shapes]] = {
    "offseg": official_names.offseg, "segformer-ol": official_names.segformer, "segnext-ol": official_names.segnext,
}  # fmt: skip
GOLDEN = {
    "offseg-t": (
        -0.4890969332,
        -1.0217888676,
        0.8763314372,
        0.3486434036,
        -0.8970099262,
        -0.3043767694,
        0.2074326365,
        -0.1076879721,
        0.7010766862,
    ),
    "offseg-b": (
        0.9904398493,
        0.6073013629,
        -0.7909859105,
        0.8078205176,
        1.1510939147,
        -1.0425997680,
        0.0129358009,
        -0.4233209773,
        0.8823861925,
    ),
    "segformer-ol-b0": (
        -1.1632352006,
        0.3747115238,
        -1.1972024302,
        1.2001845012,
        -1.1436558318,
        0.1444420709,
        -0.4158088562,
        -0.0035945965,
        1.1355087194,
    ),
    "segnext-ol-t": (
        -1.1903089046,
        1.1203914673,
        -0.3818447349,
        0.3139852310,
        0.0341090178,
        -0.3005185299,
        0.3596306315,
        -0.2007747832,
        0.6197715539,
    ),
}
"""Every 8447th logit [K, 64, 96] of the official modules in float64, with the weights and the image of the test.

Taken once, with two stand-ins: CARAFE, which mmcv has compiled alone, by its definition, and SegNeXt's bases, drawn
anew there at every call, by the fixed ones here.
"""


def shapes(name: str) -> Shapes:
    family, _, size = name.rpartition("-")
    return LISTS[family](size, K)


def load(name: str, state: dict[str, Tensor]) -> tuple[nn.Module, list[Row]]:
    weights, rows = rename(state, ARCHITECTURES[name])
    network = ARCHITECTURES[name].network
    module: nn.Module = build(DENSE, network, K, ARCHITECTURES[name].args(weights)).double().eval()
    return module, fill(module, weights, rows, name)


@torch.no_grad()
@pytest.mark.parametrize("name", GOLDEN)
def test_logits_are_those_of_the_official_code(name: str) -> None:
    if name.startswith("segformer"):
        pytest.importorskip("transformers")
    state = drawn(shapes(name))
    assert detect(state) == name
    module, rows = load(name, state)
    assert [row.key for row in rows] == list(state)
    assert {row.note for row in rows if not row.note.startswith("not needed")} <= {"renamed", "split"}
    images = torch.from_numpy(np.random.RandomState(0).uniform(-2, 2, (1, 3, 64, 96)))
    logits = module(images).flatten()[::8447]
    torch.testing.assert_close(logits, torch.tensor(GOLDEN[name], dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_families_and_sizes_are_told_from_the_weights() -> None:
    sizes: dict[str, Iterable[str]] = {
        "offseg": official_names.OFFSEG, "segformer-ol": official_names.SEGFORMER, "segnext-ol": official_names.SEGNEXT,
    }  # fmt: skip
    for name in (f"{family}-{size}" for family, known in sizes.items() for size in known):
        state = {key: torch.empty(shape, device="meta") for key, shape in shapes(name).items()}
        assert detect(state) == name
        plain = {key: tensor for key, tensor in state.items() if "offset_learning" not in key}
        assert detect(plain) == name.replace("-ol", "")
    for width in (18, 48):
        block = torch.empty(width, width, 3, 3, device="meta")
        assert detect({f"backbone.stage2.0.branches.0.{i}.conv1.weight": block for i in range(4)}) == f"hrnet-w{width}"
    assert detect({"backbone.conv1.weight": torch.zeros(1), "backbone.block1.0.mlp.fc1.weight": torch.zeros(1)}) is None


class HistoryBuffer:
    """What mmengine's log of a training keeps a curve in."""

    def __init__(self) -> None:
        self.values = np.arange(3.0)
        self.statistics = {"mean": self.mean}
        self.last = np.float64(2)

    def mean(self) -> float:
        return float(self.values.mean())

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("the log is not to be rebuilt")


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An OffSeg-T as the training left it: with settings, log and optimizer, an average and a head for training."""
    state = {key: t.float() if t.is_floating_point() else t for key, t in drawn(shapes("offseg-t")).items()}
    state["auxiliary_head.conv_seg.bias"] = state["ema_backbone_patch_embed_0_bias"] = torch.zeros(2)
    with monkeypatch.context() as patch:
        module = ModuleType("mmengine.logging.history_buffer")
        module.HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
        for name in ("mmengine", "mmengine.logging"):
            patch.setitem(sys.modules, name, ModuleType(name))
        patch.setitem(sys.modules, module.__name__, module)
        patch.setattr(HistoryBuffer, "__module__", module.__name__)
        torch.save(
            {
                "meta": {"epoch": 1, "cfg": "model = ...", "dataset_meta": {"classes": ("road", "sky")}},
                "state_dict": state,
                "message_hub": {"log_scalars": {"train/loss": HistoryBuffer()}},
                "optimizer": {"state": {0: {"step": torch.ones(())}}, "param_groups": [{"lr": 6e-5}]},
            },
            tmp_path / "best_mIoU.pth",
        )
    return tmp_path / "best_mIoU.pth"


def test_a_checkpoint_as_training_leaves_it(checkpoint: Path, tmp_path: Path, frame: np.ndarray) -> None:
    (tmp_path / "LICENSE").write_text("Terms of the weights\n")
    words = ["import", str(checkpoint), "--classes", "camvid", "--name", "mine", "--models", str(tmp_path)]
    assert main([*words, "--native-size", "64x96"]) == 0
    bundle = Bundle.load(tmp_path / "mine")
    assert bundle.provenance["imported_as"] == "offseg-t" and "Terms of the weights" in bundle.provenance["licence"]
    report = (bundle.path / REPORT).read_text().splitlines()
    assert len(report) == len(shapes("offseg-t")) + 2
    assert "auxiliary_head.conv_seg.bias -> - (not needed: used in training only)" in report
    assert any(line.startswith("ema_backbone_patch_embed_0_bias -> - (not needed") for line in report)
    module, _ = load("offseg-t", read_checkpoint(checkpoint).weights)
    result = Segmenter(bundle, "cpu").segment([frame])[0]
    with torch.no_grad():
        logits = module(normalise(torch.from_numpy(frame)[None]).double())[0]
    assert (result.mask == logits.argmax(0).numpy()).mean() > 0.97  # weights are stored in half precision


def test_what_is_missing_or_left_over_is_named(tmp_path: Path) -> None:
    whole = drawn(shapes("offseg-t"))

    def attempt(state: dict[str, Tensor], message: str, network: str | None = None) -> None:
        torch.save(state, tmp_path / "w.pth")
        with pytest.raises(BundleError, match=message):
            import_checkpoint(tmp_path / "w.pth", network, CAMVID, tmp_path / "mine", (64, 96))
        assert not (tmp_path / "mine").exists()

    head = "decode_head.offset_learning."
    without = {key: tensor for key, tensor in whole.items() if key != f"{head}cls_repr"}
    attempt(without, r"as offseg-t .*: 0 weights left over; 1 weights missing \(classifier.embeddings\)")
    extra = {f"{head}extra": torch.zeros(1)}
    attempt(whole | extra, rf"1 weights left over \({head}extra\); 0 weights missing", "offseg-t")
    attempt(whole, "weights left over .*weights missing .*", "offseg-b")
    renamed = {key.replace("backbone.", "encoder."): tensor for key, tensor in whole.items()}
    attempt(renamed, r"cannot tell .* give --network, one of hrnet-w18, .*segnext-ol-l")
    attempt({}, "cannot tell")
