"""EfficientFormerV2: convolutions at strides 4 and 8, attention joining them at strides 16 and 32.

Li et al., 2022, "Rethinking Vision Transformers for MobileNet Size and Speed" (arXiv 2212.08059): unified feed-forward
blocks with a depthwise convolution inside, stride attention at stride 16, locality in the values, talking heads, and
attention that downsamples before the last stage.

Shape shorthand: B images, C channels, h, w height and width of a stage, N = h w positions, Q queries, G heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEADS = 8
VALUE_RATIO = 4  # channels of a value over those of a key


@dataclass(frozen=True)
class Size:
    """One size of the family; every tuple has an entry a stage."""

    widths: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    narrow: tuple[range, range]  # blocks of the last two stages that expand by 3; all others expand by 4
    attention: int  # blocks with attention at the end of the last two stages, one by one


SIZES = {
    "S1": Size((32, 48, 120, 224), (3, 3, 9, 6), (range(2, 6), range(2, 4)), 2),
    "S2": Size((32, 64, 144, 288), (4, 4, 12, 8), (range(2, 8), range(2, 6)), 4),
    "L": Size((40, 80, 192, 384), (5, 5, 15, 10), (range(4, 11), range(3, 7)), 6),
}


class ConvBn(nn.Sequential):
    """Convolution, batch normalisation and, where wanted, GELU."""

    def __init__(
        self, cin: int, cout: int, kernel: int = 1, stride: int = 1, groups: int = 1, gelu: bool = False
    ) -> None:
        super().__init__(nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups), nn.BatchNorm2d(cout))
        if gelu:
            self.append(nn.GELU())


class RelativeBias(nn.Module):
    """A bias a head for every vertical and horizontal distance, for maps of any size.

    The table belongs to maps of ``resolution`` x ``resolution``. For other maps the matrix of queries and positions is
    resized as an image, bicubically, as the segmentation code published with OffSeg does it: distances are lost, but
    weights trained on larger crops than their table is for, as those for Cityscapes, have learned under it.
    """

    def __init__(self, resolution: int) -> None:
        super().__init__()
        self.resolution = resolution
        self.table = nn.Parameter(torch.zeros(HEADS, resolution**2))

    def forward(self, height: int, width: int, stride: int = 1) -> Tensor:
        """[G, Q, N] between every ``stride``-th position and every position of a map (height, width)."""
        index = torch.arange(self.resolution, device=self.table.device)
        distance = (index[::stride, None] - index).abs()
        table = self.table.view(HEADS, self.resolution, self.resolution)
        bias = table[:, distance[:, None, :, None], distance[None, :, None, :]].flatten(3).flatten(1, 2)
        size = (-(-height // stride) * -(-width // stride), height * width)
        if size == bias.shape[1:]:
            return bias
        return F.interpolate(bias[None], size, mode="bicubic", align_corners=False)[0]


def _heads(x: Tensor) -> Tensor:  # [B, G D, h, w] -> [B, G, N, D]
    return x.flatten(2).unflatten(1, (HEADS, -1)).transpose(-2, -1)


class Attention(nn.Module):
    """Attention between all positions, at half the resolution where ``stride`` is 2 (stride attention).

    Talking heads mix the heads before and after the softmax; a depthwise convolution adds locality to the values.
    """

    KEY = 32

    def __init__(self, channels: int, resolution: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.shrink = ConvBn(channels, channels, 3, stride, channels) if stride > 1 else nn.Identity()
        keys, values = HEADS * self.KEY, HEADS * self.KEY * VALUE_RATIO
        self.q, self.k, self.v = ConvBn(channels, keys), ConvBn(channels, keys), ConvBn(channels, values)
        self.v_local = ConvBn(values, values, 3, groups=values)
        self.talk_before, self.talk_after = nn.Conv2d(HEADS, HEADS, 1), nn.Conv2d(HEADS, HEADS, 1)
        self.bias = RelativeBias(math.ceil(resolution / stride))
        self.proj = ConvBn(values, channels)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w] -> [B, C, h, w]
        small = self.shrink(x)
        size = small.shape[-2:]
        v = self.v(small)
        attention = _heads(self.q(small) * self.KEY**-0.5) @ _heads(self.k(small)).transpose(-2, -1) + self.bias(
            *size
        )  # [B, G, N, N]
        attention = self.talk_after(self.talk_before(attention).softmax(-1))
        mixed = (attention @ _heads(v)).transpose(-2, -1).flatten(1, 2).unflatten(2, size) + self.v_local(v)
        if self.stride > 1:
            mixed = F.interpolate(mixed, x.shape[-2:], mode="bilinear", align_corners=False)
        out: Tensor = self.proj(F.gelu(mixed))
        return out


class AttentionDownsample(nn.Module):
    """Attention whose queries stand at every second position: local and pooled ones, added."""

    KEY = 16

    def __init__(self, cin: int, cout: int, resolution: int) -> None:
        super().__init__()
        keys, values = HEADS * self.KEY, HEADS * self.KEY * VALUE_RATIO
        self.q_local, self.q = nn.Conv2d(cin, cin, 3, 2, 1, groups=cin), ConvBn(cin, keys)
        self.k, self.v = ConvBn(cin, keys), ConvBn(cin, values)
        self.v_local = ConvBn(values, values, 3, 2, values)
        self.bias = RelativeBias(resolution)
        self.proj = ConvBn(values, cout)

    def forward(self, x: Tensor) -> Tensor:  # [B, Cin, h, w] -> [B, Cout, h/2, w/2], rounded up
        q = self.q(self.q_local(x) + x[..., ::2, ::2])
        v = self.v(x)
        bias = self.bias(*x.shape[-2:], stride=2)
        mixed = F.scaled_dot_product_attention(_heads(q), _heads(self.k(x)), _heads(v), bias.to(v.dtype))
        out: Tensor = self.proj(
            F.gelu(mixed.transpose(-2, -1).flatten(1, 2).unflatten(2, q.shape[-2:]) + self.v_local(v))
        )
        return out


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2, beside it attention where there is any."""

    def __init__(self, cin: int, cout: int, resolution: int | None) -> None:
        super().__init__()
        self.conv = ConvBn(cin, cout, 3, 2)
        self.attention = AttentionDownsample(cin, cout, resolution) if resolution else None

    def forward(self, x: Tensor) -> Tensor:  # [B, Cin, h, w] -> [B, Cout, h/2, w/2], rounded up
        out: Tensor = self.conv(x)
        return out if self.attention is None else out + self.attention(x)


