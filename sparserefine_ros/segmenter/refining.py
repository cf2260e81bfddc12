"""How each kind of refiner runs on frames: what it is shown of them, and what it answers.

Shape shorthand: B images of one size, K classes, C feature channels, H, W native size, h, w low resolution, N pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparserefine_ros.native import NativeError
from sparserefine_ros.networks.graphed_unet import GraphedUNet
from sparserefine_ros.networks.patches import PatchRefiner
from sparserefine_ros.networks.pointrend import PointRend
from sparserefine_ros.networks.points import CoarseFine
from sparserefine_ros.networks.refiner import SparseRefiner
from sparserefine_ros.networks.repeater import RepeatRefiner
from sparserefine_ros.networks.repetition_cpu import CpuEngine
from sparserefine_ros.networks.repetition_recording import Kept
from sparserefine_ros.networks.repetition_tables import Engine, Grid
from sparserefine_ros.segmenter.dense import fold_batch_norm, ready
from sparserefine_ros.segmenter.preprocess import normalise, normalise_pixels
from sparserefine_ros.segmenter.refiner_input import refiner_input
from sparserefine_ros.sparse import SiteSet
from sparserefine_ros.sparse.backends import Backend
from sparserefine_ros.sparse.backends.cpu import CpuBackend


@dataclass(frozen=True)
class Seen:
    """Frames as a refiner may see them."""

    selected: Tensor  # [B, H, W] bool: the selector's pixels
    native: Tensor  # [B, H, W, 3] uint8 RGB
    low: Tensor  # [B, h, w, 3] uint8 RGB: what the dense segmenter saw
    probabilities: Tensor | None  # [B, K, h, w] of the initial prediction, where the refiner's ``context`` asks for it
    maps: CoarseFine | None = None  # of the dense segmenter, where the refiner's kind asks for it
    kept: Sequence[Kept] = ()  # of `repetition.record` of the dense segmenter, where the refiner's kind asks for it


class Refined(NamedTuple):
    """The answer; the refiner's classifier and ensembler make classes of it."""

    sites: SiteSet  # N pixels
    features: Tensor  # [N, C]
    density: list[float] | None = None  # share of each image that was worked on, where that is not the selection


class Refining(ABC):
    """A refiner at work. ``network`` is one of networks.registry.REFINERS.

    native: the dense segmenter for native resolution: normalised images [n, 3, s, t] to logits [n, K, s, t].
    """

    needs_maps = False  # reads the dense segmenter's CoarseFine
    needs_record = False  # reads what every layer of the dense segmenter gave
    needs_native = False  # runs the dense segmenter at native resolution

    def __init__(self, network: Any, backend: Backend, dtype: torch.dtype, native: nn.Module | None) -> None:
        self.network, self.native = network, native

    @abstractmethod
    def __call__(self, seen: Seen) -> Refined | None:
        """None where there is nothing to do."""


class Sparse(Refining):
    """The sparse U-Net at the selected pixels, fused on ``backend``."""

    network: SparseRefiner

    def __init__(self, network: Any, backend: Backend, dtype: torch.dtype, native: nn.Module | None) -> None:
        super().__init__(network, backend, dtype, native)
        self.network.fuse(backend, dtype)
        self.graphed: GraphedUNet | None = None
        if backend.name == "triton" and next(self.network.parameters()).device.type == "cuda":
            assert self.network.fused is not None
            # One launch a frame. Not yet run on a GPU, as the backend itself: "auto" takes it after a trial there.
            self.graphed = GraphedUNet(self.network.fused, self.network.stride, refiner_input)

    def __call__(self, seen: Seen) -> Refined | None:
        context = () if seen.probabilities is None else (seen.probabilities,)
        inputs = (seen.selected, seen.native, *context)
        if self.network.stride != "dilate" or len(seen.selected) == 1:
            return self._answer(*inputs)
        # The largest site of a batch bounds the coarse ones of "dilate": a frame's mask would depend on the others.
        alone = (self._answer(*(tensor[image : image + 1] for tensor in inputs)) for image in range(len(seen.selected)))
        parts = [answer.features.clone() for answer in alone if answer is not None]  # the next image overwrites them
        return Refined(SiteSet.from_mask(seen.selected), torch.cat(parts)) if parts else None

    def _answer(self, selected: Tensor, native: Tensor, *context: Tensor) -> Refined | None:
        if self.graphed is not None and self.network.fused is not None:  # not fused: its layers are being counted
            return Refined(*self.graphed(selected, native, *context))
        pyramid = self.network.pyramid(selected)
        sites = pyramid.levels[0]
        if len(sites) == 0:
            return None
        return Refined(sites, self.network.features(refiner_input(sites, native, *context), pyramid))


class Bilateral(Refining):
    """Joint bilateral upsampling at the selected pixels."""

    def __call__(self, seen: Seen) -> Refined | None:
        sites = SiteSet.from_mask(seen.selected)
        if len(sites) == 0:
            return None
        return Refined(sites, self.network(sites, seen.native, seen.low, seen.probabilities))


class Points(Refining):
    """PointRend: all pixels come out of subdivision, or the selected ones are predicted."""

    network: PointRend
    needs_maps = True

    def __call__(self, seen: Seen) -> Refined | None:
        assert seen.maps is not None
        if self.network.where == "entropy":
            sites = SiteSet.from_mask(seen.selected)
            return Refined(sites, self.network.at_sites(seen.maps, sites)) if len(sites) else None
        batch, height, width = seen.selected.shape
        logits, share = self.network.render(seen.maps, (height, width))
        sites = SiteSet.from_mask(torch.ones_like(seen.selected))
        return Refined(sites, logits.permute(0, 2, 3, 1).flatten(0, 2), [share] * batch)


class Patches(Refining):
    """The dense segmenter at native resolution, on the patches that hold selected pixels."""

    network: PatchRefiner
    needs_native = True

    def __call__(self, seen: Seen) -> Refined | None:
        native = self.native
        assert native is not None
        sites, logits, density = self.network(lambda crops: native(normalise(crops)), seen.native, seen.selected)
        return Refined(sites, logits, density.tolist()) if len(sites) else None


class Repeats(Refining):
    """The dense segmenter's layers at native resolution, or those of a network of the same kind, at selected sites."""

    network: RepeatRefiner
    needs_record = True
    needs_native = True

    def __init__(self, network: Any, backend: Backend, dtype: torch.dtype, native: nn.Module | None) -> None:
        super().__init__(network, backend, dtype, native)
        self.engine = _engine(backend)
        if self.network.own is not None:
            device = next(self.network.own.parameters()).device
            self.network.own = ready(fold_batch_norm(self.network.own), device, dtype)

    def __call__(self, seen: Seen) -> Refined | None:
        grid, pixels = Grid(seen.selected), seen.native.view(-1, 3)
        if len(grid.sites) == 0:
            return None
        logits = self.network(self.native, grid, lambda flat: normalise_pixels(pixels[flat]), seen.kept, self.engine)
        return Refined(grid.sites, logits)


def _engine(backend: Backend) -> Engine:
    """The fastest on ``backend``."""
    if isinstance(backend, CpuBackend):
        with suppress(NativeError):  # what compiled the backend may not be there any more
            return CpuEngine(backend)
    return Engine(backend)


KINDS: dict[str, type[Refining]] = {
    "sparserefine": Sparse,
    "bilateral": Bilateral,
    "pointrend": Points,
    "patches": Patches,
    "repeat": Repeats,
}
"""By the names of networks.registry.REFINERS."""
