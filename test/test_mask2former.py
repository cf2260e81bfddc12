"""Mask2Former's logits: what queries say, as classes of pixels."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from sparserefine_ros.networks.entropy import entropy
from sparserefine_ros.networks.mask2former import Mask2Former, semantic_logits

TINY: dict[str, Any] = {
    "hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "encoder_layers": 1, "decoder_layers": 4,
    "dim_feedforward": 32, "encoder_feedforward_dim": 32, "num_queries": 7, "num_attention_heads": 4,
    "backbone_config": {
        "model_type": "swin", "embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4], "window_size": 4,
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    },
}  # fmt: skip


def test_logits_are_logarithms_of_the_scores_of_all_queries() -> None:
    torch.manual_seed(0)
    classes, masks = torch.randn(2, 5, 4, dtype=torch.float64), torch.randn(2, 5, 6, 8, dtype=torch.float64)
    scores = torch.zeros(2, 3, 6, 8, dtype=torch.float64)
    for b in range(2):
        for q in range(5):
            total = sum(math.exp(float(v)) for v in classes[b, q])
            for c in range(3):
                scores[b, c] += math.exp(float(classes[b, q, c])) / total / (1 + (-masks[b, q]).exp())
    torch.testing.assert_close(semantic_logits(classes, masks, (6, 8)), scores.log().float())
    wide = F.interpolate(scores, (24, 30), mode="bilinear").log()
    torch.testing.assert_close(semantic_logits(classes, masks, (24, 30)), wide.float())


def test_entropy_of_what_queries_agree_on_dispute_and_leave_out() -> None:
    """Pixels in a row: one class claims it, two do, two do weakly, nobody does."""
    classes = torch.tensor([[[50.0, 0, 0, 0], [0, 50.0, 0, 0], [0, 0, 0, 50.0]]])  # [1, 3 queries, 3 classes and none]
    low = -12.0  # a sigmoid of 6e-6, still far above the floor
    masks = torch.tensor([[[50, 50, low, -50], [-50, 50, low, -50], [50.0] * 4]])[:, :, None]  # [1, 3, 1, 4]
    logits = semantic_logits(classes, masks, (1, 4))
    expected = torch.tensor([[0.0, math.log(2), math.log(2), math.log(3)]])
    torch.testing.assert_close(entropy(logits.softmax(1), 1)[0], expected, atol=1e-3, rtol=0)
    assert float(logits.min()) == pytest.approx(math.log(1e-10))
    assert float(logits[0, :, 0, 3].max()) == pytest.approx(math.log(1e-10))  # "none" is no class


@pytest.mark.parametrize("size", [(64, 96), (37, 61), (5, 40)])
def test_any_size_and_repeatable(size: tuple[int, int]) -> None:
    pytest.importorskip("transformers", "5.23")
    torch.manual_seed(0)
    net = Mask2Former(11, config=TINY).eval()
    images = torch.randn(2, 3, *size)
    with torch.inference_mode():
        logits = net(images)
        assert torch.equal(net(images), logits)
        one = net(images[1:])
    assert logits.shape == (2, 11, *size) and logits.isfinite().all()
    torch.testing.assert_close(one[0], logits[1], rtol=1e-4, atol=1e-4)  # images of a batch know nothing of each other


def test_unknown_size_and_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="size 'x'; known are t, l"):
        Mask2Former(19, "x")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="pip install .transformers"):
        Mask2Former(19)
