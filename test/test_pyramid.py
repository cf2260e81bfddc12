"""The feature pyramid against its equation, and timm's models as encoders.

CI has no timm; a stand-in shows what is asked of it. Where timm is installed, its own models run too.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from sparserefine_ros.errors import TrainingError
from sparserefine_ros.networks.backbones import extend
from sparserefine_ros.networks.pyramid import PyramidSegmenter
from sparserefine_ros.networks.registry import DENSE, build
from sparserefine_ros.training.pretrained import start_encoder


def test_the_pyramid_is_its_equation() -> None:
    """Levels of strides 4, 8 and 16, from the coarsest down; an odd size is extended by its edge and cut back."""
    torch.manual_seed(0)
    network = PyramidSegmenter(5, width=8).double().eval()
    images = torch.randn(2, 3, 41, 60, dtype=torch.float64)
    padded = torch.cat([images, images[:, :, -1:].expand(-1, -1, 7, -1)], 2)
    padded = torch.cat([padded, padded[..., -1:].expand(-1, -1, -1, 4)], 3)
    assert torch.equal(extend(images, 16), padded)
    with torch.no_grad():
        _, x4, x8, x16 = network.encoder(padded)

        def conv(level: int, x: Tensor) -> Tensor:
            return F.relu(network.fuse[level][1](F.conv2d(x, network.fuse[level][0].weight, padding=1)))

        def lateral(level: int, x: Tensor) -> Tensor:
            weight = network.laterals[level].weight[..., 0, 0]
            return torch.einsum("oc,bchw->bohw", weight, x) + network.laterals[level].bias[:, None, None]

        def twice(x: Tensor) -> Tensor:
            return F.interpolate(x, scale_factor=2, mode="bilinear")

        y = conv(2, lateral(2, x16))
        y = conv(1, lateral(1, x8) + twice(y))
        y = conv(0, lateral(0, x4) + twice(y))
        expected = F.interpolate(network.classifier(y), scale_factor=4, mode="bilinear")[..., :41, :60]
        torch.testing.assert_close(network(images), expected, rtol=0, atol=1e-12)


def test_the_finest_level_is_chosen_by_stride() -> None:
    assert len(PyramidSegmenter(3, width=8, stride=2).laterals) == 4
    with pytest.raises(ValueError, match="stride 32 is coarser than all of backbone 'compact'; its strides are 2, 4"):
        PyramidSegmenter(3, stride=32)
    with pytest.raises(ValueError, match="unknown backbone 'resnet'; known are compact.* and timm/MODEL"):
        PyramidSegmenter(3, backbone="resnet")


class Tiny(nn.Module):
    """As timm's models with features_only=True: strides 2 and 4."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 6, 2, 2)
        self.feature_info = SimpleNamespace(channels=lambda: [4, 6], reduction=lambda: [2, 4])

    def forward(self, x: Tensor) -> list[Tensor]:
        a = self.a(x)
        return [a, self.b(a)]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in for timm that knows one model; what is asked of it."""
    calls: list[dict[str, Any]] = []

    def create_model(name: str, **arguments: Any) -> Tiny:
        calls.append({"name": name, **arguments})
        model = Tiny()
        if file := arguments.get("checkpoint_path") or arguments.get("pretrained_cfg_overlay", {}).get("file"):
            from safetensors.torch import load_file

            model.load_state_dict(load_file(file))
        return model

    timm: Any = ModuleType("timm")
    timm.__version__, timm.is_model, timm.create_model = "1", lambda name: name == "tiny.a1_in1k", create_model
    monkeypatch.setitem(sys.modules, "timm", timm)
    return calls


def test_timm_is_asked_for_features_and_for_no_download(asked: list[dict[str, Any]]) -> None:
    network = build(DENSE, "pyramid", 5, {"backbone": "timm/tiny.a1_in1k", "width": 8}).eval()
    assert asked == [{"name": "tiny.a1_in1k", "pretrained": False, "features_only": True}]
    assert (network.encoder.channels, network.encoder.strides, network.used) == ((4, 6), (2, 4), [1])
    assert network(torch.zeros(1, 3, 9, 10)).shape == (1, 5, 9, 10)


@pytest.mark.parametrize("name", ["hf-hub:timm/resnet18", "local-dir:x", "../x", "nonsense", ""])
def test_only_names_that_timm_lists(name: str, asked: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="timm 1 has no model"):
        build(DENSE, "pyramid", 5, {"backbone": f"timm/{name}"})
    assert not asked


def test_without_timm_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="backbone 'timm/resnet18' needs timm, and a torchvision that fits torch"):
        build(DENSE, "pyramid", 5, {"backbone": "timm/resnet18"})


def test_an_encoder_of_timm_starts_from_its_file(tmp_path: Path, asked: list[dict[str, Any]]) -> None:
    network = build(DENSE, "pyramid", 5, {"backbone": "timm/tiny.a1_in1k", "width": 8})
    published = Tiny()
    save_file(published.state_dict(), tmp_path / "model.safetensors")
    start_encoder(network, str(tmp_path / "model.safetensors"))
    for name, value in published.state_dict().items():
        assert torch.equal(network.encoder.model.state_dict()[name], value)
    save_file({"a.weight": published.a.weight.detach()}, tmp_path / "part.safetensors")
    with pytest.raises(
        TrainingError, match="part.safetensors does not hold the weights of timm's 'tiny.a1_in1k'(?s:.*)issing"
    ):
        start_encoder(network, str(tmp_path / "part.safetensors"))
    for name in ("street", str(tmp_path / "no.safetensors"), str(tmp_path / "model.pth")):
        with pytest.raises(TrainingError, match="is no file of timm's weights; give the model.safetensors of"):
            start_encoder(network, name)


def test_a_model_of_timm_may_give_channels_last(asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    args = {"backbone": "timm/tiny.a1_in1k", "width": 8, "stride": 2}
    network, images = build(DENSE, "pyramid", 5, args).eval(), torch.randn(2, 3, 9, 10)
    expected = network(images)
    forward = Tiny.forward
    monkeypatch.setattr(Tiny, "output_fmt", "NHWC", raising=False)
    monkeypatch.setattr(Tiny, "forward", lambda self, x: [y.permute(0, 2, 3, 1) for y in forward(self, x)])
    other = build(DENSE, "pyramid", 5, args).eval()
    other.load_state_dict(network.state_dict())
    torch.testing.assert_close(other(images), expected)


def test_a_model_of_timm_for_one_size_says_so(asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Tiny, x: Tensor) -> list[Tensor]:
        raise AssertionError("Input height (12) doesn't match model (224).")

    monkeypatch.setattr(Tiny, "forward", forward)
    network = build(DENSE, "pyramid", 5, {"backbone": "timm/tiny.a1_in1k"}).eval()
    with pytest.raises(ValueError, match="timm's 'tiny.a1_in1k' does not take images of 12x12: Input height"):
        network(torch.zeros(1, 3, 9, 10))


def test_models_of_timm_itself() -> None:
    pytest.importorskip("timm", exc_type=Exception)
    for name in ("resnet18", "mobilenetv3_small_100", "convnext_atto", "mambaout_femto"):
        network = build(DENSE, "pyramid", 5, {"backbone": f"timm/{name}", "width": 8}).eval()
        with torch.no_grad():
            assert network(torch.randn(1, 3, 90, 120)).shape == (1, 5, 90, 120)
