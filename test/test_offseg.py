"""OffSeg and its parts against the papers' figures and their equations written out.

Shape shorthand: B images, C channels, G heads or groups, N positions, k kernel.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from live_tensors import LiveTensors
from torch import Tensor, nn
from torch.nn import functional as F

from sparserefine_ros.datasets.classes import CAMVID
from sparserefine_ros.errors import BundleError
from sparserefine_ros.networks.efficientformer import (
    HEADS,
    Attention,
    AttentionDownsample,
    EfficientFormerV2,
    RelativeBias,
)
from sparserefine_ros.networks.entropy import entropy
from sparserefine_ros.networks.freqfusion import FreqFusion, interleave, neighbour_similarity, reassemble, resample
from sparserefine_ros.networks.macs import dense_macs
from sparserefine_ros.networks.offseg import OffSeg
from sparserefine_ros.segmenter.bundle import Bundle, save_network
from sparserefine_ros.segmenter.preprocess import normalise
from sparserefine_ros.segmenter.segmenter import Segmenter


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def randomise(module: nn.Module) -> nn.Module:
    """Statistics, scales and tables that a new network starts at 0 or 1 get values that matter."""
    for name, tensor in module.state_dict().items():
        if name.endswith(("running_mean", "table")):
            tensor.normal_(std=0.3)
        elif name.endswith("running_var") or "scale_" in name:
            tensor.uniform_(0.5, 1.5)
    return module.eval()


@pytest.mark.parametrize(("size", "expected"), [("S1", 5_735_112), ("S2", 12_131_536), ("L", 25_551_520)])
def test_encoder_has_the_parameters_of_the_published_ones(size: str, expected: int) -> None:
    """Published: 6.1, 12.6 and 26.1 M with two classifiers of 1000 classes and a last normalisation, at 224 x 224."""
    with torch.device("meta"):
        encoder = EfficientFormerV2(size, 224)
    assert parameters(encoder) == expected
    width = encoder.widths[-1]
    published = {"S1": 6.1, "S2": 12.6, "L": 26.1}[size]
    assert (expected + 2 * (width + 1) * 1000 + 2 * width) / 1e6 == pytest.approx(published, rel=0.015)


@pytest.mark.parametrize(
    ("variant", "millions", "gmacs"), [("T", 6.2, 9.38898432), ("B", 13.0, 14.657097728), ("L", 26.4, 21.797044224)]
)
def test_totals_match_the_paper_and_the_published_code(variant: str, millions: float, gmacs: float) -> None:
    """At K = 150 and 512 x 512, as for ADE20K: the paper's parameters, and what torch counts in the published code.

    The paper counts 5.3, 10.3 and 17.1 G; the convolutions and linear layers of that code alone are 6.0, 10.5 and 17.3.
    """
    with torch.device("meta"):
        network = OffSeg(150, variant).eval()
        images = torch.empty(1, 3, 512, 512)
    assert parameters(network) / 1e6 == pytest.approx(millions, rel=0.03)
    n, k, c = 128 * 128, 150, 256
    saved = n * (k * c + c * c - k * k) - k * c * c - k * k * c  # feature offsets never exist here, see `offset`
    with torch.no_grad():
        assert dense_macs(lambda: network(images)) == pytest.approx(gmacs * 1e9 - saved, rel=1e-6)


@pytest.mark.parametrize(("size", "stride"), [((3, 3), 1), ((3, 3), 2), ((4, 2), 1), ((5, 6), 2), ((1, 1), 2)])
def test_relative_bias_depends_on_distances_alone(size: tuple[int, int], stride: int) -> None:
    """On its own size; on others that matrix is resized as an image."""
    bias = RelativeBias(3).double()
    nn.init.normal_(bias.table)
    table = bias.table.view(HEADS, 3, 3)
    queries = [(y, x) for y in range(0, 3, stride) for x in range(0, 3, stride)]
    expected = torch.stack(
        [torch.stack([table[:, abs(y - v), abs(x - u)] for v in range(3) for u in range(3)], 1) for y, x in queries], 1
    )
    if size != (3, 3):
        shape = (len(range(0, size[0], stride)) * len(range(0, size[1], stride)), size[0] * size[1])
        expected = F.interpolate(expected[None], shape, mode="bicubic", align_corners=False)[0]
    torch.testing.assert_close(bias(*size, stride=stride), expected, rtol=0, atol=0)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, talk: tuple[nn.Conv2d, nn.Conv2d] | None) -> Tensor:
    """Attention one head at a time; q, k, v are [1, G D, h, w], the result [1, G D, Nq] unfolded by the caller."""
    heads = [x[0].flatten(1).view(HEADS, -1, x[0, 0].numel()) for x in (q, k, v)]
    scores = torch.einsum("gdq,gdn->gqn", heads[0], heads[1]) / heads[0].shape[1] ** 0.5 + bias
    if talk:
        scores = torch.einsum("fg,gqn->fqn", talk[0].weight[..., 0, 0], scores) + talk[0].bias[:, None, None]
    scores = scores.exp() / scores.exp().sum(-1, keepdim=True)
    if talk:
        scores = torch.einsum("fg,gqn->fqn", talk[1].weight[..., 0, 0], scores) + talk[1].bias[:, None, None]
    return torch.einsum("gqn,gdn->gdq", scores, heads[2]).flatten(0, 1)[None]


@torch.no_grad()
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(4, 4), (3, 5)])
def test_attention_is_its_equations(stride: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    mixer = randomise(Attention(6, 4, stride).double())
    x = torch.randn(1, 6, *size, dtype=torch.float64)
    small = mixer.shrink(x) if stride == 2 else x
    v = mixer.v(small)
    mixed = attend(
        mixer.q(small), mixer.k(small), v, mixer.bias(*small.shape[-2:]), (mixer.talk_before, mixer.talk_after)
    )
    mixed = mixed.view(v.shape) + mixer.v_local(v)
    if stride == 2:
        mixed = F.interpolate(mixed, size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(mixer(x), mixer.proj(F.gelu(mixed)), rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("size", [(4, 4), (3, 5)])
def test_downsampling_attention_is_its_equations(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    down = randomise(AttentionDownsample(6, 10, 4).double())
    x = torch.randn(1, 6, *size, dtype=torch.float64)
    local = F.conv2d(x, down.q_local.weight, down.q_local.bias, stride=2, padding=1, groups=6)
    q, v = down.q(local + F.avg_pool2d(x, 1, 2)), down.v(x)
    local_v = down.v_local(v)
    mixed = attend(q, down.k(x), v, down.bias(*size, stride=2), None).view(local_v.shape) + local_v
    torch.testing.assert_close(down(x), down.proj(F.gelu(mixed)), rtol=1e-9, atol=1e-9)
    assert local_v.shape[-2:] == ((size[0] + 1) // 2, (size[1] + 1) // 2)


def unfolded_sums(x: Tensor, weights: Tensor) -> Tensor:
    """CARAFE with all k k copies: neighbourhoods of the coarse map, each repeated for the fine positions above it."""
    batch, channels, h, w = x.shape
    k = int(weights.shape[1] ** 0.5)
    copies = F.unfold(x, k, padding=k // 2).view(batch, channels, k * k, h, w)
    height, width = weights.shape[-2:]
    rows = torch.arange(height) // (1 if height == h else 2)
    columns = torch.arange(width) // (1 if width == w else 2)
    return (copies[..., rows, :][..., columns] * weights[:, None]).sum(2)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize(("low", "high"), [((4, 5), (4, 5)), ((4, 5), (8, 10)), ((4, 5), (7, 9)), ((1, 2), (1, 4))])
def test_reassembly_equals_unfolding(kernel: int, low: tuple[int, int], high: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, *low, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, kernel**2, *high, dtype=torch.float64, requires_grad=True)
    result, expected = reassemble(x, weights), unfolded_sums(x, weights)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(result, (x, weights), direction),
        torch.autograd.grad(expected, (x, weights), direction),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("training", [False, True])
def test_reassembly_holds_no_copies_of_the_features(training: bool) -> None:
    x = torch.randn(1, 64, 16, 16, requires_grad=training)
    weights = torch.rand(1, 25, 32, 32, requires_grad=training)
    with LiveTensors(64 * 32 * 32) as seen:
        reassemble(x, weights)
    assert seen.peak < 4  # the upsampled features and two sums; unfolding holds 25 and more


def test_similarity_and_resampling() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 4, 3, 5, dtype=torch.float64)
    similarity = neighbour_similarity(x)
    assert similarity.shape == (1, 8, 3, 5)
    expected = F.cosine_similarity(x[0, :, 2, 2], x[0, :, 0, 0], 0)
    torch.testing.assert_close(similarity[0, 0, 2, 2], expected)  # two up and two to the left
    torch.testing.assert_close(similarity[0, 4, 1, 2], F.cosine_similarity(x[0, :, 1, 2], x[0, :, 1, 4], 0))
    assert (similarity[0, :3, 1] == 0).all() and (similarity[0, 4, :, 3:] == 0).all()  # past the border

    offsets = torch.zeros(1, 4, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(resample(x, offsets), x)
    offsets[:, 0] = 1  # first group: from one to the right
    offsets[:, 3] = -0.5  # second group: from half a pixel above
    shifted = resample(x, offsets)
    torch.testing.assert_close(shifted[:, :2, :, :4], x[:, :2, :, 1:])
    torch.testing.assert_close(shifted[:, :2, :, 4], x[:, :2, :, 4])  # beyond the border: the last one
    torch.testing.assert_close(shifted[:, 2:, 1:], (x[:, 2:, 1:] + x[:, 2:, :2]) / 2)


@torch.no_grad()
def test_fusion_starts_as_a_mean_upsampled_and_sharpening() -> None:
    torch.manual_seed(0)
    fusion = FreqFusion(8, 24).double()
    for conv in (fusion.low_pass, fusion.high_pass, fusion.direction_fine, fusion.direction_coarse):
        nn.init.zeros_(conv.weight)
    fine, coarse = torch.randn(2, 8, 7, 6).double(), torch.randn(2, 24, 4, 3).double()
    sharp, smooth = fusion(fine, coarse)
    mean = F.interpolate(F.avg_pool2d(coarse, 5, 1, padding=2), scale_factor=2)[..., :7, :6]
    torch.testing.assert_close(smooth, mean)
    torch.testing.assert_close(sharp, fine + (fine - F.avg_pool2d(fine, 3, 1, padding=1)))


@torch.no_grad()
def test_displacements_are_read_from_both_maps_in_coarse_pixels() -> None:
    """Biases alone: each of the four fine positions over a coarse one has a displacement of its own, by group."""
    fusion = FreqFusion(8, 24).double()
    for conv in (fusion.direction_fine, fusion.direction_coarse, fusion.magnitude_fine, fusion.magnitude_coarse):
        nn.init.zeros_(conv.weight)
        nn.init.normal_(conv.bias)
    found = fusion._displacements(torch.randn(1, 8, 3, 4).double(), torch.randn(1, 8, 2, 2).double())
    assert found.shape == (1, 8, 3, 4)
    for channel, row, column in ((0, 0, 0), (3, 1, 2), (4, 2, 1), (7, 1, 3)):
        inner = 4 * channel + 2 * (row % 2) + column % 2
        magnitude = fusion.magnitude_fine.bias[channel] + fusion.magnitude_coarse.bias[inner]
        expected = (fusion.direction_fine.bias[channel] + fusion.direction_coarse.bias[inner]) * magnitude.sigmoid()
        torch.testing.assert_close(found[0, channel, row, column], expected)


def test_interleaving_is_by_quarters() -> None:
    a, b = torch.arange(8).view(1, 8, 1, 1), 100 + torch.arange(4).view(1, 4, 1, 1)
    assert interleave(a, b).flatten().tolist() == [0, 1, 100, 2, 3, 101, 4, 5, 102, 6, 7, 103]


@torch.no_grad()
@pytest.mark.parametrize("size", [(9, 9), (33, 95), (64, 64)])
def test_any_size_channels_last_and_batches(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    network = randomise(OffSeg(5, resolution=64))
    images = torch.randn(2, 3, *size)
    logits = network(images)
    assert logits.shape == (2, 5, *size) and torch.isfinite(logits).all()
    torch.testing.assert_close(network(images), logits, rtol=0, atol=0)
    torch.testing.assert_close(network(images[1:]), logits[1:], rtol=1e-3, atol=1e-3)
    last = network.to(memory_format=torch.channels_last)(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, logits, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 0.005), (torch.bfloat16, 0.03)])
def test_reduced_precision_stays_close(dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(0)
    network = randomise(OffSeg(5, resolution=64))
    images = torch.randn(1, 3, 96, 128)
    expected = network(images)
    with torch.autocast("cpu", dtype):
        assert (network(images).float() - expected).abs().mean() < bound


def test_every_parameter_learns() -> None:
    torch.manual_seed(0)
    network = OffSeg(5, resolution=64)
    F.cross_entropy(network(torch.randn(2, 3, 64, 96)), torch.randint(5, (2, 64, 96))).backward()
    still = {name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert {
        name for name in still if not name.endswith("0.bias")
    } == set()  # a bias before a normalisation does nothing


def test_bundle_segments_and_names_a_wrong_variant(tmp_path: Path, frame: np.ndarray) -> None:
    torch.manual_seed(0)
    args = {"variant": "T", "resolution": 64}
    network = randomise(OffSeg(len(CAMVID), **args))
    spec = save_network(tmp_path, network, "offseg", args, "dense.safetensors")
    bundle = Bundle(tmp_path, "offseg", CAMVID, 1.0, (64, 96), spec, entropy_threshold=1.5)
    bundle.save()
    result = Segmenter(Bundle.load(tmp_path), "cpu").segment([frame])[0]
    with torch.no_grad():
        logits = network(normalise(torch.from_numpy(frame)[None]))[0]
    assert (result.mask == logits.argmax(0).numpy()).mean() > 0.99  # weights are stored in half precision
    np.testing.assert_allclose(result.low_entropy, entropy(logits.softmax(0).movedim(0, -1)), atol=0.05)
    text = (tmp_path / "model.yaml").read_text()
    (tmp_path / "model.yaml").write_text(text.replace("variant: T", "variant: XL"))
    with pytest.raises(BundleError, match="'XL'; known are T, B, L"):
        Segmenter(Bundle.load(tmp_path), "cpu")
