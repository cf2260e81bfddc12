"""A frame as one graph gives what it gives uncaptured; without CUDA its calls run again instead of being replayed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sparserefine_ros.networks import graphed_unet
from sparserefine_ros.networks.fused_unet import FusedUNet
from sparserefine_ros.networks.graphed_unet import Frame, GraphedUNet, capacity
from sparserefine_ros.networks.refiner import SparseRefiner
from sparserefine_ros.networks.selectors import upsample_nearest
from sparserefine_ros.networks.unet import SparseUNet
from sparserefine_ros.segmenter.bundle import Bundle
from sparserefine_ros.segmenter.preprocess import normalise
from sparserefine_ros.segmenter.refiner_input import refiner_input
from sparserefine_ros.segmenter.refining import Sparse
from sparserefine_ros.segmenter.segmenter import Segmenter
from sparserefine_ros.sparse import STRIDE_MODES, Pyramid, SiteSet
from sparserefine_ros.sparse.backends import Backend
from sparserefine_ros.sparse.backends.triton_backend import TritonBackend

pytestmark = pytest.mark.usefixtures("quick_interpreter")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MISSING = TritonBackend.missing(DEVICE)
runs = pytest.mark.skipif(MISSING is not None, reason=f"triton backend: {MISSING}")
if MISSING is None:
    from sparserefine_ros.sparse.backends import triton_maps
HEIGHT, WIDTH, LEVELS = 13, 18, 2
GENERATOR = torch.Generator().manual_seed(0)


def random_mask(density: float, batch: int = 1) -> Tensor:
    return (torch.rand(batch, HEIGHT, WIDTH, generator=GENERATOR) < density).to(DEVICE)


def colours(mask: Tensor) -> Tensor:
    """[B, H, W, 3]."""
    return torch.randn(*mask.shape, 3, generator=GENERATOR).to(DEVICE)


def gather(sites: SiteSet, image: Tensor) -> Tensor:
    return image.view(-1, 3)[sites.flat]


def build(stride: str = "dilate", levels: int = LEVELS, backend: type[Backend] = Backend) -> Any:
    """One that captures, and one of the same weights on ``backend`` that does not."""
    torch.manual_seed(0)
    unet = SparseUNet(3, (8, 12, 16)[:levels], 1).eval().to(DEVICE)
    return GraphedUNet(FusedUNet(unet, TritonBackend()), stride, gather), FusedUNet(unet, backend())


def assert_right(graphed: GraphedUNet, plain: FusedUNet, mask: Tensor) -> None:
    """Runs a frame of ``mask``: the sites, order and features are those of the uncaptured path."""
    image = colours(mask)
    sites, features = graphed(mask, image)
    pyramid = plain.backend.pyramid(mask, len(plain.levels), graphed.stride)
    assert sites.shape == mask.shape and torch.equal(sites.sites, torch.nonzero(mask))
    expected = plain(gather(pyramid.levels[0], image), pyramid)
    if plain.backend.name == "triton" and DEVICE.type == "cpu":
        assert torch.equal(features, expected)
    else:  # where capacities choose tiles, and tiles the order of sums
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed_unet, "ROWS", 16)


def test_capacities_leave_a_quarter_to_spare() -> None:
    wanted = {(0, 999): 16, (12, 999): 16, (13, 999): 32, (64, 999): 80, (100, 110): 110, (0, 3): 3, (0, 0): 0}
    assert {key: capacity(*key) for key in wanted} == wanted


@runs
@pytest.mark.parametrize(("stride", "levels"), [("dilate", 3), ("floor", 2)])
def test_every_frame_is_what_it_is_uncaptured_bit_for_bit(stride: str, levels: int) -> None:
    graphed, plain = build(stride, levels, TritonBackend)
    one = torch.zeros_like(random_mask(0))
    one[0, 7, 9] = True
    steps = [
        (random_mask(0.2), False),  # gives the capacities
        (random_mask(0.2), True),
        (one, True),
        (random_mask(0.7), False),  # does not fit
        (random_mask(0.7), True),
        (random_mask(0.1), True),
    ]
    for mask, captured in steps:
        assert_right(graphed, plain, mask)
        assert (graphed.now.frame is not None) == captured


@runs
@pytest.mark.parametrize("first", [0.0, 1.0])
def test_the_first_frame_may_be_empty_or_full(first: float) -> None:
    graphed, plain = build()
    for density in (first, first, 1 - first, 0.5):
        assert_right(graphed, plain, random_mask(density, batch=2))


@runs
def test_at_a_capacity_and_one_above() -> None:
    graphed, plain = build()
    mask = random_mask(0.3)
    levels = Pyramid.build(mask, LEVELS).levels
    exact, pixels = [len(sites) for sites in levels], [sites.shape[1] * sites.shape[2] for sites in levels]
    assert_right(graphed, plain, mask)
    for level in range(LEVELS):
        graphed.now.capacities, graphed.now.frame = tuple(exact), None
        assert_right(graphed, plain, mask)
        assert graphed.now.frame is not None and graphed.now.capacities == tuple(exact)
        above = [count - (index == level) for index, count in enumerate(exact)]
        graphed.now.capacities, graphed.now.frame = tuple(above), None
        assert_right(graphed, plain, mask)
        assert graphed.now.frame is None
        assert graphed.now.capacities == tuple(map(capacity, exact, pixels))
    assert_right(graphed, plain, mask)
    assert graphed.now.frame is not None


@runs
def test_nothing_of_a_larger_frame_is_left_in_a_smaller_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a graph, every allocation gets the memory of the frame before; features there are poisoned besides."""
    graphed, plain = build()
    memory: list[Tensor] = []
    taken = 0

    def allocate(*shape: int, **kwargs: Any) -> Tensor:
        nonlocal taken
        taken += 1
        if taken > len(memory):
            memory.append(torch.zeros(*shape, **kwargs))
        assert memory[taken - 1].shape == shape
        return memory[taken - 1]

    for mask in (random_mask(0.6), random_mask(0.6)):
        assert_right(graphed, plain, mask)
    frame = graphed.now.frame
    assert frame is not None
    for density in (0.6, 0.1, 0.0, 0.3):
        mask = random_mask(density)
        image, taken = colours(mask), 0
        with torch.inference_mode(), monkeypatch.context() as patch:
            if frame.graph is None:
                patch.setattr(triton_maps.torch, "empty", allocate)
            _, sites, features = frame(mask, image)
        pyramid = plain.backend.pyramid(mask, LEVELS, "dilate")
        n = len(pyramid.levels[0])
        expected = plain(gather(pyramid.levels[0], image), pyramid)
        torch.testing.assert_close(features[:n], expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(sites.sites[:n], pyramid.levels[0].sites) and not sites.sites[n:].any()
        with torch.inference_mode():
            for buffer in frame.unet._buffers.values():
                buffer.fill_(torch.nan)
    assert frame.graph is not None or len(memory) == 4 * LEVELS


class Calls(TorchFunctionMode):
    """Notes what torch is asked for; refuses what a host has to wait for, or has to send."""

    REFUSED = {"tolist", "item", "numpy", "__bool__", "__int__", "__index__", "nonzero", "equal", "tensor", "unique"}

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        assert name not in self.REFUSED, name
        result = func(*args, **(kwargs or {}))
        self.seen.append((name, [tuple(a.shape) for a in (*args, result) if isinstance(a, Tensor)]))
        return result


@runs
def test_what_is_captured_asks_the_host_for_nothing_and_is_always_the_same() -> None:
    graphed, _ = build()
    seen = []
    for density in (0.5, 0.5, 0.0, 1.0):
        mask = random_mask(density)
        image = colours(mask)
        graphed(mask, image)
        if graphed.now.frame is not None:
            with torch.inference_mode(), Calls() as calls:
                graphed.now.frame.run()
            seen.append(calls.seen)
    assert len(seen) == 2 and len(seen[0]) > 20
    assert seen[0] == seen[1]


@runs
def test_uncaptured_use_of_the_same_network_leaves_the_memory_of_a_graph_in_its_place() -> None:
    graphed, _ = build()
    for mask in (random_mask(0.1), random_mask(0.1)):
        graphed(mask, colours(mask))
    assert graphed.now.frame is not None
    before = {name: buffer.data_ptr() for name, buffer in graphed.now.frame.unet._buffers.items()}
    pyramid = graphed.unet.backend.pyramid(random_mask(1.0), LEVELS, "dilate")
    graphed.unet(torch.zeros(len(pyramid.levels[0]), 3, device=DEVICE), pyramid)
    assert before == {name: buffer.data_ptr() for name, buffer in graphed.now.frame.unet._buffers.items()}


@runs
def test_forms_that_alternate_are_captured_once_each() -> None:
    """As batches of one camera's frame or of two."""
    graphed, plain = build()
    frames = []
    for turn in range(3):
        for batch in (1, 2):
            assert_right(graphed, plain, random_mask(0.3, batch))
            assert (graphed.now.frame is not None) == (turn > 0)
            frames.append(graphed.now.frame)
    assert frames[2:4] == frames[4:6] and frames[2] is not frames[3]
    assert not graphed.unet._buffers  # beside those of the graphs


@runs
def test_frames_go_on_where_capture_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    graphed, plain = build()

    def fails(self: Frame, *args: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    with monkeypatch.context() as patch:
        patch.setattr(Frame, "__init__", fails)
        assert_right(graphed, plain, random_mask(0.3))
        with pytest.warns(UserWarning, match="without a CUDA graph.*operation not permitted"):
            assert_right(graphed, plain, random_mask(0.3))
    assert_right(graphed, plain, random_mask(0.3))  # and does not try again
    assert graphed.now.frame is None


def test_other_backends_are_refused() -> None:
    with pytest.raises(ValueError, match="the torch backend: only triton's"):
        GraphedUNet(FusedUNet(SparseUNet(3, (4,), 1), Backend()), "floor", gather)


@runs
def test_the_pipeline_gives_the_same_frames(tiny_bundle: Path, frame: np.ndarray) -> None:
    plain, segmenter = (
        Segmenter(Bundle.load(tiny_bundle), str(DEVICE), sparse_backend="triton", entropy_threshold=1.6)
        for _ in range(2)
    )
    usual, sparse = plain.refining, segmenter.refining
    assert isinstance(usual, Sparse) and isinstance(sparse, Sparse) and sparse.network.fused is not None
    assert (usual.graphed is not None) == (DEVICE.type == "cuda")
    usual.graphed = None
    sparse.graphed = GraphedUNet(sparse.network.fused, sparse.network.stride, refiner_input)
    for threshold, captured in ((1.6, False), (1.65, True), (math.log(11), True), (0.5, False)):
        plain.entropy_threshold = segmenter.entropy_threshold = threshold
        image = np.ascontiguousarray(frame[44:, 64:][:, ::-1] if captured else frame[:20, :32])
        (expected,), (result,) = plain.segment([image]), segmenter.segment([image])
        assert (sparse.graphed.now.frame is not None) == captured
        assert result.density == expected.density and (result.density > 0.02) == (threshold < 2)
        close = 1 if DEVICE.type == "cuda" else 0
        assert (result.mask != expected.mask).mean() <= 0.001 * close
        assert np.abs(result.confidence.astype(int) - expected.confidence).max() <= close


@runs
def test_context_is_gathered_where_there_is_some() -> None:
    torch.manual_seed(0)
    refiner = SparseRefiner(4, (6,), "floor", blocks=1, context=True).eval().to(DEVICE)
    refiner.fuse(TritonBackend())
    assert refiner.fused is not None
    graphed = GraphedUNet(refiner.fused, "floor", refiner_input)
    for density in (0.3, 0.3, 0.2):
        mask = random_mask(density, batch=2)
        native = torch.randint(0, 256, (*mask.shape, 3), generator=GENERATOR, dtype=torch.uint8).to(DEVICE)
        low = torch.randn(2, 4, HEIGHT // 2, WIDTH // 2, generator=GENERATOR).softmax(1).to(DEVICE)
        sites, features = graphed(mask, native, low.to(memory_format=torch.channels_last))
        colours = normalise(native).permute(0, 2, 3, 1)[mask]
        x = torch.cat([colours, upsample_nearest(low, (HEIGHT, WIDTH)).permute(0, 2, 3, 1)[mask]], 1)
        with torch.no_grad():
            expected = refiner.unet(x, Pyramid.build(mask, 1, "floor"))
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert graphed.now.frame is not None


@pytest.mark.skipif(DEVICE.type != "cuda" or MISSING is not None, reason="capture needs CUDA and Triton")
@pytest.mark.parametrize("stride", STRIDE_MODES)
def test_a_graph_is_captured_and_replayed(stride: str) -> None:
    graphed, plain = build(stride)
    for density in (0.5, 0.5, 0.05, 0.3, 0.0, 0.4):
        assert_right(graphed, plain, random_mask(density))
        torch.full((1 << 22,), torch.nan, device=DEVICE)  # what a graph gave back would be overwritten here
    assert graphed.now.frame is not None and isinstance(graphed.now.frame.graph, torch.cuda.CUDAGraph)
    torch.cuda.set_sync_debug_mode("error")
    try:
        graphed.now.frame.graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
