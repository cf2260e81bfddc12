"""The per-pixel ends in C give what the plain formulation gives in float64."""

from __future__ import annotations

import pytest
import torch
from compiler import needs_compiler
from torch import Tensor, nn

from sparserefine_ros.errors import BundleError
from sparserefine_ros.networks.entropy import entropy
from sparserefine_ros.networks.refiner import SparseRefiner
from sparserefine_ros.networks.repeater import RepeatRefiner
from sparserefine_ros.networks.selectors import upsample_nearest
from sparserefine_ros.segmenter.head import (
    Head,
    NativeDirect,
    NativeGated,
    NativeHead,
    build_head,
    gather_initial,
    low_rows,
)
from sparserefine_ros.sparse import SiteSet

CPU = torch.device("cpu")
KINDS = [Head, pytest.param(NativeGated, marks=needs_compiler)]
DIRECT = [Head, pytest.param(NativeDirect, marks=needs_compiler)]
TIE = 1e-5  # probabilities closer than this may swap places by rounding


def build(classes: int, channels: int = 16, context: bool = False) -> SparseRefiner:
    torch.manual_seed(classes)
    refiner = SparseRefiner(classes, (channels,), context=context).eval()
    for parameter in refiner.ensembler.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return refiner


def logits_of(classes: int, layout: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([0.1, 3.0, 40.0, 500.0])  # from undecided to sure beyond what exp can tell
    logits = torch.randn(2, classes, 13, 20, generator=generator) * spread[torch.arange(20) % 4]
    return logits.to(memory_format=torch.channels_last) if layout == "channels_last" else logits


def agrees(mask: Tensor, confidence: Tensor, expected: Tensor) -> None:
    """``expected`` are probabilities [n, K] in float64."""
    best = expected.max(1)
    chosen = expected.gather(1, mask.long()[:, None])[:, 0]
    assert float((best.values - chosen).max()) <= TIE
    assert float((confidence.double() - 255 * best.values).abs().max()) <= 0.5 + 255 * TIE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("classes", [2, 3, 11, 19, 33, 255])
def test_initial_prediction(kind: type[Head], layout: str, classes: int) -> None:
    logits = logits_of(classes, layout)
    result = kind(build(classes, context=True)).initial(logits)
    p = logits.double().softmax(1)
    assert result.finite and result.probabilities is not None
    torch.testing.assert_close(result.entropy.double(), entropy(p, 1), rtol=0, atol=2e-6)
    torch.testing.assert_close(result.probabilities.double(), p, rtol=1e-4, atol=1e-6)
    rows = p.permute(0, 2, 3, 1).reshape(-1, classes)
    agrees(result.mask.view(-1), result.confidence.view(-1), rows)
    assert kind(build(classes)).initial(logits).probabilities is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize(("classes", "channels"), [(2, 4), (11, 16), (19, 33), (255, 8)])
@pytest.mark.parametrize("selected", [0, 1, 17, 600])
def test_merge(kind: type[Head], layout: str, classes: int, channels: int, selected: int) -> None:
    refiner, logits = build(classes, channels), logits_of(classes, layout)
    size = (2, 26, 40)
    chosen = torch.zeros(size, dtype=torch.bool)
    chosen.view(-1)[torch.randperm(chosen.numel(), generator=torch.Generator().manual_seed(1))[:selected]] = True
    sites = SiteSet.from_mask(chosen)
    features = torch.randn(selected, channels + 3, generator=torch.Generator().manual_seed(2))[:, :channels]
    mask, confidence = (torch.full(size, 77, dtype=torch.uint8) for _ in range(2))
    with torch.no_grad():
        assert kind(refiner).merge(features, logits, sites, mask, confidence)
        refiner.double()
        initial = upsample_nearest(logits, size[1:]).permute(0, 2, 3, 1)[chosen].double()
        torch.testing.assert_close(gather_initial(logits, sites).double(), initial, rtol=0, atol=0)
        expected = refiner.ensembler(initial, refiner.classifier(features.double())).softmax(1)
    if selected:
        agrees(mask[chosen], confidence[chosen], expected)
    assert (mask[~chosen] == 77).all() and (confidence[~chosen] == 77).all()


@pytest.mark.parametrize("kind", DIRECT)
@pytest.mark.parametrize("classifier", ["linear", "identity"])
@pytest.mark.parametrize(("classes", "channels"), [(2, 4), (11, 16), (19, 33), (255, 8)])
@pytest.mark.parametrize("selected", [0, 1, 17, 600])
def test_the_refiners_prediction_in_the_place_of_the_initial_one(
    kind: type[Head], classifier: str, classes: int, channels: int, selected: int
) -> None:
    torch.manual_seed(0)
    refiner = SparseRefiner(classes, (channels,), ensembler="direct").eval()
    if classifier == "identity":  # as a refiner that gives logits has it
        channels, refiner.classifier = classes, nn.Identity()  # type: ignore[assignment]
    size = (2, 26, 40)
    chosen = torch.zeros(size, dtype=torch.bool)
    chosen.view(-1)[torch.randperm(chosen.numel())[:selected]] = True
    features = 5 * torch.randn(channels, selected).t()  # channel by channel in memory
    mask, confidence = (torch.full(size, 77, dtype=torch.uint8) for _ in range(2))
    logits, sites = logits_of(classes, "contiguous"), SiteSet.from_mask(chosen)
    with torch.no_grad():
        assert kind(refiner).merge(features, logits, sites, mask, confidence)
        expected = refiner.double().classifier(features.double()).softmax(1)
    if selected:
        agrees(mask[chosen], confidence[chosen], expected)
        features[selected // 2, -1] = float("nan")
        with torch.no_grad():
            assert not kind(refiner.float()).merge(features, logits, sites, mask.clone(), confidence.clone())
    assert (mask[~chosen] == 77).all() and (confidence[~chosen] == 77).all()


@needs_compiler
def test_features_may_lie_in_any_order() -> None:
    refiner, logits, sites = build(5, 6), logits_of(5, "channels_last"), selected_blocks((13, 20), (26, 40))
    features = torch.randn(6, len(sites), generator=torch.Generator().manual_seed(2)).t()  # channel by channel
    results = [torch.zeros(2, *sites.shape, dtype=torch.uint8) for _ in range(2)]
    with torch.no_grad():
        for result, given in zip(results, (features, features.contiguous()), strict=True):
            NativeGated(refiner).merge(given, logits, sites, *result)
    assert torch.equal(*results)


def selected_blocks(low: tuple[int, int], native: tuple[int, int], batch: int = 2) -> SiteSet:
    """A third of the pixels at low resolution, with every native pixel under them."""
    chosen = torch.rand(batch, *low, generator=torch.Generator().manual_seed(3)) < 0.35
    return SiteSet.from_mask(upsample_nearest(chosen, native))


@needs_compiler
@pytest.mark.parametrize(
    ("native", "members"), [((26, 40), 4), ((39, 40), 6), ((25, 40), 4), ((21, 32), None), ((13, 20), None)]
)
def test_what_a_block_shares_is_computed_once(native: tuple[int, int], members: int | None) -> None:
    """Whole blocks, nearly whole ones, irregular ones and single pixels; each the same bits as pixel by pixel."""
    refiner, logits, sites = build(11), logits_of(11, "channels_last"), selected_blocks((13, 20), native)
    head = NativeGated(refiner)
    low, pixels = head._blocks(logits, sites)
    if members is None:
        assert pixels is None and len(low) == len(sites)
    else:
        assert pixels is not None and pixels.shape == (len(low), members)
        assert len(low) == len(low_rows(logits, sites).unique())
        there = pixels >= 0
        assert torch.equal(pixels[there].sort().values, torch.arange(len(sites), dtype=torch.int32))
        assert torch.equal(low_rows(logits, sites)[pixels[there].long()], low[:, None].expand_as(pixels)[there])
    features = torch.randn(len(sites), 16, generator=torch.Generator().manual_seed(2))
    results = []
    for blocks in (head._blocks, lambda logits, sites: (low_rows(logits, sites), None)):
        head._blocks = blocks  # type: ignore[method-assign]
        mask, confidence = (torch.full(sites.shape, 77, dtype=torch.uint8) for _ in range(2))
        assert head.merge(features, logits, sites, mask, confidence)
        results.append((mask, confidence))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    with torch.no_grad():
        refiner.double()
        expected = refiner.ensembler(
            gather_initial(logits, sites).double(), refiner.classifier(features.double())
        ).softmax(1)
    agrees(results[0][0][sites.mask], results[0][1][sites.mask], expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_told(kind: type[Head], value: float) -> None:
    refiner, logits = build(5, 4), logits_of(5, "channels_last")
    logits[1, :, 3, 4] = value
    assert not kind(refiner).initial(logits).finite
    sites = SiteSet.from_mask(torch.ones(2, 13, 20, dtype=torch.bool))
    mask = torch.zeros(2, 13, 20, dtype=torch.uint8)
    with torch.no_grad():
        assert not kind(refiner).merge(torch.zeros(len(sites), 4), logits, sites, mask, mask.clone())


@needs_compiler
def test_threads_do_not_change_the_result() -> None:
    logits, before = logits_of(19, "channels_last"), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(NativeHead(None).initial(logits))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(other.entropy, results[0].entropy) and torch.equal(other.mask, results[0].mask)


@needs_compiler
def test_kernels_are_taken_where_they_fit() -> None:
    assert type(build_head(None, CPU)) is NativeHead
    assert type(build_head(build(11), CPU)) is NativeGated
    for replacing in (SparseRefiner(3, (4,), ensembler="direct"), RepeatRefiner()):
        assert type(build_head(replacing, CPU)) is NativeDirect
    for unknown in (SparseRefiner(3, (4,), ensembler="entropy"), SparseRefiner(3, (300,))):
        assert type(build_head(unknown, CPU)) is NativeHead, "what it cannot merge it still reads the logits of"
    assert type(build_head(build(11), torch.device("meta"))) is Head


@needs_compiler
def test_a_refiner_that_gives_logits_gives_one_for_each_class() -> None:
    sites = SiteSet.from_mask(torch.ones(2, 13, 20, dtype=torch.bool))
    mask = torch.zeros(2, 13, 20, dtype=torch.uint8)
    with pytest.raises(BundleError, match="the refiner gives 4 logits for 5 classes"):
        NativeDirect(RepeatRefiner()).merge(
            torch.zeros(len(sites), 4), logits_of(5, "contiguous"), sites, mask, mask.clone()
        )


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_networks_end_in_float32(kind: type[Head]) -> None:
    refiner, logits = build(5, 4), logits_of(5, "channels_last")
    sites = SiteSet.from_mask(torch.ones(2, 13, 20, dtype=torch.bool))
    features = torch.randn(len(sites), 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    masks = []
    for values, given in ((logits.bfloat16(), features), (logits.bfloat16().float(), features.float())):
        mask = torch.zeros(2, 13, 20, dtype=torch.uint8)
        with torch.no_grad():
            assert kind(refiner).initial(values).finite
            assert kind(refiner).merge(given, values, sites, mask, mask.clone())
        masks.append(mask)
    assert torch.equal(*masks)
