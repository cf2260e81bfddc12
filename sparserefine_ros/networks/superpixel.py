"""Superpixel Transformers for Efficient Semantic Segmentation (Zhu et al., 2023, arXiv 2309.16889).

Pixels and a grid of learned superpixels attend to their neighbours (`local_attention`), superpixels attend to each
other and are classified, and every pixel takes the classes of the superpixels it belongs to (`association`). What the
paper leaves open is decided, with reasons, in docs/superpixel.md.

Shape shorthand
    B images, K classes, C channels, H, W the images' size
    Gy, Gx    the grid of superpixels, each over a cell of P = h w pixels of the pixel stride
    L         levels of the backbone
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparserefine_ros.networks.association import ASSOCIATIONS, assign, project
from sparserefine_ros.networks.backbones import build_backbone, extend
from sparserefine_ros.networks.hypercolumn import Hypercolumn
from sparserefine_ros.networks.limits import check_flags, check_list, check_whole
from sparserefine_ros.networks.local_attention import QueryKeyValue, local_attention

# The paper's configuration on Cityscapes (section IV-A): 1024x2048 images, 32x64 superpixels.
PAPER: dict[str, Any] = {
    "channels": 256, "pixel_stride": 8, "superpixel_stride": 32, "grid": (32, 64),
    "local_layers": 2, "local_heads": 2, "global_layers": 4, "global_heads": 4,
}  # fmt: skip
MAX_STRIDE = 64  # images are extended to whole superpixels, and one is upsampled by a matrix
POSITION_SHARE = 4  # position embeddings are learned at 1/4 of a grid (section IV-A)


class SuperpixelTransformer(nn.Module):
    """Images to logits at the images' own size. The defaults are for 240x180 images and training from scratch.

    Args:
        num_classes: K.
        backbone: a name of `backbones`.
        channels: C of pixels and superpixels.
        pixel_stride, superpixel_stride: image pixels to one pixel feature, and to one superpixel, in both directions.
        grid: superpixels (rows, columns) for which queries and position embeddings are learned; for images of another
            size they are resized.
        local_layers, local_heads: dual-path cross-attention between pixels and superpixels.
        global_layers, global_heads: self-attention between superpixels.
        association: "absolute" or "relative", see `association`.
        residual: adds every pixel's own logits to those of its superpixels. Not in the paper: what is thinner than a
            superpixel, a pole or a sign, has none to take its class from.

    Raises ValueError for numbers that are not whole and above 0 (layers: from 0; strides: to MAX_STRIDE), strides and
    heads that do not divide, an unknown backbone or association.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "compact",
        channels: int = 96,
        pixel_stride: int = 4,
        superpixel_stride: int = 16,
        grid: Sequence[int] = (12, 15),
        local_layers: int = 2,
        local_heads: int = 2,
        global_layers: int = 4,
        global_heads: int = 4,
        association: str = "absolute",
        residual: bool = False,
    ) -> None:
        super().__init__()
        check_whole(channels=channels, local_heads=local_heads, global_heads=global_heads)
        check_whole(1, MAX_STRIDE, pixel_stride=pixel_stride, superpixel_stride=superpixel_stride)
        check_whole(0, local_layers=local_layers, global_layers=global_layers)
        check_list(2, grid=grid)
        check_flags(residual=residual)
        if superpixel_stride % pixel_stride:
            raise ValueError(f"superpixel stride {superpixel_stride} is no multiple of the pixel stride {pixel_stride}")
        for name, heads in {"local_heads": local_heads, "global_heads": global_heads}.items():
            if channels % heads:
                raise ValueError(f"{channels} channels do not divide into {name}={heads}")
        if association not in ASSOCIATIONS:
            raise ValueError(f"unknown association {association!r}; known are {', '.join(ASSOCIATIONS)}")
        self.association, self.scale = association, pixel_stride
        self.cell = (superpixel_stride // pixel_stride,) * 2
        self.encoder = build_backbone(backbone)
        self.multiple = math.lcm(superpixel_stride, *self.encoder.strides)
        self.columns = Hypercolumn(self.encoder.channels, self.encoder.strides, channels, pixel_stride)
        gy, gx = grid
        # A sixteenth and a fourth of the grid can be less than one position; one stays.
        pixel_positions = (math.ceil(gy * self.cell[0] / POSITION_SHARE), math.ceil(gx * self.cell[1] / POSITION_SHARE))
        superpixel_positions = (math.ceil(gy / POSITION_SHARE), math.ceil(gx / POSITION_SHARE))
        self.queries = _learned(channels, (gy, gx))
        self.pixel_positions = _learned(channels, pixel_positions)
        self.superpixel_positions = _learned(channels, superpixel_positions)
        for learned in (self.queries, self.pixel_positions, self.superpixel_positions):
            nn.init.trunc_normal_(learned, std=0.02)
        self.local = nn.ModuleList(DualPathLayer(channels, local_heads) for _ in range(local_layers))
        self.pixel_norm, self.superpixel_norm = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.layers = nn.ModuleList(SelfAttentionLayer(channels, global_heads) for _ in range(global_layers))
        self.class_norm, self.classifier = nn.LayerNorm(channels), nn.Linear(channels, num_classes)
        self.pixel_classifier = nn.Linear(channels, num_classes) if residual else None

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] to logits [B, K, H, W]."""
        pixels, superpixels = self.tokenize(self.hypercolumn(self.backbone(images)))
        logits = self.project(pixels, superpixels, self.attend(superpixels))
        return logits[:, :, : images.shape[2], : images.shape[3]]

    def superpixels(self, images: Tensor) -> Tensor:
        """Hard assignment (Eq. 7): the superpixel of every pixel [B, H, W] int64, numbered row by row in the grid."""
        pixels, superpixels = self.tokenize(self.hypercolumn(self.backbone(images)))
        ids = assign(pixels, superpixels, self.cell, self.scale, self.association)
        return ids[:, : images.shape[2], : images.shape[3]]

    # The stages of the paper's Table IV, one method each.

    def backbone(self, images: Tensor) -> Sequence[Tensor]:
        """L features [B, C_l, H / stride_l, W / stride_l]; images are first extended to whole cells by their edge."""
        features: Sequence[Tensor] = self.encoder(extend(images, self.multiple))
        return features

    def hypercolumn(self, features: Sequence[Tensor]) -> Tensor:
        """Pixel features [B, Gy, Gx, P, C]."""
        return _to_cells(self.columns(features), self.cell)

    def tokenize(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [B, Gy, Gx, P, C] and superpixels [B, Gy, Gx, C] once they have attended to each other."""
        batch, gy, gx = pixels.shape[:3]
        h, w = self.cell
        superpixels = _resized(self.queries, (gy, gx)).expand(batch, -1, -1, -1)
        positions = _to_cells(_resized(self.pixel_positions, (gy * h, gx * w)), self.cell)
        superpixel_positions = _resized(self.superpixel_positions, (gy, gx))
        for layer in self.local:
            pixels, superpixels = layer(pixels, superpixels, positions, superpixel_positions)
        return self.pixel_norm(pixels), self.superpixel_norm(superpixels)

    def attend(self, superpixels: Tensor) -> Tensor:
        """Class logits [B, Gy, Gx, K] of the superpixels [B, Gy, Gx, C]."""
        x = superpixels.flatten(1, 2)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.classifier(self.class_norm(x))
        return logits.unflatten(1, superpixels.shape[1:3])

    def project(self, pixels: Tensor, superpixels: Tensor, classes: Tensor) -> Tensor:
        """Logits [B, K, H, W] of the extended images (Eqs. 5 and 6)."""
        # One head; scaled, or 256 channels of unit variance would start out as a hard assignment.
        superpixels = superpixels * superpixels.shape[-1] ** -0.5
        logits = project(pixels, superpixels, classes, self.cell, self.scale, self.association)
        if self.pixel_classifier is not None:
            own = _from_cells(self.pixel_classifier(pixels), self.cell)  # [B, K, H / stride, W / stride]
            logits = logits + F.interpolate(own, scale_factor=self.scale, mode="bilinear", align_corners=False)
        return logits


