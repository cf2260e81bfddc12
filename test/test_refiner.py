"""The refiner against the paper's figures, its equations and a dense U-Net of the same weights.

Shape shorthand: B images, K classes, N selected pixels, C channels.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from sparserefine_ros.benchmarks.dense_peer import DenseUNet
from sparserefine_ros.networks.ensemblers import (
    DirectEnsembler,
    EntropyEnsembler,
    GatedEnsembler,
    OracleEnsembler,
    build_ensembler,
)
from sparserefine_ros.networks.entropy import entropy
from sparserefine_ros.networks.refiner import SparseRefiner
from sparserefine_ros.networks.selectors import (
    EntropySelector,
    LearnableSelector,
    MagnitudeSelector,
    OracleSelector,
    Prediction,
    RandomSelector,
    upsample_nearest,
)
from sparserefine_ros.networks.unet import SiteNorm


@pytest.mark.parametrize(("levels", "parameters"), [(4, 4_932_520), (5, 19_817_384), (6, 79_340_456)])
def test_parameter_counts_match_table_1(levels: int, parameters: int) -> None:
    """Mask2Former-T grows by 19.8 M, the others by 79.3 M (Table 1): 5 and 6 stages at K = 19."""
    with torch.device("meta"):
        refiner = SparseRefiner(19, [32 * 2**i for i in range(levels)])
    assert sum(p.numel() for p in refiner.parameters()) == parameters


def test_entropy_at_its_extremes() -> None:
    one_hot = torch.tensor([0.0, 1.0, 0.0])
    assert entropy(one_hot) == 0.0  # the paper's snippet gives NaN here
    assert entropy(torch.full((8,), 1 / 8)).item() == pytest.approx(math.log(8))
    half = torch.tensor([60.0, 0.0, -60.0]).half().softmax(-1)
    assert half[2] == 0 and torch.isfinite(entropy(half))


@given(st.integers(2, 30), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_entropy_equals_its_definition(num_classes: int, seed: int) -> None:
    logits = torch.randn(5, num_classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 5
    log_p = logits.log_softmax(-1)
    expected = -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(entropy(logits.softmax(-1)), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("low", "native"), [((4, 6), (8, 12)), ((5, 8), (8, 13)), ((3, 3), (3, 3)), ((2, 5), (5, 13)), ((10, 20), (16, 32))]
)
def test_entropy_selector_equals_selecting_at_full_resolution(low: tuple[int, int], native: tuple[int, int]) -> None:
    """Selecting at low resolution and upsampling the mask is the paper's order, upsampling first, for any ratio."""
    logits = torch.randn(2, 5, *low, generator=torch.Generator().manual_seed(1)) * 3
    threshold = 0.8
    full = F.interpolate(logits, native, mode="nearest")
    p = full.double().softmax(1)
    expected = -(p * p.log()).sum(1) > threshold
    chosen = EntropySelector(threshold)(Prediction(logits, native))
    assert torch.equal(chosen, expected)
    assert 0 < expected.float().mean() < 1


def test_entropy_selector_bounds() -> None:
    logits = torch.tensor([[1000.0, 0.0], [0.0, 0.0]]).T.reshape(1, 2, 1, 2)  # a sure pixel, an undecided one
    prediction = Prediction(logits, (1, 2))
    assert EntropySelector(0.0)(prediction).tolist() == [[[False, True]]]
    assert not EntropySelector(math.log(2) + 1e-3)(prediction).any()


def test_random_selector_keeps_its_density_and_seed() -> None:
    prediction = Prediction(torch.zeros(2, 3, 10, 10), (200, 300))
    chosen = RandomSelector(0.1, seed=3)(prediction)
    assert chosen.shape == (2, 200, 300)
    assert chosen.float().mean().item() == pytest.approx(0.1, abs=0.005)
    assert torch.equal(chosen, RandomSelector(0.1, seed=3)(prediction))
    assert not torch.equal(chosen, RandomSelector(0.1, seed=4)(prediction))


def test_magnitude_selector_takes_the_largest_norms() -> None:
    features = torch.zeros(1, 2, 2, 4)
    features[0, :, 0, 1] = torch.tensor([3.0, 4.0])  # norm 5
    features[0, :, 1, 2] = torch.tensor([0.0, 6.0])  # norm 6
    features[0, :, 1, 3] = torch.tensor([4.0, 0.0])  # norm 4
    chosen = MagnitudeSelector(0.25)(Prediction(torch.zeros(1, 3, 2, 4), (4, 8), features=features))
    expected = torch.zeros(1, 2, 4, dtype=torch.bool)
    expected[0, 0, 1] = expected[0, 1, 2] = True
    assert torch.equal(chosen, upsample_nearest(expected, (4, 8)))
    with pytest.raises(ValueError, match="features"):
        MagnitudeSelector(0.1)(Prediction(torch.zeros(1, 3, 2, 2), (4, 4)))


def test_oracle_selector_takes_exactly_the_wrong_labelled_pixels() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])[None].permute(0, 2, 1)[..., None, :]  # classes 0, 1 in a row of two
    labels = torch.tensor([[[0, 1, 1, 255]]])
    chosen = OracleSelector()(Prediction(logits, (1, 4), labels=labels))
    assert chosen.tolist() == [[[False, True, False, False]]]


def test_learnable_selector_learns_where_the_prediction_is_wrong() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 3, 8, 8)
    images = torch.randn(1, 3, 16, 16)
    wrong = (upsample_nearest(logits.argmax(1), (16, 16)) == 2).float()
    selector = LearnableSelector(3)
    optimizer = torch.optim.Adam(selector.parameters(), 0.02)
    prediction = Prediction(logits, (16, 16), images=images)
    for _ in range(60):
        loss = F.binary_cross_entropy_with_logits(selector.scores(prediction), wrong)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (selector(prediction) == wrong.bool()).float().mean() > 0.95


