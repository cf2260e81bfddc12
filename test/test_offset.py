"""Offset learning against its equations written out, and in the heads that use it.

Shape shorthand: B images, K classes or queries, C channels, N pixels.
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
from sparserefine_ros.networks.compact import CompactSegmenter
from sparserefine_ros.networks.entropy import entropy
from sparserefine_ros.networks.offset import OffsetClassifier, OffsetLearning
from sparserefine_ros.networks.offset_heads import OffsetMaskPredictor, replace_classifier, replace_mask_predictor
from sparserefine_ros.networks.registry import DENSE, build
from sparserefine_ros.networks.segformer import SegFormer
from sparserefine_ros.networks.segnext import SegNeXt, explain
from sparserefine_ros.segmenter.bundle import Bundle, load_network, save_network
from sparserefine_ros.segmenter.segmenter import Segmenter


def written_out(embeddings: Tensor, features: Tensor, p1: Tensor, p2: Tensor) -> Tensor:
    """The equations as they stand, one image at a time, dE and both softmaxes in full."""
    results = []
    for image in range(len(features)):
        w = embeddings if embeddings.ndim == 2 else embeddings[image]
        e = features[image].flatten(1).T  # [N, C]
        a = torch.einsum("nc,kc->nk", e, w)
        over_pixels, over_classes = a.exp() / a.exp().sum(0, keepdim=True), a.exp() / a.exp().sum(1, keepdim=True)
        dw = torch.einsum("dc,kc->kd", p1, torch.einsum("nk,nc->kc", over_pixels, e))
        de = torch.einsum("dc,nc->nd", p2, torch.einsum("nk,kc->nc", over_classes, w))
        results.append(torch.einsum("nc,kc->kn", e + de, w + dw).reshape(len(w), *features.shape[-2:]))
    return torch.stack(results)


def random_offsets(module: nn.Module) -> nn.Module:
    """``module`` with offsets that do something: a new one starts with none."""
    for part in module.modules():
        if isinstance(part, OffsetLearning):
            nn.init.normal_(part.class_offset.weight, std=part.class_offset.in_features**-0.5)
            nn.init.normal_(part.feature_offset.weight, std=part.feature_offset.in_features**-0.5)
    return module


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 3), (8, 8)])
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_equals_the_equations_and_their_gradients(
    size: tuple[int, int], per_image: bool, layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    offset = random_offsets(OffsetLearning(6).double())
    embeddings = torch.randn(*([2] if per_image else []), 4, 6, dtype=torch.float64, requires_grad=True)
    features = torch.randn(2, 6, *size, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    leaves = [embeddings, features, offset.class_offset.weight, offset.feature_offset.weight]
    expected = written_out(*leaves)
    result = offset(embeddings, features)
    torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-11)
    weight = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(result, leaves, weight), torch.autograd.grad(expected, leaves, weight), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_classifier_ends_in_a_layer_norm_over_classes() -> None:
    torch.manual_seed(0)
    head = random_offsets(OffsetClassifier(6, 5).double())
    nn.init.uniform_(head.norm.weight, 0.5, 2)
    nn.init.uniform_(head.norm.bias, -1, 1)
    features = torch.randn(2, 6, 4, 3, dtype=torch.float64)
    m = written_out(head.embeddings, features, head.offset.class_offset.weight, head.offset.feature_offset.weight)
    mean, var = m.mean(1, keepdim=True), m.var(1, correction=0, keepdim=True)
    expected = (m - mean) / (var + 1e-5).sqrt() * head.norm.weight[:, None, None] + head.norm.bias[:, None, None]
    torch.testing.assert_close(head(features), expected, rtol=1e-10, atol=1e-10)
    head.norm = nn.Identity()
    torch.testing.assert_close(head(features), m, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("channels", "added"), [(256, 131_072), (512, 524_288)])
def test_parameters_added(channels: int, added: int) -> None:
    """+0.131 M at C = 256 and +0.524 M at C = 512: what P1 and P2 hold."""
    assert sum(p.numel() for p in OffsetLearning(channels).parameters()) == added
    plain = 150 * channels  # the class embeddings stand in for the 1x1 convolution's kernel
    assert sum(p.numel() for p in OffsetClassifier(channels, 150, norm=False).parameters()) == plain + added


def test_starts_as_the_product_that_it_replaces_and_learns() -> None:
    torch.manual_seed(0)
    head = OffsetClassifier(8, 5, norm=False)
    features = torch.randn(2, 8, 6, 7)
    logits = head(features)
    torch.testing.assert_close(logits, F.conv2d(features, head.embeddings[..., None, None]))
    F.cross_entropy(logits, torch.randint(5, (2, 6, 7))).backward()
    assert all(p.grad.abs().max() > 1e-4 for p in head.parameters())


@pytest.mark.parametrize(("classes", "nats"), [(19, 0.95), (11, 1.09)])
def test_layer_norm_keeps_a_sure_pixel_uncertain(classes: int, nats: float) -> None:
    """Why thresholds are calibrated a network: a one-hot row has this entropy behind the LayerNorm."""
    norm = OffsetClassifier(4, classes).norm
    one_hot = torch.zeros(classes)
    one_hot[0] = 100
    assert entropy(norm(one_hot).softmax(-1)).item() == pytest.approx(nats, abs=0.006)


@torch.no_grad()
def test_memory_is_linear_in_pixels_times_classes() -> None:
    """Three maps of N x K at the peak, no map of pixels by pixels and no second map of pixels by channels."""
    n, k, channels = 40 * 50, 7, 64
    head = random_offsets(OffsetClassifier(channels, k, norm=False))
    features = torch.randn(1, channels, 40, 50).contiguous(memory_format=torch.channels_last)
    with LiveTensors(n * k) as seen:
        head(features)
    assert seen.peak - channels / k == pytest.approx(3)  # the features themselves show up as views


def test_deterministic_and_independent_of_the_batch() -> None:
    torch.manual_seed(0)
    head = random_offsets(OffsetClassifier(8, 5))
    features = torch.randn(3, 8, 9, 7)
    logits = head(features)
    assert torch.equal(logits, head(features))
    torch.testing.assert_close(logits[1:2], head(features[1:2]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reduced_precision_stays_close(dtype: torch.dtype) -> None:
    """A softmax over many pixels holds values that half precision can barely tell from zero."""
    torch.manual_seed(0)
    head = random_offsets(OffsetClassifier(32, 11)).requires_grad_(False)
    features = torch.randn(1, 32, 160, 160)
    expected = head(features)
    with torch.autocast("cpu", dtype):
        result = head(features)
    assert (result.float() - expected).abs().max() < (0.02 if dtype == torch.float16 else 0.15)


def test_compact_keys_without_offsets_are_unchanged() -> None:
    plain, offset = CompactSegmenter(11).state_dict(), CompactSegmenter(11, offsets=True).state_dict()
    assert {k for k in plain if k.startswith("classifier")} == {"classifier.weight", "classifier.bias"}
    shared = {k for k in plain if not k.startswith("classifier")}
    assert shared == {k for k in offset if not k.startswith("classifier")}
    assert offset["classifier.embeddings"].shape == (11, 32)
    CompactSegmenter(11, **Bundle.load("camvid").dense.args)  # what ships still builds


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("size", [(33, 47), (64, 96)])
def test_compact_with_offsets_classifies_its_last_features(size: tuple[int, int], norm: bool) -> None:
    torch.manual_seed(0)
    network = random_offsets(CompactSegmenter(5, (8, 8, 8, 8), (1, 1, 1), offsets=True, offset_norm=norm)).eval()
    seen: list[Tensor] = []
    network.mix2.register_forward_hook(lambda *call: seen.append(call[2]))
    logits = network(torch.randn(2, 3, *size))
    assert logits.shape == (2, 5, *size)
    classifier = network.classifier
    m = written_out(
        classifier.embeddings, seen[0], classifier.offset.class_offset.weight, classifier.offset.feature_offset.weight
    )
    if norm:
        m = F.layer_norm(m.movedim(1, -1), (5,)).movedim(-1, 1)
    expected = F.interpolate(m, size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_bundle_with_offsets_segments(tmp_path: Path, frame: np.ndarray) -> None:
    torch.manual_seed(0)
    args = {"widths": [8, 8, 8, 8], "depths": [1, 1, 1], "offsets": True}
    network = random_offsets(CompactSegmenter(len(CAMVID), **args)).eval()
    spec = save_network(tmp_path, network, "compact", args, "dense.safetensors")
    Bundle(tmp_path, "offsets", CAMVID, 0.5, (64, 96), spec, entropy_threshold=1.5).save()
    mask = Segmenter(Bundle.load(tmp_path), "cpu").segment([frame])[0].mask
    assert mask.shape == (64, 96) and len(np.unique(mask)) > 1


@pytest.mark.parametrize(("size", "millions"), [("b0", 3.75), ("b2", 24.76), ("b5", 82.01)])
def test_segformer_grows_by_the_offsets(size: str, millions: float) -> None:
    """At K = 150; mmseg's own networks have 3.8, 24.8 and 82.0 M."""
    pytest.importorskip("transformers")
    with torch.device("meta"):
        plain, offset = (
            sum(p.numel() for p in SegFormer(150, size, offsets).parameters()) for offsets in (False, True)
        )
    assert plain / 1e6 == pytest.approx(millions, abs=0.01)
    assert offset - plain == 2 * 256**2 + 150  # LayerNorm's gain and bias come, the convolution's bias goes


