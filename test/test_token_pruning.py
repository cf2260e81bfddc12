"""Windows that Swin skips: with all kept nothing changes, pruned ones pass as they are, the others as if alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from sparserefine_ros.networks.macs import dense_macs
from sparserefine_ros.networks.mask2former import Mask2Former
from sparserefine_ros.networks.token_pruning import merge, partition, prune_windows

SWIN = {
    "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4, "patch_size": 4, "drop_path_rate": 0.0,
    "out_features": ["stage1", "stage2"],
}  # fmt: skip


@pytest.fixture
def swin() -> Any:
    transformers = pytest.importorskip("transformers", "5.23")
    torch.manual_seed(0)
    backbone = transformers.SwinBackbone(transformers.SwinConfig(**SWIN)).eval().requires_grad_(False)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if "bias" in name:  # as they come, biases are zero
                parameter.normal_(std=0.5)
    return backbone


def pruned(swin: Any, *keep: float) -> Any:
    other = copy.deepcopy(swin)
    prune_windows(other, keep)
    return other


@pytest.mark.parametrize("size", [(64, 96), (52, 75)])  # whole windows, and not
def test_with_all_windows_kept_nothing_changes(swin: Any, size: tuple[int, int]) -> None:
    """A share of 1 leaves a stage alone; one that rounds up to all windows goes through gather and scatter."""
    images = torch.randn(2, 3, *size)
    expected = swin(images).feature_maps
    for exact, other in ((True, pruned(swin, 1, 1)), (False, pruned(swin, 0.999, 0.999))):
        for found, wanted in zip(other(images).feature_maps, expected, strict=True):
            assert torch.equal(found, wanted) or not exact
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert list(other.state_dict()) == list(swin.state_dict())
    again = copy.deepcopy(pruned(swin, 0.5, 0.5))  # a copy decides for itself
    assert again.swin.encoder.layers[0].blocks[0].forward.args[0] is again.swin.encoder.layers[0].blocks[0]


@pytest.mark.parametrize("size", [(8, 12), (7, 10)])
def test_windows_are_those_of_transformers(swin: Any, size: tuple[int, int]) -> None:
    from transformers.models.swin.modeling_swin import window_partition

    x = torch.randn(2, *size, 3)
    for block in swin.swin.encoder.layers[0].blocks:
        padded = block.cyclic_shift(block.maybe_pad(x, *size)[0])
        windows = partition(block, x)
        assert torch.equal(windows.flatten(0, 1), window_partition(padded, 4).flatten(1, 2))
        assert torch.equal(merge(block, windows, size), x)


@pytest.mark.parametrize("size", [(8, 12), (7, 10)])
def test_a_stage_block_by_block(swin: Any, size: tuple[int, int]) -> None:
    """Windows by their norm at the stage's input; kept ones are those of the whole block, pruned ones pass."""
    height, width = size
    tokens = torch.randn(2, height * width, 8) * torch.rand(2, height * width, 1)
    stage = swin.swin.encoder.layers[0]
    x, changed = tokens, torch.zeros(2, height, width, dtype=torch.bool)
    for block in stage.blocks:
        whole = block(x, size, always_partition=True)[0]
        windows = partition(block, tokens.view(2, height, width, 8))
        count = windows.shape[1]
        keep = -(-count // 2)
        kept = torch.zeros(2, count, 16, 1)
        for image in range(2):
            norms = [float(window.square().sum()) for window in windows[image]]
            for n in sorted(range(count), key=lambda n: -norms[n])[:keep]:
                kept[image, n] = 1
        chosen = merge(block, kept, size).reshape(2, -1, 1)
        x = torch.where(chosen > 0, whole, x)
        changed |= chosen.view(2, height, width) > 0
    other = pruned(swin, 0.5, 1).swin.encoder.layers[0]
    hooked: list[Tensor] = []
    other.blocks[-1].register_forward_hook(lambda _m, _i, output: hooked.append(output[0]))
    other(tokens, size, always_partition=True, output_hidden_states_before_downsampling=True)
    torch.testing.assert_close(hooked[0], x, rtol=1e-4, atol=1e-5)
    untouched = ~changed.view(2, -1)
    assert untouched.any() and torch.equal(hooked[0][untouched], tokens[untouched])


def test_images_of_a_batch_keep_their_own_windows(swin: Any) -> None:
    other = pruned(swin, 0.4, 0.6)
    images = torch.randn(2, 3, 64, 96) * torch.rand(2, 1, 64, 96)
    together = other(images).feature_maps
    for index in range(2):
        for alone, both in zip(other(images[index : index + 1]).feature_maps, together, strict=True):
            torch.testing.assert_close(alone[0], both[index], rtol=1e-4, atol=1e-5)


def test_work_falls_with_the_windows(swin: Any) -> None:
    """16 x 24 tokens at stage 1 (24 windows), 8 x 12 at stage 2 (6 windows): 12 C C a token, and attention."""
    images = torch.randn(1, 3, 64, 96)
    full = dense_macs(lambda: swin(images))
    window = [16 * (12 * c * c) + 2 * 16 * 16 * c for c in (8, 16)]
    for keep, kept in (((0.5, 1), (12, 6)), ((0.5, 0.3), (12, 2)), ((0.01, 0.01), (1, 1))):
        skipped = 2 * sum(w * (all_ - k) for w, all_, k in zip(window, (24, 6), kept, strict=True))
        assert dense_macs(lambda keep=keep: pruned(swin, *keep)(images)) == full - skipped


def test_mask2former_takes_shares_and_refuses_others() -> None:
    pytest.importorskip("transformers", "5.23")
    config = {
        "hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "encoder_layers": 1, "decoder_layers": 2,
        "dim_feedforward": 32, "encoder_feedforward_dim": 32, "num_queries": 7, "num_attention_heads": 4,
        "backbone_config": {
            "model_type": "swin", "embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4], "window_size": 4,
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
    }  # fmt: skip
    nets = []
    for keep in (None, [1, 1, 1, 1], [0.999] * 4, [0.3] * 4):
        torch.manual_seed(0)
        nets.append(Mask2Former(5, config=config, keep=keep).eval())
    images = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        plain, same, rounded, fewer = (net(images) for net in nets)
    assert torch.equal(plain, same)
    torch.testing.assert_close(rounded, plain, rtol=1e-3, atol=1e-3)
    assert (fewer - plain).abs().max() > 1e-3
    for keep in ([0.5] * 3, [0.5, 0, 1, 1], [1.5] * 4):
        with pytest.raises(ValueError, match="give 4 shares above 0 and at most 1"):
            Mask2Former(5, config=config, keep=keep)