def test_gated_ensembler_is_equation_1() -> None:
    torch.manual_seed(0)
    gated = GatedEnsembler(4).double()
    y1, y2 = torch.randn(7, 4).double(), torch.randn(7, 4).double()
    p1, p2 = y1.softmax(1), y2.softmax(1)
    e1, e2 = -(p1 * p1.log()).sum(1, keepdim=True), -(p2 * p2.log()).sum(1, keepdim=True)
    a, b = gated.gate[0], gated.gate[2]
    hidden = F.relu(torch.cat([p1, e1, p2, e2], 1) @ a.weight.T + a.bias)
    g = hidden @ b.weight.T + b.bias
    w = torch.sigmoid(g[:, :1] - g[:, 1:])  # a softmax over two outputs is the sigmoid of their difference
    c, d = gated.fuse[0], gated.fuse[2]
    expected = F.relu((w * y1 + (1 - w) * y2) @ c.weight.T + c.bias) @ d.weight.T + d.bias
    torch.testing.assert_close(gated(y1, y2), expected, rtol=1e-12, atol=1e-12)


def test_plain_ensemblers_choose_as_they_say() -> None:
    y1 = torch.tensor([[9.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
    y2 = torch.tensor([[0.0, 1.0], [0.0, 9.0], [3.0, 0.0]])
    labels = torch.tensor([1, 0, 1])
    assert torch.equal(DirectEnsembler()(y1, y2), y2)
    assert torch.equal(EntropyEnsembler()(y1, y2), torch.stack([y1[0], y2[1], y2[2]]))  # equal entropies: the refined
    assert torch.equal(build_ensembler("residual", 2)(y1, y2), torch.tensor([[9.0, 1.0], [1.0, 9.0], [3.0, 3.0]]))
    assert torch.equal(OracleEnsembler()(y1, y2, labels), torch.stack([y2[0], y1[1], y1[2]]))
    with pytest.raises(ValueError, match="labels"):
        OracleEnsembler()(y1, y2)
    with pytest.raises(ValueError, match="'best'.*direct, entropy, gated, oracle, residual"):
        build_ensembler("best", 3)


def test_unet_on_a_full_image_equals_dense_convolutions() -> None:
    torch.manual_seed(0)
    refiner = SparseRefiner(5, (6, 8, 10), stride="floor", blocks=2).double().eval()
    for module in refiner.modules():
        if isinstance(module, SiteNorm):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2.0)
    image = torch.randn(2, 3, 12, 16, dtype=torch.float64)
    pyramid = refiner.pyramid(torch.ones(2, 12, 16, dtype=torch.bool))
    features = refiner.unet(pyramid.levels[0].gather(image), pyramid)
    expected = DenseUNet(refiner.unet)(image)
    torch.testing.assert_close(pyramid.levels[0].scatter(features), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("classes", [2, 19, 32])
def test_gated_ensembler_starts_as_the_mean_and_learns(classes: int) -> None:
    ensembler = GatedEnsembler(classes)
    y1, y2 = torch.randn(2, 50, classes)
    result = ensembler(y1, y2)
    torch.testing.assert_close(result, (y1 + y2) / 2)
    F.cross_entropy(result, torch.arange(50) % classes).backward()
    assert all(p.grad is not None for p in ensembler.parameters())
    assert ensembler.fuse[2].weight.grad[:, 2 * classes :].abs().sum() > 0 or 2 * classes == 64
    assert ensembler.gate[2].weight.grad.abs().sum() > 0


def test_context_reads_colours_and_the_initial_softmax() -> None:
    torch.manual_seed(0)
    refiner = SparseRefiner(4, (6, 8), "floor", blocks=1, context=True).double().eval()
    pyramid = refiner.pyramid(torch.rand(1, 9, 9) < 0.5)
    pixels, initial = (torch.randn(len(pyramid.levels[0]), c, dtype=torch.float64) for c in (3, 4))
    expected = refiner.classifier(refiner.unet(torch.cat([pixels, initial.softmax(1)], 1), pyramid))
    torch.testing.assert_close(refiner(pixels, initial, pyramid).refined, expected, rtol=0, atol=0)
    shifted = refiner(pixels, initial + 3.0, pyramid).refined  # logits that differ by a constant say the same
    torch.testing.assert_close(shifted, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("stride", ["dilate", "floor"])
@pytest.mark.parametrize("selected", [0, 1, 7])
def test_refiner_trains_on_few_or_no_pixels(stride: str, selected: int) -> None:
    refiner = SparseRefiner(3, (4, 8, 8), stride, blocks=1)
    mask = torch.zeros(1, 9, 11, dtype=torch.bool)
    mask.view(-1)[torch.arange(selected) * 13] = True
    result = refiner(torch.randn(selected, 3), torch.randn(selected, 3), refiner.pyramid(mask))
    assert result.refined.shape == result.ensembled.shape == (selected, 3)
    (result.refined.sum() + result.ensembled.sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in refiner.parameters() if p.grad is not None)
    assert all(torch.isfinite(b).all() for b in refiner.buffers())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"channels": []}, "levels is 0"),
        ({"channels": [8], "blocks": 0}, "blocks is 0; give a whole number from 1"),
        ({"channels": [8], "stride": "round"}, "'round' is unknown: use one of dilate, floor"),
        ({"channels": [8], "context": 2}, "context is 2; give true or false"),
    ],
)
def test_refuses_at_once_what_would_fail_at_the_first_frame(args: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseRefiner(3, **args)