@torch.no_grad()
def test_segformer_classifies_pooled_features() -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    network = random_offsets(SegFormer(5)).double().eval()
    seen: list[Tensor] = []
    network.fusion.register_forward_hook(lambda *call: seen.append(call[2]))
    images = torch.randn(2, 3, 39, 50, dtype=torch.float64)
    logits = network(images)
    assert seen[0].shape == (2, 256, 10, 13)  # stride 4
    pooled = F.max_pool2d(F.pad(seen[0], (0, 1)), 2)  # the features follow a ReLU: zeros never win
    head = network.classifier
    m = written_out(head.embeddings, pooled, head.offset.class_offset.weight, head.offset.feature_offset.weight)
    m = F.layer_norm(m.movedim(1, -1), (5,)).movedim(-1, 1)
    expected = F.interpolate(m, (39, 50), mode="bilinear", align_corners=False)
    torch.testing.assert_close(logits, expected, rtol=1e-8, atol=1e-8)
    with pytest.raises(ValueError, match="'b9'; known are b0"):
        SegFormer(5, "b9")


@pytest.mark.parametrize(
    ("size", "millions", "added"),
    [("T", 4.3, 131_072), ("S", 13.9, 131_072), ("B", 27.6, 524_288), ("L", 48.9, 2_097_152)],
)
def test_segnext_has_the_published_parameters(size: str, millions: float, added: int) -> None:
    """At K = 150, as for ADE20K."""
    with torch.device("meta"):
        plain, offset = (sum(p.numel() for p in SegNeXt(150, size, offsets).parameters()) for offsets in (False, True))
    assert plain / 1e6 == pytest.approx(millions, abs=0.06)
    assert offset - plain == added + 150


