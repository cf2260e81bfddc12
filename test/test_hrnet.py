"""HRNet: its exchanges written out, any image size, its weights under mmseg's names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparserefine_ros.datasets.classes import CAMVID
from sparserefine_ros.networks.hrnet import MODULES, HRModule, HRNet
from sparserefine_ros.segmenter.bundle import Bundle, load_network
from sparserefine_ros.segmenter.dense import fold_batch_norm
from sparserefine_ros.segmenter.importing import import_checkpoint, rename
from sparserefine_ros.segmenter.mmseg_names import ARCHITECTURES


def randomise(module: torch.nn.Module) -> None:
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif tensor.ndim == 1 and tensor.is_floating_point():
            tensor.normal_(0.5, 0.2)


def mmseg_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An HRNet's weights under mmseg's names."""
    renamed = {}
    for key, tensor in state.items():
        words = key.split(".")
        if words[0] == "stem":
            name = f"backbone.{('conv', 'bn')[int(words[2])]}{int(words[1]) + 1}.{words[3]}"
        elif words[0] == "transitions":
            stage, branch = int(words[1]), int(words[2])
            nested = "0." if branch == stage + 1 else ""
            name = f"backbone.transition{stage + 1}.{branch}.{nested}{words[3]}.{words[4]}"
        elif words[0] == "head":
            name = f"decode_head.convs.0.{('conv', 'bn')[int(words[1])]}.{words[2]}"
        elif words[0] == "classifier":
            name = f"decode_head.conv_seg.{words[1]}"
        else:
            name = re.sub(r"^stages\.(\d)", lambda m: f"stage{int(m[1]) + 2}", key).replace("fuse.", "fuse_layers.")
            name = re.sub(r"\.conv(\d)\.0\.", r".conv\1.", name)
            name = "backbone." + re.sub(r"\.conv(\d)\.1\.", r".bn\1.", name).replace("shortcut", "downsample")
        renamed[name] = tensor
    return renamed


def test_every_branch_becomes_the_sum_of_all() -> None:
    torch.manual_seed(0)
    module = HRModule((2, 4, 8)).eval()
    randomise(module)
    weights = module.state_dict()

    def conv_bn(x: Tensor, name: str, stride: int) -> Tensor:
        w = weights[f"{name}.0.weight"]
        y = F.conv2d(x, w, stride=stride, padding=w.shape[-1] // 2)
        mean, var = weights[f"{name}.1.running_mean"], weights[f"{name}.1.running_var"]
        scale = weights[f"{name}.1.weight"] / (var + 1e-5).sqrt()
        return y * scale[:, None, None] + (weights[f"{name}.1.bias"] - mean * scale)[:, None, None]

    def up(x: Tensor, factor: int) -> Tensor:
        return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)

    xs = [torch.randn(2, 2 * 2**b, 16 // 2**b, 24 // 2**b) for b in range(3)]
    with torch.inference_mode():
        a, b, c = (branch(x) for branch, x in zip(module.branches, xs, strict=True))
        expected = (
            a + up(conv_bn(b, "fuse.0.1", 1), 2) + up(conv_bn(c, "fuse.0.2", 1), 4),
            conv_bn(a, "fuse.1.0.0", 2) + b + up(conv_bn(c, "fuse.1.2", 1), 2),
            conv_bn(F.relu(conv_bn(a, "fuse.2.0.0", 2)), "fuse.2.0.1", 2) + conv_bn(b, "fuse.2.1.0", 2) + c,
        )
        for ours, wanted in zip(module(xs), expected, strict=True):
            torch.testing.assert_close(ours, F.relu(wanted))


@pytest.mark.parametrize("size", [(64, 96), (61, 97), (8, 9)])
def test_any_size_also_with_folded_batch_norm(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    net = HRNet(5, 18).eval()
    randomise(net)
    images = torch.randn(1, 3, *size)
    with torch.inference_mode():
        logits = net(images)
        folded = fold_batch_norm(net)(images)
    assert logits.shape == (1, 5, *size) and logits.isfinite().all()
    torch.testing.assert_close(folded, logits, rtol=1e-3, atol=1e-3 * float(logits.std()))
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in net.modules())  # all of them


def test_weights_of_mmseg_come_through(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = HRNet(len(CAMVID), 18).eval()
    randomise(net)
    theirs = mmseg_names(net.state_dict())
    for name in (
        "backbone.conv1.weight", "backbone.bn2.running_var", "backbone.layer1.0.downsample.1.bias",
        "backbone.layer1.3.conv3.weight", "backbone.transition1.0.0.weight", "backbone.transition1.1.0.1.weight",
        "backbone.transition3.3.0.0.weight", "backbone.stage2.0.branches.1.3.bn2.weight",
        "backbone.stage4.2.fuse_layers.0.3.1.bias", "backbone.stage4.2.fuse_layers.3.0.2.0.weight",
        "decode_head.convs.0.bn.running_mean", "decode_head.conv_seg.bias",
    ):  # fmt: skip
        assert name in theirs
    torch.save({**theirs, "auxiliary_head.conv_seg.bias": torch.zeros(1)}, tmp_path / "w.pth")
    bundle = import_checkpoint(tmp_path / "w.pth", "hrnet-w18", CAMVID, tmp_path / "mine", (64, 96))
    assert bundle.dense.network == "hrnet" and bundle.dense.args == {"width": 18}
    built = load_network(bundle.path, Bundle.load(bundle.path).dense, HRNet(len(CAMVID), 18))
    expected = net.state_dict()
    for name, tensor in built.state_dict().items():
        wanted = expected[name]
        assert torch.equal(tensor, wanted.half().to(tensor.dtype) if tensor.ndim >= 2 else wanted), name


def test_names_of_w48_and_its_exchanges() -> None:
    with torch.device("meta"):
        state = HRNet(19).state_dict()
    renamed, _ = rename(mmseg_names(state), ARCHITECTURES["hrnet-w48"])
    assert renamed.keys() == state.keys()
    assert len({key.split(".fuse.")[0] for key in state if ".fuse." in key}) == sum(MODULES)
    assert state["head.0.weight"].shape == (720, 720, 1, 1)


def test_unknown_width() -> None:
    with pytest.raises(ValueError, match="width 20; known are 18, 32, 40, 48"):
        HRNet(19, 20)
