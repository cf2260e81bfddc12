"""Patch refinement: the dense segmenter once more, at native resolution, on the patches that hold selected pixels.

What SparseRefine is compared with in its Table 4, with patches of 256 and 512 pixels. The paper does not say how its
patches are chosen; here a patch is refined if more than a given share of its pixels is selected.

Shape shorthand: B images, K classes, H, W native size, M patches, N refined pixels, s, t height and width
of what the dense segmenter sees of a patch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparserefine_ros.networks.ensemblers import DirectEnsembler
from sparserefine_ros.networks.limits import check_whole
from sparserefine_ros.sparse import SiteSet

PASTES = ("patch", "selected")
MAX_BATCH = 64  # with a wide margin each patch is seen with all of the image


class PatchRefiner(nn.Module):
    """Needs no training where the dense segmenter serves native resolution.

    Patches tile the image from its upper left corner; those at the right and lower borders are cut off there. The dense
    segmenter sees each with ``margin`` pixels more on every side; a view that would leave the image is moved back
    inside, so that all views have one size and no pixel is made up.

    Args:
        num_classes: K, whatever it is.
        size: side of a patch, pixels.
        margin: pixels around it that are seen and not refined.
        density: a patch is refined if more than this share of its pixels is selected; 0: if any is.
        paste: patch = all of its pixels are replaced, selected = those that were selected.
        batch: patches a pass, at most 64.
    """

    context = False  # does not read the initial softmax

    def __init__(
        self,
        num_classes: int,
        size: int = 256,
        margin: int = 0,
        density: float = 0.0,
        paste: str = "patch",
        batch: int = 8,
    ) -> None:
        super().__init__()
        check_whole(size=size)
        check_whole(0, margin=margin)
        check_whole(1, MAX_BATCH, batch=batch)
        if not 0 <= density < 1:
            raise ValueError(f"density is {density!r}; give a share from 0 to below 1")
        if paste not in PASTES:
            raise ValueError(f"paste is {paste!r}; choose one of {', '.join(PASTES)}")
        self.size, self.margin, self.density, self.paste, self.batch = size, margin, density, paste, batch
        self.classifier = nn.Identity()  # what comes out are logits, which replace the initial ones
        self.ensembler = DirectEnsembler()

    def choose(self, selected: Tensor) -> Tensor:
        """[M, 3] int64 (image, patch row, patch column) of the patches to refine, of ``selected`` bool [B, H, W]."""
        height, width = selected.shape[1:]
        tall, wide = min(self.size, height), min(self.size, width)  # a patch beyond the image is not filled up
        rows, columns = -(-height // tall), -(-width // wide)
        bottom, right = rows * tall - height, columns * wide - width
        counts, areas = (
            F.pad(x.float(), (0, right, 0, bottom)).view(-1, rows, tall, columns, wide).sum((2, 4))
            for x in (selected, torch.ones_like(selected[:1]))
        )
        return torch.nonzero(counts > self.density * areas)

    def forward(
        self, predict: Callable[[Tensor], Tensor], native: Tensor, selected: Tensor
    ) -> tuple[SiteSet, Tensor, Tensor]:
        """The refined pixels, their logits [N, K], and the share of every image that lies in refined patches, [B].

        predict: crops [n, s, t, 3] uint8 to logits [n, K, s, t]; native: [B, H, W, 3] uint8; selected: bool [B, H, W].
        """
        height, width = selected.shape[1:]
        cores = [(image, row * self.size, column * self.size) for image, row, column in self.choose(selected).tolist()]
        covered = torch.zeros_like(selected)
        for image, top, left in cores:
            covered[image, top : top + self.size, left : left + self.size] = True
        wanted = covered if self.paste == "patch" else covered & selected
        sites = SiteSet.from_mask(wanted)
        row_of = torch.zeros(wanted.numel(), dtype=torch.int64, device=wanted.device)
        row_of[sites.flat] = torch.arange(len(sites), device=wanted.device)
        row_of = row_of.view(wanted.shape)
        s, t = min(height, self.size + 2 * self.margin), min(width, self.size + 2 * self.margin)
        result = torch.empty(0, 0)
        for start in range(0, len(cores), self.batch):
            part = cores[start : start + self.batch]
            views = [(b, self._view(top, s, height), self._view(left, t, width)) for b, top, left in part]
            logits = predict(torch.stack([native[b, y : y + s, x : x + t] for b, y, x in views]))
            if start == 0:
                result = logits.new_empty(len(sites), logits.shape[1], dtype=torch.float32)
            for seen, (b, y, x), (_, top, left) in zip(logits, views, part, strict=True):
                core = (slice(top, min(top + self.size, height)), slice(left, min(left + self.size, width)))
                inside = wanted[b][core]
                rows = seen[:, core[0].start - y : core[0].stop - y, core[1].start - x : core[1].stop - x]
                result[row_of[b][core][inside]] = rows.permute(1, 2, 0)[inside].float()
        return sites, result, covered.flatten(1).float().mean(1)

    def _view(self, start: int, side: int, length: int) -> int:
        """Where a view of ``side`` pixels begins whose patch begins at ``start``, in an image of ``length``."""
        return min(max(start - self.margin, 0), length - side)
