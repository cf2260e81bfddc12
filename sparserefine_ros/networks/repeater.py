"""Refinement by `repetition`: the dense segmenter itself, at native resolution, at the selected pixels.

Needs no training where the dense segmenter serves native resolution, as `patches`, and reads beyond its sites what low
resolution gave where a patch reads nothing. Trained on, it learns to do with that; see `training.repetition`.

Shape shorthand: B images, K classes, H, W native size, N selected pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sparserefine_ros.networks.ensemblers import DirectEnsembler
from sparserefine_ros.networks.repetition import Repetition, repeat
from sparserefine_ros.networks.repetition_recording import Kept, record
from sparserefine_ros.networks.repetition_tables import Engine, Grid

SIDE = 64  # of the image that a network is tried on, pixels: no stride in use leaves nothing of it


class RepeatRefiner(nn.Module):
    """Logits of selected pixels, which replace the initial ones.

    Args:
        own: the network that is repeated, of the same kind as the dense segmenter, with weights of its own; None
            repeats the bundle's dense segmenter for native resolution.
    """

    context = False  # does not read the initial softmax

    def __init__(self, own: nn.Module | None = None) -> None:
        super().__init__()
        self.own = own
        self.classifier = nn.Identity()  # what comes out are logits
        self.ensembler = DirectEnsembler()

    def train(self, mode: bool = True) -> RepeatRefiner:
        """Statistics of a few sites are not those of images: batch normalisation keeps what it knows."""
        return super().train(False)

    def forward(
        self,
        network: Callable[[Tensor], Tensor] | None,
        selected: Grid,
        colours: Callable[[Tensor], Tensor],
        kept: Sequence[Kept],
        engine: Engine | None = None,
    ) -> Tensor:
        """[N, K]; network: what is repeated where there is no ``own``. The others are as `repeat` takes them."""
        return repeat(self.own or network, selected, colours, kept, engine)  # type: ignore[arg-type]


def check_repeatable(dense: nn.Module, repeated: nn.Module, device: torch.device) -> set[int]:
    """The operations of ``dense`` whose results ``repeated`` reads, by their numbers, for `record`.

    Raises `NotRepeatableError`, or ValueError, unless ``repeated`` can follow ``dense`` at all.
    Both take normalised images. They run on a small one, all of whose pixels are selected.
    """
    images = torch.zeros(1, 3, SIDE, SIDE, device=device)
    with torch.inference_mode():
        logits, kept = record(dense, images)
        run = Repetition(Grid(images[:, 0] == 0), kept, Engine())
        answer = run.of(repeated, lambda flat: images.flatten(2)[0].T[flat])
    if answer.shape != (SIDE * SIDE, logits.shape[1]):
        raise ValueError(f"{answer.shape[1]} classes where the dense segmenter has {logits.shape[1]}")
    return run.read
