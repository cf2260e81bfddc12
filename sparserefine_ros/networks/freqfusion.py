"""Frequency-aware fusion of a coarse and a fine feature map.

Chen et al., 2024, "Frequency-aware Feature Fusion for Dense Image Prediction" (arXiv 2408.12879): the coarse features
are smoothed while they are upsampled, so that objects become uniform inside; then resampled where a neighbour fits
better; the fine features have their high frequencies, boundaries, added once more. All filters are predicted from both
maps, position by position. Upsampling with predicted kernels is the content-aware reassembly of Wang et al., 2019
("CARAFE: Content-Aware ReAssembly of FEatures"). The order of operations is that of the code published with OffSeg
(Zhang et al., 2025), for its weights.

Shape shorthand: B images, C channels, H, W fine size, h, w coarse size (half of it, rounded up), G groups, k kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def reassemble(x: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums over k x k neighbourhoods, the weights different at every position.

    The taps are added one after another: besides the result only ``x`` itself, upsampled, is held, not k k copies of
    it. Past the border all is zero.

    Args:
        x: [B, C, h, w].
        weights: [B, k k, H, W], neighbours row by row. H is h, 2 h or 2 h - 1, and W likewise; at twice the size
            position (i, j) lies over x's (i // 2, j // 2).

    Returns:
        [B, C, H, W].
    """
    height, width = weights.shape[-2:]
    kernel = int(weights.shape[1] ** 0.5)
    step_y, step_x = int(-(-height // x.shape[-2])), int(-(-width // x.shape[-1]))  # numbers in a traced network, too
    padded = F.pad(x, (kernel // 2,) * 4)
    if step_y > 1 or step_x > 1:
        padded = F.interpolate(padded, scale_factor=(step_y, step_x), mode="nearest")
    total = x.new_zeros(())
    for tap, weight in enumerate(weights.split(1, 1)):
        row, column = step_y * (tap // kernel), step_x * (tap % kernel)
        total = torch.addcmul(total, padded[..., row : row + height, column : column + width], weight)
    return total


def neighbour_similarity(x: Tensor, distance: int = 2) -> Tensor:
    """Cosine similarity of every position with 8 at ``distance`` from it, [B, C, H, W] to [B, 8, H, W], row by row.

    It is 0 past the border.
    """
    height, width = x.shape[-2:]
    unit = F.normalize(x, dim=1, eps=1e-8)
    padded = F.pad(unit, (distance,) * 4)
    around = [(row, column) for row in range(3) for column in range(3) if (row, column) != (1, 1)]
    shifted = ((distance * row, distance * column) for row, column in around)
    return torch.stack([(unit * padded[..., r : r + height, c : c + width]).sum(1) for r, c in shifted], 1)


def resample(x: Tensor, offsets: Tensor) -> Tensor:
    """Reads every position from an offset one, bilinearly.

    Args:
        x: [B, C, H, W].
        offsets: [B, 2 G, H, W] in pixels, to the right for each of G groups of channels, then down for each.
    """
    height, width = x.shape[-2:]
    groups = offsets.shape[1] // 2
    exact = torch.promote_types(x.dtype, torch.float32)  # half precision cannot tell the pixels of a wide map apart
    ys = (torch.arange(height, device=x.device, dtype=exact) * 2 + 1) / height - 1  # -1 and 1 are the outer edges
    xs = (torch.arange(width, device=x.device, dtype=exact) * 2 + 1) / width - 1
    grid = torch.stack([xs.expand(height, width), ys[:, None].expand(height, width)], -1)  # [H, W, 2]
    shift = offsets.unflatten(1, (2, groups)).movedim(1, -1).flatten(0, 1)  # [B G, H, W, 2]
    grid = grid + torch.stack([shift[..., 0] * (2 / width), shift[..., 1] * (2 / height)], -1)
    parts = x.unflatten(1, (groups, -1)).flatten(0, 1).to(exact)  # [B G, C / G, H, W]
    sampled = F.grid_sample(parts, grid, padding_mode="border", align_corners=False)
    return sampled.to(x.dtype).unflatten(0, (-1, groups)).flatten(1, 2)


class FreqFusion(nn.Module):
    """Brings a coarse map to the size of a fine one and sharpens the fine one.

    Both are compressed to C channels first, F the fine and Z the coarse one; one convolution each reads the low-pass
    and the high-pass filter from either. With S for softmax over a filter's taps, up for CARAFE at twice the size and
    * for reassembly in place:

        h = high(F)                   F' = 2 F - F * S(h)
        l = low(F') + up(low(Z), S(low(F')))
        h' = h + up(high(Z), S(l))
        smooth = up(coarse, S(l))     sharp = 2 fine - fine * S(h')

    The smooth map is then resampled at displacements in coarse pixels, for every group of channels d sigmoid(m): d read
    from the similarities with the neighbours, m from the features, each from F' and from Z, normalised, and added.

    Args:
        fine, coarse: channels of both maps; a quarter of their sum, C, must be a multiple of 8.
        low_pass, high_pass: kernel sizes of the filters.
        groups: groups of coarse channels, each with a displacement of its own.
    """

    def __init__(self, fine: int, coarse: int, low_pass: int = 5, high_pass: int = 3, groups: int = 4) -> None:
        super().__init__()
        compressed = (fine + coarse) // 4
        self.compress_fine, self.compress_coarse = nn.Conv2d(fine, compressed, 1), nn.Conv2d(coarse, compressed, 1)
        self.low_pass = _conv_3x3(compressed, low_pass**2)
        self.high_pass = _conv_3x3(compressed, high_pass**2)
        self.norm_fine = nn.GroupNorm(compressed // 8, compressed)
        self.norm_coarse = nn.GroupNorm(compressed // 8, compressed)
        # A coarse position predicts four displacements, for the fine positions above it.
        self.direction_fine, self.direction_coarse = _conv_3x3(8, 2 * groups), _conv_3x3(8, 8 * groups)
        self.magnitude_fine, self.magnitude_coarse = (
            _conv_3x3(compressed, 2 * groups),
            _conv_3x3(compressed, 8 * groups),
        )
        for conv in (self.low_pass, self.high_pass, self.direction_fine, self.direction_coarse):
            nn.init.normal_(conv.weight, std=1e-3)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, fine: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, H, W] and [B, C', h, w] to [B, C, H, W] and [B, C', H, W]."""
        f, z = self.compress_fine(fine), self.compress_coarse(coarse)
        high = self.high_pass(f)
        f = 2 * f - reassemble(f, high.softmax(1))
        low = self.low_pass(f)
        low = low + reassemble(self.low_pass(z), low.softmax(1))
        weights = low.softmax(1)
        high = high + reassemble(self.high_pass(z), weights)
        smooth = resample(reassemble(coarse, weights), 2 * self._displacements(f, z))  # two fine pixels a coarse one
        return 2 * fine - reassemble(fine, high.softmax(1)), smooth

    def _displacements(self, f: Tensor, z: Tensor) -> Tensor:  # -> [B, 2 G, H, W] in coarse pixels
        f, z = self.norm_fine(f), self.norm_coarse(z)
        size = f.shape[-2:]
        direction = self.direction_fine(neighbour_similarity(f)) + _unfold(
            self.direction_coarse(neighbour_similarity(z)), size
        )
        magnitude = self.magnitude_fine(f) + _unfold(self.magnitude_coarse(z), size)
        return direction * magnitude.sigmoid()


def _conv_3x3(cin: int, cout: int) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, 3, padding=1)


def _unfold(x: Tensor, size: torch.Size) -> Tensor:  # [B, 4 C, h, w] -> [B, C, H, W], H = 2 h or less
    return F.pixel_shuffle(x, 2)[..., : size[0], : size[1]]


def interleave(a: Tensor, b: Tensor, groups: int = 4) -> Tensor:
    """Concatenates channels group by group: a's first quarter, b's first quarter, a's second quarter, ..."""
    return torch.cat([a.unflatten(1, (groups, -1)), b.unflatten(1, (groups, -1))], 2).flatten(1, 2)
