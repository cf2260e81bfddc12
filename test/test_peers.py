"""`bench peers` and `bench pruning`: rows that can be compared, each what its own segmenter gives."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sparserefine_ros.benchmarks import peers, pruning
from sparserefine_ros.cli import main
from sparserefine_ros.datasets import splits
from sparserefine_ros.datasets.base import Sample
from sparserefine_ros.datasets.classes import CAMVID
from sparserefine_ros.errors import ParameterError
from sparserefine_ros.evaluation.compare import HR, LR, REFINED
from sparserefine_ros.networks.mask2former import Mask2Former
from sparserefine_ros.networks.pointrend import PointRend
from sparserefine_ros.networks.registry import REFINERS, build
from sparserefine_ros.segmenter.bundle import Bundle, save_network
from sparserefine_ros.segmenter.segmenter import Segmenter
from sparserefine_ros.training.bundle import copy_dense


@pytest.fixture
def samples(frame: np.ndarray) -> list[Sample]:
    rng = np.random.default_rng(0)
    images = [np.ascontiguousarray(np.roll(frame, 7 * i, 1)) for i in range(4)]
    return [Sample(image, rng.integers(0, 11, (64, 96), np.uint8), str(i), i) for i, image in enumerate(images)]


@pytest.fixture
def pointrend(tiny_bundle: Path, tmp_path: Path) -> Bundle:
    args = {"features": 16, "hidden": 8, "points": 0.05}
    torch.manual_seed(3)
    head = PointRend(11, **args)
    nn.init.normal_(head.predictor.weight)
    bundle = copy_dense(Bundle.load(tiny_bundle), tmp_path / "pointrend")
    replace(bundle, refiner=save_network(bundle.path, head, "pointrend", args, "refiner.safetensors")).save()
    return Bundle.load(bundle.path)


def test_rows_of_peers(
    tiny_bundle: Path,
    samples: list[Sample],
    pointrend: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(splits, "load_split", lambda *_: (CAMVID, samples))
    command = ["bench", "peers", str(tiny_bundle), "--pointrend", str(pointrend.path), "--patches", "16", "96"]
    options = ["--patch-densities", "0", "0.5", "--device", "cpu", "--json", str(tmp_path / "t.json")]
    assert main([*command, *options]) == 0
    table = json.loads((tmp_path / "t.json").read_text())
    rows = table["rows"]
    fine, part = peers.patches_name(16, 0.0), peers.patches_name(16, 0.5)
    assert part == "LR + patches of 16, over 50 % selected"
    names = [HR, LR, REFINED, peers.BILATERAL, peers.REPEAT, peers.POINTREND, peers.POINTREND_SELECTED, fine, part]
    assert names == list(rows)[:9]
    assert f"| {part} | " in capsys.readouterr().out and len(rows) == 11
    segmenter = Segmenter(Bundle.load(tiny_bundle), "cpu", refine=False)
    entropies = [segmenter.segment([s.image])[0].entropy for s in samples]
    selected = np.mean([(e > 1.0).mean() for e in entropies])
    tiles = np.concatenate([(e > 1.0).reshape(4, 16, 6, 16).mean((1, 3)).ravel() for e in entropies])
    for name in (REFINED, peers.BILATERAL, peers.REPEAT, peers.POINTREND_SELECTED):
        assert rows[name]["density"] == pytest.approx(selected)
    assert rows[peers.POINTREND]["density"] == pytest.approx(2 * round(0.05 * 64 * 96) / (64 * 96))
    assert rows[fine]["density"] == pytest.approx((tiles > 0).mean())
    assert (
        rows[part]["density"] == pytest.approx((tiles > 0.5).mean()) and rows[part]["density"] < rows[fine]["density"]
    )
    whole = rows[peers.patches_name(96, 0.0)]
    assert whole["agreement"] == 1 and whole["miou"] == rows[HR]["miou"]  # one patch over all
    assert whole["macs_g"] == pytest.approx(rows[HR]["macs_g"] + rows[LR]["macs_g"])
    per_point = 8 * (16 + 11) + 2 * 8 * (8 + 11) + 11 * (8 + 11)
    assert rows[peers.POINTREND]["macs_g"] * 1e9 == pytest.approx(
        rows[LR]["macs_g"] * 1e9 + per_point * 2 * round(0.05 * 64 * 96)
    )
    assert "recall" in rows[REFINED] and "recall" not in rows[fine]


def test_a_trained_repetition_is_a_row_of_its_own(tiny_bundle: Path, samples: list[Sample], tmp_path: Path) -> None:
    bundle = copy_dense(Bundle.load(tiny_bundle), tmp_path)
    args = {"own": {"network": bundle.dense.network, "args": bundle.dense.args}}
    torch.manual_seed(4)
    trained = build(REFINERS, "repeat", len(bundle.classes), args)
    bundle = replace(bundle, refiner=save_network(tmp_path, trained, "repeat", args, "refiner.safetensors"))
    rows = peers.measure(bundle, samples, patches=(), device="cpu", threshold=0.5)["rows"]
    assert list(rows) == [HR, LR, "LR + repeat", peers.BILATERAL, peers.REPEAT]
    hr = Segmenter(bundle, "cpu", refine=False, scale=1.0)
    untrained = save_network(tmp_path, build(REFINERS, "repeat", 11, {}), "repeat", {}, "untrained.safetensors")
    for name, one in (("LR + repeat", bundle), (peers.REPEAT, replace(bundle, refiner=untrained))):
        segmenter = Segmenter(one, "cpu", entropy_threshold=0.5)
        same = [segmenter.segment([s.image])[0].mask == hr.segment([s.image])[0].mask for s in samples]
        assert rows[name]["agreement"] == pytest.approx(np.mean(same))
    assert rows["LR + repeat"]["agreement"] < rows[peers.REPEAT]["agreement"]  # it was given other weights


def test_logits_must_be_the_same(tiny_bundle: Path, samples: list[Sample], pointrend: Bundle) -> None:
    bundle = Bundle.load(tiny_bundle)
    with pytest.raises(ParameterError, match="'tiny' has no refiner pointrend"):
        peers.measure(bundle, samples, bundle)
    with pytest.raises(ParameterError, match="differ in temperature: 1.0 and 2.0.*bundle: tiny"):
        peers.measure(bundle, samples, replace(pointrend, temperature=2.0))


def test_pruning_is_measured_beside_the_whole_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("transformers", "5.23")
    config = {
        "hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "encoder_layers": 1, "decoder_layers": 2,
        "dim_feedforward": 32, "encoder_feedforward_dim": 32, "num_queries": 7, "num_attention_heads": 4,
        "backbone_config": {
            "model_type": "swin", "embed_dim": 16, "depths": [2, 1, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 4,
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
    }  # fmt: skip
    monkeypatch.setattr(pruning, "Mask2Former", lambda k, _, keep: Mask2Former(k, config=config, keep=keep))
    arguments = ["--size", "64x64", "--keep", "0.5", "1", "1", "1", "--device", "cpu", "--repeats", "1"]
    assert main(["bench", "pruning", *arguments, "--json", str(tmp_path / "t.json")]) == 0
    whole, pruned = json.loads((tmp_path / "t.json").read_text())["rows"]
    window = 16 * 12 * 16 * 16 + 2 * 16 * 16 * 16  # multiply-adds of one: 16 tokens of 16 channels
    skipped = 2 * 8 * window / 1e9  # half of 16 windows, in both blocks of stage 1
    assert whole["keep"] == [1] * 4 and whole["ratio"] == 1
    assert pruned["swin_gmac"] == pytest.approx(whole["swin_gmac"] - skipped)
    assert pruned["gmac"] == pytest.approx(whole["gmac"] - skipped)
    for bad in (["--repeats", "0"], ["--keep", "2", "1", "1", "1"]):
        assert main(["bench", "pruning", *arguments, *bad]) != 0