class Block(nn.Module):
    """Attention, where there is any, then the feed-forward network; each is scaled by channel and added."""

    def __init__(self, channels: int, expansion: int, attention: Attention | None) -> None:
        super().__init__()
        self.attention = attention
        if attention is not None:
            self.scale_attention = nn.Parameter(torch.full((channels, 1, 1), 1e-5))
        hidden = channels * expansion
        self.mlp = nn.Sequential(
            ConvBn(channels, hidden, gelu=True),
            ConvBn(hidden, hidden, 3, groups=hidden, gelu=True),
            ConvBn(hidden, channels),
        )
        self.scale_mlp = nn.Parameter(torch.full((channels, 1, 1), 1e-5))

    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w] -> [B, C, h, w]
        if self.attention is not None:
            x = x + self.scale_attention * self.attention(x)
        return x + self.scale_mlp * self.mlp(x)


class EfficientFormerV2(nn.Module):
    """Images to features at strides 4, 8, 16 and 32.

    Args:
        size: S1, S2 or L.
        resolution: side of the square images that the tables of position biases are for; others work too.

    At other sizes than a multiple of 32 every stage rounds up.
    """

    def __init__(self, size: str, resolution: int = 512) -> None:
        super().__init__()
        spec = SIZES[size]
        self.widths = spec.widths
        first = spec.widths[0]
        self.stem = nn.Sequential(ConvBn(3, first // 2, 3, 2, gelu=True), ConvBn(first // 2, first, 3, 2, gelu=True))
        self.downs = nn.ModuleList(
            Downsample(spec.widths[i - 1], spec.widths[i], math.ceil(resolution / 16) if i == 3 else None)
            for i in (1, 2, 3)
        )
        self.stages = nn.ModuleList(_stage(spec, i, math.ceil(resolution / 2 ** (i + 2))) for i in range(4))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images [B, 3, H, W] to four maps [B, C, h, w]."""
        x = self.stem(images)
        features = []
        for i, stage in enumerate(self.stages):
            x = stage(x if i == 0 else self.downs[i - 1](x))
            features.append(x)
        return features


def _stage(spec: Size, index: int, resolution: int) -> nn.Sequential:
    """The blocks of stage ``index`` (0 to 3), whose maps have ``resolution``."""
    width, depth = spec.widths[index], spec.depths[index]
    narrow = spec.narrow[index - 2] if index >= 2 else range(0)
    first_attention = depth - spec.attention if index >= 2 else depth
    blocks = []
    for i in range(depth):
        attention = Attention(width, resolution, 2 if index == 2 else 1) if i >= first_attention else None
        blocks.append(Block(width, 3 if i in narrow else 4, attention))
    return nn.Sequential(*blocks)