def test_explaining_by_bases_is_matrix_factorisation() -> None:
    """Lee and Seung's updates, codes first, from codes that are a softmax and bases that are one fixed draw."""
    torch.manual_seed(0)
    x = torch.rand(2, 24, 3, dtype=torch.float64) @ torch.rand(2, 3, 50, dtype=torch.float64)  # rank 3, not negative
    x.requires_grad_()
    rebuilt = explain(x)
    bases = torch.rand(24, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bases = (bases / (bases**2).sum(0).sqrt()).repeat(2, 1, 1)
    codes = torch.einsum("bcn,bcr->bnr", x, bases).softmax(2)
    for step in range(8):
        model = torch.einsum("bcr,bnr->bcn", bases, codes)
        codes = codes * torch.einsum("bcn,bcr->bnr", x, bases) / (torch.einsum("bcn,bcr->bnr", model, bases) + 1e-6)
        if step < 7:
            model = torch.einsum("bcr,bnr->bcn", bases, codes)
            bases = bases * torch.einsum("bcn,bnr->bcr", x, codes) / (torch.einsum("bcn,bnr->bcr", model, codes) + 1e-6)
    torch.testing.assert_close(rebuilt, torch.einsum("bcr,bnr->bcn", bases, codes), rtol=1e-9, atol=1e-9)
    assert torch.equal(rebuilt, explain(x))
    torch.testing.assert_close(explain(x[1:]), rebuilt[1:])  # images do not mix
    (gradient,) = torch.autograd.grad(rebuilt.sum(), x)
    assert gradient.abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1), (45, 70)])
