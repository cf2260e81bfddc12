"""SegNeXt, plain or with offset learning in place of its last convolution.

Guo et al., 2022, "SegNeXt: Rethinking Convolutional Attention Design for Semantic Segmentation" (arXiv 2209.08575): an
encoder whose attention is made of strip convolutions, and a decoder that explains the features at stride 8 by a few
bases (Geng et al., 2021, "Is Attention Better Than Matrix Decomposition?").

Shape shorthand: B images, K classes, H, W input height and width, C channels, h, w size of a map, N = h w, R bases.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_unary

from sparserefine_ros.networks.offset import OffsetClassifier

SIZES = {
    "T": ((32, 64, 160, 256), (3, 3, 5, 2), 256),
    "S": ((64, 128, 320, 512), (2, 2, 4, 2), 256),
    "B": ((64, 128, 320, 512), (3, 3, 12, 3), 512),
    "L": ((64, 128, 320, 512), (3, 5, 27, 3), 1024),
}
"""Size to the channels and blocks of every stage and the channels of the decoder."""
EXPANSIONS = (8, 8, 4, 4)
STRIPS = (7, 11, 21)
BASES = 16
UPDATES = 7


class Block(nn.Module):
    """Multi-scale convolutional attention, then a feed-forward network; each is scaled by channel and added."""

    def __init__(self, channels: int, expansion: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.before, self.after = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.local = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.strips = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels, (1, k), padding=(0, k // 2), groups=channels),
                nn.Conv2d(channels, channels, (k, 1), padding=(k // 2, 0), groups=channels),
            )
            for k in STRIPS
        )
        self.mix = nn.Conv2d(channels, channels, 1)
        hidden = channels * expansion
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, hidden, 1),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden),
            nn.GELU(),
            nn.Conv2d(hidden, channels, 1),
        )
        self.scale_attention = nn.Parameter(torch.full((channels, 1, 1), 1e-2))
        self.scale_mlp = nn.Parameter(torch.full((channels, 1, 1), 1e-2))

    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w] -> [B, C, h, w]
        y = self.norm1(x)
        values = F.gelu(self.before(y))
        near = self.local(values)
        attention = self.mix(near + sum(strip(near) for strip in self.strips))
        x = x + self.scale_attention * (self.after(attention * values) + y)
        return x + self.scale_mlp * self.mlp(self.norm2(x))


def explain(x: Tensor) -> Tensor:
    """The non-negative x [B, C, N] rebuilt from R bases: non-negative matrix factorisation by multiplicative updates.

    The bases start from one fixed draw, where mmseg draws anew at every call: masks stay the same from run to run.
    Gradients pass the last update alone.
    """
    draw = _draw(int(x.shape[1]), x.dtype, x.device)
    bases = F.normalize(draw, dim=0).expand(len(x), -1, -1)  # [B, C, R]
    with torch.no_grad():
        codes = (x.transpose(-2, -1) @ bases).softmax(-1)  # [B, N, R]
        for _ in range(UPDATES):
            codes = _update(codes, x.transpose(-2, -1), bases)
            bases = _update(bases, x, codes)
    return bases @ _update(codes, x.transpose(-2, -1), bases).transpose(-2, -1)


def hamburger(x: Tensor) -> Tensor:  # [B, C, h, w] -> [B, C, h, w]
    """`explain` of a map, as one of torch's functions: what is no tensor may do it its own way (`repetition`)."""
    if has_torch_function_unary(x):
        return handle_torch_function(hamburger, (x,), x)  # type: ignore[no-any-return]
    # Half precision cannot divide by what is nearly zero. The meta device, on which work is counted, has none.
    has_autocast = torch.amp.is_autocast_available(x.device.type)
    with torch.autocast(x.device.type, enabled=False) if has_autocast else nullcontext():
        exact = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(2)
        return explain(exact).to(x.dtype).unflatten(2, x.shape[-2:])


@cache
@torch.inference_mode(False)  # whoever asks first
def _draw(channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[C, R]; drawn and sent once, as no exported network can contain a generator, nor a CUDA graph what the host
    sends."""
    return torch.rand(channels, BASES, generator=torch.Generator().manual_seed(0), dtype=dtype, device="cpu").to(device)


def _update(factor: Tensor, target: Tensor, other: Tensor) -> Tensor:
    """The factor that brings factor @ other^T closer to ``target`` (Lee and Seung, 2001)."""
    return factor * (target @ other) / (factor @ (other.transpose(-2, -1) @ other) + 1e-6)


class SegNeXt(nn.Module):
    """Images to logits at the images' own size.

    Args:
        num_classes: K.
        size: T, S, B or L.
        offsets: classify with offset learning instead of a 1x1 convolution, at stride 8 both.

    Raises:
        ValueError: another size.
    """

    def __init__(self, num_classes: int, size: str = "T", offsets: bool = True) -> None:
        super().__init__()
        if size not in SIZES:
            raise ValueError(f"unknown SegNeXt size {size!r}; known are {', '.join(SIZES)}")
        widths, depths, width = SIZES[size]
        first = widths[0]
        stem = nn.Sequential(
            nn.Conv2d(3, first // 2, 3, 2, 1), nn.BatchNorm2d(first // 2), nn.GELU(),
            nn.Conv2d(first // 2, first, 3, 2, 1), nn.BatchNorm2d(first),
        )  # fmt: skip
        self.embeds = nn.ModuleList([stem])
        for cin, cout in zip(widths[:-1], widths[1:], strict=True):
            self.embeds.append(nn.Sequential(nn.Conv2d(cin, cout, 3, 2, 1), nn.BatchNorm2d(cout)))
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(channels, expansion) for _ in range(depth)))
            for channels, depth, expansion in zip(widths, depths, EXPANSIONS, strict=True)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in widths)
        self.squeeze = _ConvNorm(sum(widths[1:]), width).append(nn.ReLU())
        self.ham_in, self.ham_out = nn.Conv2d(width, width, 1), _ConvNorm(width, width)
        self.align = _ConvNorm(width, width).append(nn.ReLU())
        self.classifier = OffsetClassifier(width, num_classes) if offsets else nn.Conv2d(width, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] to logits [B, K, H, W]."""
        x, features = images, []
        for embed, stage, norm in zip(self.embeds, self.stages, self.norms, strict=True):
            x = norm(stage(embed(x)).movedim(1, 3)).movedim(3, 1)
            features.append(x)
        size = features[1].shape[-2:]  # stride 8
        resized = [F.interpolate(x, size, mode="bilinear", align_corners=False) for x in features[1:]]
        y = self.squeeze(torch.cat(resized, 1))
        y = self.align(F.relu(y + self.ham_out(hamburger(F.relu(self.ham_in(y))))))
        return F.interpolate(self.classifier(y), images.shape[-2:], mode="bilinear", align_corners=False)


class _ConvNorm(nn.Sequential):
    def __init__(self, cin: int, cout: int) -> None:
        super().__init__(nn.Conv2d(cin, cout, 1, bias=False), nn.GroupNorm(32, cout))
