"""The Superpixel Transformer against its equations written out, its figures and its promises about sizes.

Shape shorthand as in `networks.superpixel`; G = Gy Gx.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from test_local_attention import dense_attention
from torch import Tensor, nn
from torch.nn import functional as F

from sparserefine_ros.networks import association
from sparserefine_ros.networks.association import assign, associations, project
from sparserefine_ros.networks.backbones import BACKBONES, build_backbone
from sparserefine_ros.networks.boundaries import draw_boundaries
from sparserefine_ros.networks.hypercolumn import Hypercolumn
from sparserefine_ros.networks.macs import dense_macs
from sparserefine_ros.networks.registry import DENSE, build
from sparserefine_ros.networks.superpixel import PAPER, DualPathLayer, SuperpixelTransformer

SMALL = {"channels": 16, "grid": (3, 4), "global_layers": 1, "global_heads": 2}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def small(**changes: Any) -> SuperpixelTransformer:
    torch.manual_seed(0)
    return SuperpixelTransformer(5, **{**SMALL, **changes}).eval()


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("backbone", "changes", "millions"),
    [
        ("resnet50", {}, 29),
        ("convnext_large", {}, 202),
        ("resnet50", {"local_layers": 1}, 28),
        ("resnet50", {"grid": (16, 32), "superpixel_stride": 64}, 29),
        ("resnet50", {"grid": (64, 128), "superpixel_stride": 16}, 31),
    ],
    ids=str,
)
def test_parameter_counts_are_the_papers(backbone: str, changes: dict[str, Any], millions: int) -> None:
    """Table I, and the ablations of Table III."""
    pytest.importorskip("transformers")
    with torch.device("meta"):
        network = SuperpixelTransformer(19, backbone, **{**PAPER, **changes})
    assert round(parameters(network) / 1e6) == millions
    assert parameters(network) == pytest.approx(millions * 1e6, rel=0.03)


def test_parameters_without_the_backbone_by_hand() -> None:
    c, k, (gy, gx) = 256, 19, (32, 64)
    with torch.device("meta"):
        network = SuperpixelTransformer(k, "compact", **PAPER)
    linear, norm = c * c + c, 2 * c
    expected = {
        "columns": (32 + 64 + 128 + 192) * c + 4 * c + 4 * linear,
        "queries": gy * gx * c,
        "positions": (gy * gx // 16 + gy * gx) * c,
        "local": 2 * (2 * 6 * linear + 2 * norm) + 2 * norm,
        "layers": 4 * (4 * linear + 2 * c * 2 * c + 3 * c + 2 * norm),
        "classifier": norm + c * k + k,
    }
    assert parameters(network) - parameters(network.encoder) == sum(expected.values())


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_give_the_channels_and_strides_they_name(name: str) -> None:
    if name != "compact":
        pytest.importorskip("transformers")
    with torch.device("meta"):
        backbone = build_backbone(name).eval()
        features = backbone(torch.empty(2, 3, 96, 64))
    expected = [(2, c, 96 // s, 64 // s) for c, s in zip(backbone.channels, backbone.strides, strict=True)]
    assert [tuple(x.shape) for x in features] == expected


@pytest.mark.parametrize(("stride", "strides"), [(8, (2, 8, 32)), (4, (2, 4, 8, 16)), (12, (4, 2, 24)), (6, (2, 6))])
def test_hypercolumn_equals_the_papers_order(stride: int, strides: tuple[int, ...]) -> None:
    """A perceptron on every position of every level, then the resize, then the sum (section III-A)."""
    torch.manual_seed(1)
    columns = Hypercolumn([3 + i for i in range(len(strides))], strides, 7, stride).double()
    features = [randn(2, 3 + i, 96 // s, 192 // s, seed=i) for i, s in enumerate(strides)]
    expected = torch.zeros(2, 7, 96 // stride, 192 // stride, dtype=torch.float64)
    for x, first, last in zip(features, columns.first, columns.last, strict=True):
        y = last(first(x.permute(0, 2, 3, 1)).relu()).permute(0, 3, 1, 2)
        expected += F.interpolate(y, expected.shape[2:], mode="bilinear", align_corners=False)
    torch.testing.assert_close(columns(features), expected.permute(0, 2, 3, 1), rtol=1e-12, atol=1e-12)


def test_a_dual_path_layer_reads_both_sides_as_they_were() -> None:
    torch.manual_seed(2)
    layer = DualPathLayer(8, 2).double()
    pixels, superpixels = randn(1, 2, 3, 4, 8, seed=1), randn(1, 2, 3, 8, seed=2)
    positions, superpixel_positions = randn(1, 2, 3, 4, 8, seed=3), randn(1, 2, 3, 8, seed=4)
    updates = dense_attention(
        layer.pixel_mlp(layer.pixel_norm(pixels) + positions),
        layer.superpixel_mlp(layer.superpixel_norm(superpixels) + superpixel_positions), 2,
    )  # fmt: skip
    actual = layer(pixels, superpixels, positions, superpixel_positions)
    torch.testing.assert_close(actual, (pixels + updates[0], superpixels + updates[1]), rtol=1e-12, atol=1e-12)


def to_map(pixels: Tensor, cell: tuple[int, int]) -> Tensor:
    """[B, Gy, Gx, h w, C] to [B, C, Gy h, Gx w]."""
    return pixels.unflatten(3, cell).permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def written_out(pixels: Tensor, superpixels: Tensor, cell: tuple[int, int], scale: int, kind: str) -> Tensor:
    """Associations [B, H, W, G] after the softmax, 0 for superpixels that are no neighbours of the pixel's cell."""
    batch, gy, gx = superpixels.shape[:3]
    fine = pixel_cells(gy * gx, gx, (cell[0] * scale, cell[1] * scale))  # [H, W]
    row, column = torch.arange(gy * gx) // gx, torch.arange(gy * gx) % gx
    dy, dx = row - row[:, None], column - column[:, None]  # from one cell to another
    near = (dy.abs() <= 1) & (dx.abs() <= 1)
    products = torch.einsum("bchw,bgc->bghw", to_map(pixels, cell), superpixels.flatten(1, 2))
    if kind == "absolute":
        resized = F.interpolate(products, scale_factor=scale, mode="bilinear", align_corners=False)
        scores = resized.permute(0, 2, 3, 1)  # [B, H, W, G]
    else:
        # Nine channels relative to the pixel's own cell, 0 where the grid ends; then the plain resize of those.
        coarse = pixel_cells(gy * gx, gx, cell)  # [Gy h, Gx w]
        number = (3 * (dy + 1) + dx + 1).where(near, 9)  # [G, G]: which neighbour of one cell another is
        relative = F.one_hot(number[coarse], 10)[..., :9].double()  # [h, w, G, 9]
        relative = torch.einsum("bghw,hwgn->bnhw", products, relative)
        resized = F.interpolate(relative, scale_factor=scale, mode="bilinear", align_corners=False)
        scores = torch.einsum("bnhw,hwgn->bhwg", resized, F.one_hot(number[fine], 10)[..., :9].double())
    return scores.masked_fill(~near[fine], -torch.inf).softmax(-1)


