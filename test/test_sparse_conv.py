"""Sparse convolution against dense conv2d and conv_transpose2d, values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from sparserefine_ros.sparse import (
    STRIDE_MODES,
    KernelMap,
    Pyramid,
    SiteSet,
    StridedConv2d,
    SubmanifoldConv2d,
    TransposedConv2d,
    sparse_conv,
    sparse_conv_transposed,
    submanifold_map,
)
from sparserefine_ros.sparse import conv as conv_module

PADDING = {"dilate": 0, "floor": 1}
KINDS = ("submanifold", "strided", "transposed")


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    """[B, H, W]: random, empty and full, with empty members, sides from 1 (single pixels, 1xN images)."""
    batch = draw(st.integers(1, 3))
    height, width = draw(st.integers(1, 13)), draw(st.integers(1, 13))
    density = draw(st.sampled_from([0.0, 0.02, 0.2, 0.5, 0.9, 1.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    mask = torch.rand(batch, height, width, generator=generator) < density
    if draw(st.booleans()):
        mask[draw(st.integers(0, batch - 1))] = False
    return mask


def pixel_mask(height: int, width: int, *pixels: tuple[int, int]) -> Tensor:
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    for row, column in pixels:
        mask[0, row, column] = True
    return mask


def dense_weight(weight: Tensor) -> Tensor:
    """The official layout: [9, Cin, Cout] -> conv2d's [Cout, Cin, 3, 3]."""
    return weight.view(3, 3, *weight.shape[1:]).permute(3, 2, 1, 0)


def dense_reference(kind: str, pyramid: Pyramid, x: Tensor, weight: Tensor) -> Tensor:
    """The same layer on the masked dense image, read at the output sites."""
    fine, coarse = pyramid.levels[:2]
    padding = PADDING[pyramid.stride_mode]
    kernel = dense_weight(weight)
    if kind == "submanifold":
        return fine.gather(F.conv2d(fine.scatter(x), kernel, padding=1))
    if kind == "strided":
        if len(coarse) == 0:  # conv2d refuses images smaller than its kernel
            return x.new_zeros(0, weight.shape[2])
        return coarse.gather(F.conv2d(fine.scatter(x), kernel, stride=2, padding=padding))
    if len(coarse) == 0:
        return x.new_zeros(len(fine), weight.shape[2])
    _, height, width = fine.shape
    full = F.conv_transpose2d(coarse.scatter(x), kernel.transpose(0, 1), stride=2)
    full = F.pad(full, (0, 2, 0, 2))[:, :, padding : padding + height, padding : padding + width]
    return fine.gather(full)


def apply(kind: str, pyramid: Pyramid, x: Tensor, weight: Tensor) -> Tensor:
    if kind == "submanifold":
        return sparse_conv(x, weight, pyramid.submanifold[0])
    if kind == "strided":
        return sparse_conv(x, weight, pyramid.strided[0])
    return sparse_conv_transposed(x, weight, pyramid.strided[0])


def features(kind: str, pyramid: Pyramid, channels: int, generator: torch.Generator) -> Tensor:
    rows = len(pyramid.levels[1 if kind == "transposed" else 0])
    return torch.randn(rows, channels, dtype=torch.float64, generator=generator)