def test_segnext_classifies_its_aligned_features(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    network = random_offsets(SegNeXt(5)).double().eval()
    seen: list[Tensor] = []
    network.align.register_forward_hook(lambda *call: seen.append(call[2]))
    logits = network(torch.randn(2, 3, *size, dtype=torch.float64))
    assert seen[0].shape[-2:] == tuple(-(-side // 8) for side in size)
    head = network.classifier
    m = written_out(head.embeddings, seen[0], head.offset.class_offset.weight, head.offset.feature_offset.weight)
    m = F.layer_norm(m.movedim(1, -1), (5,)).movedim(-1, 1)
    expected = F.interpolate(m, size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(logits, expected, rtol=1e-8, atol=1e-8)


def test_replacing_a_classifier_keeps_its_kernel_and_place() -> None:
    """Any head that ends in a 1x1 convolution."""
    torch.manual_seed(0)
    network = nn.ModuleDict({"head": nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 1))}).double()
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    before, bias = network["head"](x), network["head"][1].bias[:, None, None]
    replace_classifier(network, "head.1")
    plain = F.layer_norm((before - bias).movedim(1, -1), (5,)).movedim(-1, 1)
    torch.testing.assert_close(network["head"](x), plain + bias)
    for name, message in (("head.7", "no part 'head.7'"), ("head.0", "replaces a 1x1 convolution")):
        with pytest.raises(ValueError, match=message):
            replace_classifier(network, name)


@pytest.fixture
def mask2former() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    swin = transformers.SwinConfig(
        embed_dim=12, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.Mask2FormerConfig(
        backbone_config=swin, hidden_dim=32, feature_size=32, mask_feature_size=32, num_attention_heads=4,
        dim_feedforward=16, encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=4, num_queries=6, num_labels=5,
    )  # fmt: skip
    model: nn.Module = transformers.Mask2FormerModel(config).eval()
    return model


@torch.no_grad()
def test_mask2former_predicts_every_mask_with_offsets(mask2former: nn.Module) -> None:
    images = torch.randn(2, 3, 64, 96)
    before = mask2former(images)
    assert replace_mask_predictor(mask2former) == 2 * 32**2
    same = mask2former(images)
    torch.testing.assert_close(same.masks_queries_logits, before.masks_queries_logits, rtol=1e-4, atol=1e-4)

    random_offsets(mask2former)
    seen: list[tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]]] = []
    predictor = next(m for m in mask2former.modules() if isinstance(m, OffsetMaskPredictor))
    predictor.register_forward_hook(lambda _, inputs, outputs: seen.append((inputs, outputs)))
    result = mask2former(images)
    assert len(seen) == 4  # one before the first layer and one after each
    for (queries, features, size), (masks, outside) in seen:
        embeddings = predictor.mask_embedder(queries.transpose(0, 1))
        offset = predictor.offset
        expected = written_out(embeddings, features, offset.class_offset.weight, offset.feature_offset.weight)
        torch.testing.assert_close(masks, expected, rtol=1e-3, atol=1e-3)
        resized = F.interpolate(masks, size, mode="bilinear", align_corners=False)
        for image in range(2):
            for head in range(4):  # heads of one image stand together
                assert torch.equal(outside[image * 4 + head], (resized[image] < 0).flatten(1))
    assert torch.equal(result.masks_queries_logits[-1], seen[-1][1][0])
    assert (result.masks_queries_logits[-1] - before.masks_queries_logits[-1]).abs().max() > 0.01
    with pytest.raises(ValueError, match="Linear has no mask predictor"):
        replace_mask_predictor(nn.Linear(2, 2))


@torch.no_grad()
def test_the_shipped_bundle_means_what_it_meant() -> None:
    """Every 8447th logit of models/camvid-offseg, as they were when it was trained."""
    bundle = Bundle.load(Path(__file__).parents[1] / "models" / "camvid-offseg")
    network = build(DENSE, bundle.dense.network, len(bundle.classes), bundle.dense.args)
    load_network(bundle.path, bundle.dense, network)
    images = torch.from_numpy(np.random.RandomState(0).uniform(-2, 2, (1, 3, 64, 96)))
    expected = [-2.76302111, -1.02817310, -2.17219604, -3.07306947, -0.67439925, -2.72769834, -2.02852137, -2.56274041,
                -2.32593142]  # fmt: skip
    logits = network.double().eval()(images).flatten()[::8447]
    torch.testing.assert_close(logits, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-7)
