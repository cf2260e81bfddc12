"""PointRend as a refiner: a perceptron on features of the dense segmenter, at its uncertain points.

Kirillov et al., 2020, "PointRend: Image Segmentation as Rendering" (arXiv 1912.08193); the mask refinement that
SparseRefine is compared with (its Table 3b). Unlike SparseRefine it never looks at the image at native resolution.

Shape shorthand: B images, K classes, C channels of the fine features, h', w' size of the coarse prediction, H, W native
size, P points of an image, N points of all images.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparserefine_ros.networks.ensemblers import DirectEnsembler
from sparserefine_ros.networks.limits import check_whole
from sparserefine_ros.networks.points import CoarseFine, centres, most_uncertain, sample, subdivisions
from sparserefine_ros.sparse import SiteSet

CHUNK = 1 << 16  # points; those of an uncertain frame, all at once, take 3 KB each: gigabytes


class PointRend(nn.Module):
    """The point head, and the two ways to run it.

    The paper's way is subdivision: the coarse logits are doubled in size, bilinearly, until they have the native one;
    after each step the most uncertain points are predicted anew. With ``where="entropy"`` the head predicts the pixels
    that SparseRefine would refine, and no others.

    Ours starts as the coarse prediction: the last layer copies the coarse logits that it is given beside the features.

    Args:
        num_classes: K.
        features: C, channels of the dense segmenter's fine features together.
        hidden: width of the perceptron.
        layers: hidden layers; each reads the coarse logits again.
        points: predicted points a step, over the pixels of the native image; 1/256 are the paper's 8192 of 2048x1024.
        train_points: points of a training crop, over its pixels; 1/256 are the paper's 2048 of 1024x512.
        where: subdivision or entropy.
    """

    context = False  # does not read the initial softmax

    def __init__(
        self,
        num_classes: int,
        features: int,
        hidden: int = 256,
        layers: int = 3,
        points: float = 1 / 256,
        train_points: float = 1 / 256,
        where: str = "subdivision",
    ) -> None:
        super().__init__()
        check_whole(2, classes=num_classes)  # uncertainty is what the second best lacks of the best
        check_whole(features=features, hidden=hidden)
        check_whole(0, layers=layers)
        if where not in ("subdivision", "entropy"):
            raise ValueError(f"where is {where!r}; choose subdivision or entropy")
        if not (0 < points <= 1 and 0 < train_points <= 1):
            raise ValueError(f"points {points}, train_points {train_points}; give shares above 0 and at most 1")
        self.features, self.points, self.train_points, self.where = features, points, train_points, where
        widths = [features, *[hidden] * layers]
        self.layers = nn.ModuleList(nn.Linear(width + num_classes, hidden) for width in widths[:-1])
        self.predictor = nn.Linear(widths[-1] + num_classes, num_classes)
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self.predictor.weight.zero_()
            self.predictor.weight[:, -num_classes:] = torch.eye(num_classes)
            self.predictor.bias.zero_()
        self.classifier = nn.Identity()  # what comes out are logits, which replace the initial ones
        self.ensembler = DirectEnsembler()

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Logits [N, K] of fine features [N, C] and coarse logits [N, K]."""
        if fine.shape[1] != self.features:
            raise ValueError(
                f"the dense segmenter has {fine.shape[1]} fine features, pointrend was built for {self.features}; "
                f"write features: {fine.shape[1]} into its args"
            )
        x = fine
        for layer in self.layers:
            x = F.relu(layer(torch.cat([x, coarse], 1)))
        logits: Tensor = self.predictor(torch.cat([x, coarse], 1))
        return logits

    def at(self, maps: CoarseFine, points: Tensor) -> Tensor:
        """Logits [B, P, K] at ``points`` [B, P, 2], CHUNK of each image at a time."""
        parts = []
        for part in points.split(CHUNK, 1):
            coarse = sample(maps.coarse, part)
            fine = torch.cat([sample(x, part) for x in maps.fine], 2)
            parts.append(self(fine.flatten(0, 1), coarse.flatten(0, 1)).unflatten(0, part.shape[:2]))
        return torch.cat(parts, 1)

    def render(self, maps: CoarseFine, size: tuple[int, int]) -> tuple[Tensor, float]:
        """Logits [B, K, H, W] by subdivision, and how many points were predicted, over the pixels of ``size``."""
        logits, predicted = maps.coarse, 0
        count = max(1, round(self.points * size[0] * size[1]))
        for step in subdivisions((maps.coarse.shape[2], maps.coarse.shape[3]), size):
            logits = F.interpolate(logits, step, mode="bilinear", align_corners=False)
            flat = most_uncertain(logits, count)  # [B, P]
            points = self.at(maps, centres(flat, step)).transpose(1, 2).to(logits.dtype)  # [B, K, P]
            logits.flatten(2).scatter_(2, flat[:, None].expand_as(points), points)
            predicted += flat.shape[1]
        return logits, predicted / (size[0] * size[1])

    def at_sites(self, maps: CoarseFine, sites: SiteSet) -> Tensor:
        """Logits [N, K] at the centres of ``sites``, each of its own image."""
        size, parts = (sites.shape[1], sites.shape[2]), []
        counts = torch.bincount(sites.sites[:, 0], minlength=sites.shape[0]).tolist()
        for image, flat in enumerate(sites.flat.split(counts)):
            own = CoarseFine(maps.coarse[image : image + 1], tuple(x[image : image + 1] for x in maps.fine))
            parts.append(self.at(own, centres(flat - image * size[0] * size[1], size)[None])[0])
        return torch.cat(parts)