def pixel_cells(count: int, gx: int, size: tuple[int, int]) -> Tensor:
    """The cell of every pixel, where cells have ``size`` pixels."""
    return torch.arange(count).view(-1, gx).repeat_interleave(size[0], 0).repeat_interleave(size[1], 1)


@pytest.fixture(params=[1, 1 << 40], ids=["a row at a time", "all at once"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(association, "BLOCK_ELEMENTS", request.param)


@pytest.mark.parametrize("kind", association.ASSOCIATIONS)
@pytest.mark.parametrize(("grid", "cell", "scale"), [((3, 4), (2, 2), 4), ((1, 3), (4, 4), 2), ((2, 1), (3, 1), 3)])
@torch.no_grad()
def test_projection_and_assignment_equal_the_equations(
    grid: tuple[int, int], cell: tuple[int, int], scale: int, kind: str, block: None
) -> None:
    pixels, superpixels = randn(2, *grid, cell[0] * cell[1], 6, seed=1), randn(2, *grid, 6, seed=2)
    classes = randn(2, *grid, 5, seed=3)
    expected = written_out(pixels, superpixels, cell, scale, kind)  # [B, H, W, G]
    logits = project(pixels, superpixels, classes, cell, scale, kind)
    reference = torch.einsum("bhwg,bgk->bkhw", expected, classes.flatten(1, 2))
    torch.testing.assert_close(logits, reference, rtol=1e-10, atol=1e-10)
    assert torch.equal(assign(pixels, superpixels, cell, scale, kind), expected.argmax(-1))
    for rows, scores in associations(pixels, superpixels, cell, scale, kind):
        weights = scores.softmax(3)
        torch.testing.assert_close(weights.sum(3), torch.ones_like(weights[:, :, :, 0]))
        if rows.start == 0:
            assert (weights[:, 0, :, :3] == 0).all()  # nothing above the grid
        if rows.stop == grid[0]:
            assert (weights[:, -1, :, 6:] == 0).all()
        assert (weights[:, :, 0, ::3] == 0).all() and (weights[:, :, -1, 2::3] == 0).all()


@torch.no_grad()
def test_relative_associations_go_wrong_beside_borders_of_cells_and_nowhere_else() -> None:
    """The measurement behind the default: where two cells meet, half a pixel on both sides mixes superpixels."""
    grid, (h, w), scale = (6, 7), (4, 4), 8
    pixels, superpixels = randn(1, *grid, h * w, 32, seed=1), randn(1, *grid, 32, seed=2)
    (_, absolute), (_, relative) = (
        next(associations(pixels, superpixels, (h, w), scale, kind)) for kind in association.ASSOCIATIONS
    )
    differs = ((absolute.softmax(3) - relative.softmax(3)).abs() > 1e-9).any(3)  # [1, Gy, Gx, S, S]
    beside = torch.ones(h * scale, w * scale, dtype=torch.bool)
    beside[scale // 2 : -scale // 2, scale // 2 : -scale // 2] = False
    inner = differs[0, 1:-1, 1:-1]
    assert torch.equal(inner, beside.expand_as(inner))
    assert float(inner.double().mean()) == 1 - (1 - 1 / h) ** 2  # 44 % of all pixels
    swapped = (absolute.argmax(3) != relative.argmax(3))[0, 1:-1, 1:-1]
    assert 0.3 < float(swapped[:, :, beside].double().mean()) < 0.7  # near half of those change their superpixel


def test_boundaries_are_drawn_between_superpixels() -> None:
    image = np.full((3, 4, 3), 7, np.uint8)
    ids = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 2, 2]])
    drawn = draw_boundaries(image, ids, (1, 2, 3))
    lines = np.array([[0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], bool)
    assert (drawn[lines] == (1, 2, 3)).all() and (drawn[~lines] == 7).all()
    assert drawn.dtype == np.uint8 and (image == 7).all()
    with pytest.raises(ValueError, match="3, 3.*3, 4"):
        draw_boundaries(image, ids[:, :3])


@pytest.mark.parametrize("size", [(48, 64), (1, 1), (17, 16), (45, 83), (180, 240)])
@torch.inference_mode()
def test_any_size_comes_out_as_it_went_in(size: tuple[int, int]) -> None:
    network, images = small(), torch.randn(2, 3, *size)
    logits = network(images)
    assert logits.shape == (2, 5, *size) and logits.isfinite().all()
    assert torch.equal(logits, network(images))
    ids = network.superpixels(images)
    gy, gx = -(-size[0] // 16), -(-size[1] // 16)
    assert ids.shape == (2, *size) and int(ids.min()) >= 0 and int(ids.max()) < gy * gx
    # Every superpixel stays within the cells around its own.
    rows, columns = torch.arange(size[0])[:, None] // 16, torch.arange(size[1]) // 16
    assert int((ids // gx - rows).abs().max()) <= 1 and int((ids % gx - columns).abs().max()) <= 1


@torch.inference_mode()
def test_sizes_between_strides_are_extended_by_their_edge() -> None:
    network, images = small(), torch.randn(1, 3, 40, 50)
    extended = F.pad(images, (0, 14, 0, 8), mode="replicate")
    assert torch.equal(network(images), network(extended)[:, :, :40, :50])


@pytest.mark.parametrize("size", [(48, 64), (45, 83)])
@torch.inference_mode()
def test_residual_adds_the_logits_of_every_pixels_own_features(size: tuple[int, int]) -> None:
    network, plain, images = small(residual=True).double(), small().double(), randn(2, 3, *size)
    missing, left = plain.load_state_dict(network.state_dict(), strict=False)
    assert not missing and left == ["pixel_classifier.weight", "pixel_classifier.bias"]
    pixels, _ = network.tokenize(network.hypercolumn(network.backbone(images)))
    classifier = network.pixel_classifier
    own = (
        torch.einsum("bchw,kc->bkhw", to_map(pixels, network.cell), classifier.weight) + classifier.bias[:, None, None]
    )
    own = F.interpolate(own, scale_factor=4, mode="bilinear", align_corners=False)
    expected = plain(images) + own[:, :, : size[0], : size[1]]
    torch.testing.assert_close(network(images), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("changes", [{}, {"association": "relative"}, {"residual": True}], ids=str)
def test_half_precision_stays_close_and_trains(changes: dict[str, Any]) -> None:
    network, images = small(**changes), torch.randn(1, 3, 45, 64)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(images)
    logits.float().square().mean().backward()
    assert logits.dtype == torch.bfloat16 and network.queries.grad is not None
    expected = network(images)
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.05 * float(expected.detach().abs().max()))


@torch.inference_mode()
def test_its_multiply_adds_can_be_counted() -> None:
    """Two layers for query, key and value on both sides; two products a direction with 9 neighbours of every pixel."""
    network = small(local_layers=3)
    pixels = network.hypercolumn(network.backbone(torch.randn(1, 3, 48, 64)))
    cells, c, p = 12, 16, 16
    expected = 3 * (6 * c * c * cells * (p + 1) + 4 * 9 * c * cells * p)
    assert dense_macs(lambda: network.tokenize(pixels)) == expected


@torch.inference_mode()
def test_images_of_a_batch_do_not_see_each_other() -> None:
    network, images = small().double(), randn(3, 3, 48, 64)
    for image, logits in zip(images, network(images), strict=True):
        torch.testing.assert_close(network(image[None])[0], logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("changes", [{}, {"association": "relative"}, {"residual": True}], ids=str)
def test_gradients_reach_every_parameter(changes: dict[str, Any]) -> None:
    network = small(**changes).train()
    F.cross_entropy(network(torch.randn(2, 3, 45, 64)), torch.randint(5, (2, 45, 64))).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # A key's bias adds the same to all scores of a softmax.
        assert parameter.grad.abs().max() > 0 or name.endswith("last.1.bias"), name


def test_it_learns_a_boundary_within_cells() -> None:
    """A diagonal edge between two colours, in seconds."""
    network = small(channels=32).train()
    labels = (torch.arange(64)[:, None] + 0.7 * torch.arange(64) > 55).long()[None]  # [1, H, W]
    images = torch.stack([labels * 2.0 - 1, 1 - labels * 2.0, labels * 0.0], 1) + 0.1 * torch.randn(1, 3, 64, 64)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
    assert float((network(images).argmax(1) == labels).float().mean()) > 0.98


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"backbone": "vgg"}, "vgg.*compact, resnet50, convnext_large"),
        ({"superpixel_stride": 18}, "18.*pixel stride 4"),
        ({"channels": 30, "local_heads": 4}, "30 channels.*local_heads=4"),
        ({"pixel_stride": 6, "superpixel_stride": 24}, "pixel stride 6.*encoder's 4"),
        ({"association": "soft"}, "soft.*absolute, relative"),
        ({"width": 3}, "does not take"),
    ],
)
def test_arguments_that_do_not_fit(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(DENSE, "superpixel", 5, args)


def test_without_transformers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="resnet50.*pip install transformers"):
        build(DENSE, "superpixel", 5, {"backbone": "resnet50"})
