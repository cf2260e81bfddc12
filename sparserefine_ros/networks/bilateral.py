"""A refiner that needs no training: joint bilateral upsampling (Kopf et al., SIGGRAPH 2007) at the selected pixels.

A selected pixel takes the mean of what the dense segmenter says around it, where neighbours count by their distance and
by how much their colour at low resolution is the pixel's own at native resolution:

    p'(i) = sum over j of w_ij p(j) / sum of w_ij,   w_ij = exp(-|x_i - x_j|^2 / 2 a^2 - |c_i - c_j|^2 / 2 b^2)

Shape shorthand: B images, K classes, H, W native size, h, w low resolution, N selected pixels, T taps of the window.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparserefine_ros.networks.ensemblers import DirectEnsembler
from sparserefine_ros.networks.limits import check_whole
from sparserefine_ros.networks.selectors import nearest_index
from sparserefine_ros.sparse import SiteSet

CHUNK = 8192  # pixels a CPU core holds in its cache
GPU_CHUNK = 1 << 18  # pixels that keep a GPU busy, and take a few hundred MB with 25 taps
MIN_WIDTH = 1e-6  # of a Gaussian: those of a narrower one are all 0 in float32, and their mean is no number
MAX_RADIUS = 16  # 1089 taps; every pixel reads as many colours and probabilities


class BilateralRefiner(nn.Module):
    """Initial probabilities, half of them moved to where the colours say.

    Args:
        num_classes: K, whatever it is.
        radius: taps to every side.
        step: low-resolution pixels between taps.
        distance: a, in low-resolution pixels.
        colour: b, for RGB from 0 to 1.
        initial: share of the initial probabilities in the result.

    Raises ValueError for numbers that no mean can be taken with.
    """

    context = True  # reads the initial softmax

    def __init__(
        self,
        num_classes: int,
        radius: int = 2,
        step: int = 2,
        distance: float = 3.0,
        colour: float = 0.05,
        initial: float = 0.5,
    ) -> None:
        super().__init__()
        check_whole(0, MAX_RADIUS, radius=radius)
        check_whole(step=step)
        if not (distance >= MIN_WIDTH and colour >= MIN_WIDTH and 0 <= initial <= 1):
            raise ValueError(
                f"distance {distance}, colour {colour}, initial {initial}; give two numbers from {MIN_WIDTH} and a "
                "share from 0 to 1"
            )
        self.distance, self.colour, self.initial = distance, colour, initial
        taps = step * torch.arange(-radius, radius + 1)
        self.register_buffer("taps", torch.cartesian_prod(taps, taps), persistent=False)  # [T, 2] row, column
        self.taps: Tensor
        self.classifier = nn.Identity()
        self.ensembler = DirectEnsembler()

    def forward(self, sites: SiteSet, native: Tensor, low: Tensor, probabilities: Tensor) -> Tensor:
        """Logarithms of the final probabilities at ``sites``, [N, K].

        native: [B, H, W, 3] uint8 RGB; low: [B, h, w, 3], the same at low resolution; probabilities: [B, K, h, w].
        """
        rows = probabilities.permute(0, 2, 3, 1).reshape(-1, probabilities.shape[1])  # [B h w, K]
        colours = low.view(-1, 3).float() / 255  # [B h w, 3]
        chunk = CHUNK if native.device.type == "cpu" else GPU_CHUNK
        parts = []
        for part, flat in zip(sites.sites.split(chunk), sites.flat.split(chunk), strict=True):
            index, centre, squared = self._window(part, native.shape[1:3], low.shape[1:3])
            own = native.view(-1, 3)[flat].float() / 255  # [n, 3]
            difference = (colours[index] - own[:, None]).square().sum(-1)  # [n, T]
            weight = (-squared / (2 * self.distance**2) - difference / (2 * self.colour**2)).softmax(1)
            mean = F.embedding_bag(index, rows, mode="sum", per_sample_weights=weight)  # [n, K]
            parts.append(torch.lerp(mean, rows[centre], self.initial))
        return torch.cat(parts).clamp_min(1e-10).log()

    def _window(self, sites: Tensor, size: tuple[int, ...], low_size: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of [B h w] under the taps [n, T] and under the sites [n], and squared distances [n, T] to the taps.

        Taps outside the image are those of its edge.
        """
        batch, places, squares = sites[:, :1], [], []
        for axis in (0, 1):
            high, length = size[axis], low_size[axis]
            exact = (sites[:, axis + 1] + 0.5) * (length / high) - 0.5  # position of pixel centres, in low pixels
            nearest = nearest_index(length, high, sites.device)[sites[:, axis + 1]]
            tap = nearest[:, None] + self.taps[:, axis]  # [n, T]
            squares.append((tap - exact[:, None]).square())
            places.append((tap.clamp(0, length - 1), nearest[:, None]))
        (row, own_row), (column, own_column) = places
        index = (batch * low_size[0] + row) * low_size[1] + column
        centre = (batch * low_size[0] + own_row) * low_size[1] + own_column
        return index, centre[:, 0], squares[0] + squares[1]