def check_against_dense(kind: str, mode: str, mask: Tensor, cin: int, cout: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    pyramid = Pyramid.build(mask, 2, mode)
    x = features(kind, pyramid, cin, generator).requires_grad_()
    weight = torch.randn(9, cin, cout, dtype=torch.float64, generator=generator).requires_grad_()
    ours, dense = apply(kind, pyramid, x, weight), dense_reference(kind, pyramid, x, weight)
    torch.testing.assert_close(ours, dense, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        assert torch.equal(apply(kind, pyramid, x, weight), ours)
    upstream = torch.randn(ours.shape, dtype=torch.float64, generator=generator)
    ours_gradients = torch.autograd.grad(ours, (x, weight), upstream)
    if dense.requires_grad:
        dense_gradients = torch.autograd.grad(dense, (x, weight), upstream)
    else:
        dense_gradients = (torch.zeros_like(x), torch.zeros_like(weight))
    for ours_gradient, dense_gradient in zip(ours_gradients, dense_gradients, strict=True):
        torch.testing.assert_close(ours_gradient, dense_gradient, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("mode", STRIDE_MODES)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(masks(), st.integers(1, 4), st.integers(1, 4), st.integers(0, 1000))
def test_values_and_gradients_equal_the_dense_layers(
    kind: str, mode: str, mask: Tensor, cin: int, cout: int, seed: int
) -> None:
    check_against_dense(kind, mode, mask, cin, cout, seed)


@pytest.mark.parametrize("mode", STRIDE_MODES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(torch.zeros(2, 5, 6, dtype=torch.bool), id="empty"),
        pytest.param(torch.ones(2, 8, 7, dtype=torch.bool), id="full"),
        pytest.param(torch.ones(1, 1, 9, dtype=torch.bool), id="one row"),
        pytest.param(torch.ones(1, 9, 1, dtype=torch.bool), id="one column"),
        pytest.param(torch.ones(1, 1, 1, dtype=torch.bool), id="one by one"),
        pytest.param(pixel_mask(6, 6, (0, 0)), id="first pixel"),
        pytest.param(pixel_mask(6, 6, (5, 5)), id="last pixel"),
        pytest.param(pixel_mask(7, 7, (4, 4)), id="inner pixel"),
        pytest.param(torch.stack([torch.zeros(5, 5), torch.ones(5, 5), torch.zeros(5, 5)]) > 0, id="empty members"),
    ],
)
def test_edge_cases_equal_the_dense_layers(kind: str, mode: str, mask: Tensor) -> None:
    check_against_dense(kind, mode, mask, 2, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_do_not_change_the_result(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_module, "CPU_CHUNK_ELEMENTS", 0)
    monkeypatch.setattr(conv_module, "MIN_CHUNK_ROWS", 5)
    mask = torch.rand(2, 13, 11, generator=torch.Generator().manual_seed(1)) < 0.6
    for mode in STRIDE_MODES:
        check_against_dense(kind, mode, mask, 3, 2)


def test_weight_layout_is_the_official_one() -> None:
    """k = kh + 3 * kw, in = out + (kh - 1, kw - 1): tap 1 is to the left, tap 3 above, tap 8 below right."""
    pixels = ((0, 1), (1, 0), (1, 1), (2, 2))
    x = torch.tensor([[1.0], [10.0], [100.0], [1000.0]])
    weight = torch.zeros(9, 1, 1)
    weight[1], weight[3], weight[8] = 3.0, 2.0, 5.0
    out = sparse_conv(x, weight, submanifold_map(SiteSet.from_mask(pixel_mask(3, 3, *pixels))))
    # Only (1, 1) has active neighbours there: (1, 0) to the left, (0, 1) above, (2, 2) below right.
    assert out.tolist() == [[0.0], [0.0], [3 * 10.0 + 2 * 1.0 + 5 * 1000.0], [0.0]]


def test_strided_and_transposed_taps_by_hand() -> None:
    """in = 2 * out + (kh, kw), and back with the same tap: no flip."""
    pyramid = Pyramid.build(pixel_mask(3, 3, (0, 1), (2, 2)), 2, "dilate")
    weight = torch.arange(9.0).view(9, 1, 1)
    x = torch.tensor([[1.0], [10.0]])
    assert sparse_conv(x, weight, pyramid.strided[0]).tolist() == [[3.0 + 80.0]]  # taps 0 + 3 * 1 and 2 + 3 * 2
    assert sparse_conv_transposed(torch.ones(1, 1), weight, pyramid.strided[0]).tolist() == [[3.0], [8.0]]


def test_gradcheck() -> None:
    generator = torch.Generator().manual_seed(2)
    pyramid = Pyramid.build(torch.rand(2, 5, 5, generator=generator) < 0.5, 2)
    weight = torch.randn(9, 2, 2, dtype=torch.float64, generator=generator).requires_grad_()
    for kind in KINDS:
        x = features(kind, pyramid, 2, generator).requires_grad_()
        assert torch.autograd.gradcheck(lambda x, w, kind=kind: apply(kind, pyramid, x, w), (x, weight))


@pytest.mark.parametrize("kind", KINDS)
def test_a_bias_alone_can_be_trained(kind: str) -> None:
    """On frozen weights and features without a gradient."""
    generator = torch.Generator().manual_seed(2)
    pyramid = Pyramid.build(torch.rand(2, 5, 5, generator=generator) < 0.5, 2)
    layer = dict(zip(KINDS, (SubmanifoldConv2d, StridedConv2d, TransposedConv2d), strict=True))[kind](2, 3, bias=True)
    layer.weight.requires_grad_(False)
    assert layer.bias is not None
    x = features(kind, pyramid, 2, generator).float()
    out = layer(x, pyramid.submanifold[0] if kind == "submanifold" else pyramid.strided[0])
    share = torch.randn(out.shape, generator=generator)
    (out * share).sum().backward()
    torch.testing.assert_close(layer.bias.grad, share.sum(0))


def test_levels_that_run_empty_have_defined_results() -> None:
    """A pixel at (1, 1) has no coarse path under "dilate": down gives no rows, and up again zeros."""
    pyramid = Pyramid.build(pixel_mask(8, 8, (1, 1)), 4, "dilate")
    assert [len(level) for level in pyramid.levels] == [1, 0, 0, 0]
    down, same = StridedConv2d(3, 4), SubmanifoldConv2d(4, 4, bias=True)
    up = TransposedConv2d(4, 2, bias=True)
    assert up.bias is not None
    torch.nn.init.constant_(up.bias, 0.5)
    x = torch.randn(1, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    coarse = same(down(x, pyramid.strided[0]), pyramid.submanifold[1])
    assert coarse.shape == (0, 4)
    assert same(StridedConv2d(4, 4)(coarse, pyramid.strided[1]), pyramid.submanifold[2]).shape == (0, 4)
    out = up(coarse, pyramid.strided[0])
    assert out.tolist() == [[0.5, 0.5]]
    out.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[0.0, 0.0, 0.0]]
    for layer in (down, same, up):
        assert layer.weight.grad is not None and float(layer.weight.grad.abs().sum()) == 0.0


@pytest.fixture(scope="module")
def larger() -> tuple[KernelMap, Tensor, Tensor, Tensor]:
    """Map, x, weight and upstream gradient of 6,000 sites, 24 channels (three chunks)."""
    generator = torch.Generator().manual_seed(4)
    sites = SiteSet.from_mask(torch.rand(1, 100, 120, generator=generator) < 0.5)
    x, upstream = (torch.randn(len(sites), 24, dtype=torch.float64, generator=generator) for _ in range(2))
    weight = torch.randn(9, 24, 24, dtype=torch.float64, generator=generator) / math.sqrt(9 * 24)
    return submanifold_map(sites), x, weight, upstream


def forward_and_gradients(
    kernel_map: KernelMap, x: Tensor, weight: Tensor, upstream: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    x, weight = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    out = sparse_conv(x, weight, kernel_map)
    return [out.detach(), *torch.autograd.grad(out, (x, weight), upstream.to(dtype))]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_precision(larger: tuple[KernelMap, Tensor, Tensor, Tensor], dtype: torch.dtype, tolerance: float) -> None:
    """Relative to float64 on the same (rounded) inputs, over the largest value."""
    kernel_map, *tensors = larger
    x, weight, upstream = (tensor.to(dtype) for tensor in tensors)
    exact = forward_and_gradients(kernel_map, x, weight, upstream, torch.float64)
    rounded = forward_and_gradients(kernel_map, x, weight, upstream, dtype)
    for reference, value in zip(exact, rounded, strict=True):
        assert value.dtype == dtype
        assert float((value.double() - reference).abs().max() / reference.abs().max()) <= tolerance


def test_independent_of_thread_count_and_deterministic(
    larger: tuple[KernelMap, Tensor, Tensor, Tensor],
) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(forward_and_gradients(*larger, torch.float32))
    finally:
        torch.set_num_threads(before)
    for first, again in zip(results[0], results[3], strict=True):
        assert torch.equal(first, again)
    for other in results[1:3]:
        for first, value in zip(results[0], other, strict=True):
            torch.testing.assert_close(value, first, rtol=1e-6, atol=1e-6 * float(first.abs().max()))


def test_autocast_computes_in_its_dtype_and_gives_gradients_in_the_parameters_dtype() -> None:
    pyramid = Pyramid.build(torch.ones(1, 6, 6, dtype=torch.bool), 2)
    layer = SubmanifoldConv2d(4, 4, bias=True)
    x = torch.randn(36, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    exact = layer(x, pyramid.submanifold[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x, pyramid.submanifold[0])
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=0, atol=0.05)
    out.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32


def test_input_that_is_not_contiguous_and_inference_mode() -> None:
    generator = torch.Generator().manual_seed(5)
    pyramid = Pyramid.build(torch.rand(1, 7, 7, generator=generator) < 0.6, 2)
    rows = len(pyramid.levels[0])
    x = torch.randn(5, rows, generator=generator).t()
    weight = torch.randn(3, 5, 9, generator=generator).permute(2, 1, 0)
    with torch.inference_mode():
        for kind in ("submanifold", "strided"):
            expected = apply(kind, pyramid, x.contiguous(), weight.contiguous())
            assert torch.equal(apply(kind, pyramid, x, weight), expected)


@pytest.mark.parametrize("layer", [SubmanifoldConv2d, StridedConv2d, TransposedConv2d])
def test_layers_have_official_shapes_and_kaiming_scale(
    layer: type[SubmanifoldConv2d | StridedConv2d | TransposedConv2d],
) -> None:
    torch.manual_seed(0)
    module = layer(32, 48, bias=True)
    assert module.weight.shape == (9, 32, 48)
    assert float(module.weight.detach().std()) == pytest.approx(math.sqrt(2 / (9 * 32)), rel=0.05)
    assert module.bias is not None and module.bias.tolist() == [0.0] * 48
    assert layer(32, 48).bias is None
    assert set(layer(2, 3).state_dict()) == {"weight"}
    with pytest.raises(ValueError, match="0 in, 3 out"):
        layer(0, 3)


def test_layers_apply_their_maps_and_bias() -> None:
    generator = torch.Generator().manual_seed(6)
    pyramid = Pyramid.build(torch.rand(1, 9, 9, generator=generator) < 0.7, 2, "floor")
    for kind, layer in zip(KINDS, (SubmanifoldConv2d, StridedConv2d, TransposedConv2d), strict=True):
        module = layer(3, 2, bias=True).double()
        assert module.bias is not None
        torch.nn.init.constant_(module.bias, 0.25)
        x = features(kind, pyramid, 3, generator)
        kernel_map = pyramid.submanifold[0] if kind == "submanifold" else pyramid.strided[0]
        expected = dense_reference(kind, pyramid, x, module.weight) + 0.25
        torch.testing.assert_close(module(x, kernel_map), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(15, 2), torch.zeros(9, 2, 3), r"\(15, 2\).*16 input sites: give \[16, 2\]"),
        (torch.zeros(16, 2, 1), torch.zeros(9, 2, 3), r"\(16, 2, 1\).*give \[16, 2\]"),
        (torch.zeros(16, 4), torch.zeros(9, 2, 3), r"4 channels, but the weight takes 2"),
        (torch.zeros(16, 2), torch.zeros(3, 2, 3, 3), r"\(3, 2, 3, 3\): give \[9, Cin, Cout\]"),
        (torch.zeros(16, 2), torch.zeros(8, 2, 3), r"\(8, 2, 3\): give \[9, Cin, Cout\]"),
        (torch.zeros(16, 2, dtype=torch.int64), torch.zeros(9, 2, 3), r"torch.int64: convert"),
        (
            torch.zeros(16, 2, dtype=torch.float64),
            torch.zeros(9, 2, 3),
            r"float64 and the weight torch.float32",
        ),
        (torch.zeros(16, 2, device="meta"), torch.zeros(9, 2, 3), r"move them to one device"),
    ],
)
def test_errors_name_the_value_and_the_remedy(x: Tensor, weight: Tensor, message: str) -> None:
    kernel_map = submanifold_map(SiteSet.from_mask(torch.ones(1, 4, 4, dtype=torch.bool)))
    with pytest.raises(ValueError, match=message):
        sparse_conv(x, weight, kernel_map)