class DualPathLayer(nn.Module):
    """Pixels and superpixels attend to their neighbours, both to what the other side was before (Eqs. 3 and 4)."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.pixel_norm, self.superpixel_norm = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.pixel_mlp, self.superpixel_mlp = QueryKeyValueMlp(channels), QueryKeyValueMlp(channels)

    def forward(
        self, pixels: Tensor, superpixels: Tensor, positions: Tensor, superpixel_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        to_pixels, to_superpixels = local_attention(
            self.pixel_mlp(self.pixel_norm(pixels) + positions),
            self.superpixel_mlp(self.superpixel_norm(superpixels) + superpixel_positions),
            self.heads,
        )
        return pixels + to_pixels, superpixels + to_superpixels


class QueryKeyValueMlp(nn.Module):
    """Query, key and value, each by a two-layer perceptron of C hidden units."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Linear(channels, 3 * channels)
        self.last = nn.ModuleList(nn.Linear(channels, channels) for _ in range(3))

    def forward(self, x: Tensor) -> QueryKeyValue:  # [..., C] -> 3 of [..., C]
        hidden = F.relu(self.first(x), inplace=True).chunk(3, -1)
        return QueryKeyValue(*(last(part) for last, part in zip(self.last, hidden, strict=True)))


class SelfAttentionLayer(nn.Module):
    """Multi-head self-attention and a perceptron of 2 C hidden units, each behind a LayerNorm and beside a shortcut."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, 2 * channels), nn.ReLU(inplace=True), nn.Linear(2 * channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:  # [B, G, C] -> [B, G, C]
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, G, D]
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


def _learned(channels: int, size: tuple[int, int]) -> nn.Parameter:
    """Not filled yet: a grid that asks for too much is refused before (`limits`)."""
    return nn.Parameter(torch.empty(1, channels, *size))


def _resized(learned: Tensor, size: tuple[int, int]) -> Tensor:
    """[1, C, gy, gx] to [1, *size, C], bilinear."""
    return F.interpolate(learned, size, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)


def _to_cells(pixels: Tensor, cell: tuple[int, int]) -> Tensor:
    """[B, Gy h, Gx w, C] to [B, Gy, Gx, h w, C]."""
    h, w = cell
    return pixels.unflatten(2, (-1, w)).unflatten(1, (-1, h)).transpose(2, 3).flatten(3, 4)


def _from_cells(cells: Tensor, cell: tuple[int, int]) -> Tensor:
    """[B, Gy, Gx, h w, C] to [B, C, Gy h, Gx w]."""
    return cells.unflatten(3, cell).permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
