"""A model.yaml shapes a network of transformers; it neither asks the hub for anything nor names code to be run."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from sparserefine_ros.errors import BundleError
from sparserefine_ros.networks.registry import DENSE, build
from sparserefine_ros.segmenter.bundle import construct


def swin(**more: Any) -> dict[str, Any]:
    return {"backbone_config": {"model_type": "swin", **more}}


@pytest.mark.parametrize(
    ("network", "config", "message"),
    [
        ("mask2former", {"backbone": "owner/swin"}, "config has 'backbone'; it may have feature_size"),
        ("mask2former", {"attn_implementation": "owner/kernel"}, "config has 'attn_implementation'"),
        ("mask2former", {"backbone_config": {"model_type": "bert"}}, "model_type 'bert'; write swin"),
        ("mask2former", {"backbone_config": {"model_type": "timm_backbone", "backbone": "x"}}, "has 'backbone'"),
        ("mask2former", {"backbone_config": {"embed_dim": 8}}, "model_type None; write swin"),
        ("mask2former", swin(auto_map={}), "has 'auto_map'"),
        ("mask2former", {"backbone_config": None}, "backbone_config is None; give a mapping"),
        ("mask2former", swin(use_absolute_embeddings=True), "has 'use_absolute_embeddings'"),
        # tables of 65 GB, of 10^19 pairs, and of none
        ("mask2former", swin(window_size=300), "window_size is 300; .* to 32"),
        ("mask2former", swin(window_size=65536), "window_size is 65536; give"),
        ("mask2former", swin(window_size=0), "window_size is 0; give"),
        ("mask2former", "t", "config is 't'; give a mapping of"),
        ("segformer-hub", {"_attn_implementation": "owner/kernel"}, "config has '_attn_implementation'"),
        ("segformer-hub", {"depths": [1], "quantization_config": {}}, "config has 'quantization_config'"),
        ("segformer-hub", [], r"config is \[\]; give a mapping of"),
    ],
)
def test_other_settings_are_refused(network: str, config: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # refused before it is asked
    with pytest.raises(BundleError, match=f"^model.yaml: .*{message}"):
        construct(lambda: build(DENSE, network, 3, {"config": config}), {"config": config}, {}, "model.yaml")
