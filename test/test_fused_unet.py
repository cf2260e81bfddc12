"""The fused U-Net gives what the plain one gives, on every backend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sparserefine_ros.benchmarks.masks import edge_mask
from sparserefine_ros.errors import ParameterError, is_out_of_memory
from sparserefine_ros.networks.fused_unet import FusedUNet
from sparserefine_ros.networks.unet import SiteNorm, SparseUNet
from sparserefine_ros.node.parameters import BY_NAME
from sparserefine_ros.sparse import Pyramid
from sparserefine_ros.sparse.backends import BACKENDS, backend_class, pick_backend

pytestmark = pytest.mark.usefixtures("quick_interpreter")
CPU = torch.device("cpu")


def unet(channels: tuple[int, ...], blocks: int, seed: int = 0) -> SparseUNet:
    torch.manual_seed(seed)
    net = SparseUNet(3, channels, blocks)
    for module in net.modules():
        if isinstance(module, SiteNorm):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2.0)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
    return net.eval()


@pytest.fixture(autouse=True)
def _same_threads_afterwards() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("stride", ["dilate", "floor"])
@pytest.mark.parametrize(
    ("channels", "blocks"), [((16,), 1), ((5, 7), 1), ((16, 32, 64), 2), ((32, 24, 40, 16), 3)], ids=str
)
def test_fused_unet_equals_plain_unet(name: str, stride: str, channels: tuple[int, ...], blocks: int) -> None:
    if name == "spconv":
        torch.set_num_threads(1)
    if missing := backend_class(name).missing(CPU):
        pytest.skip(f"{name}: {missing}")
    backend = pick_backend(name, CPU)
    net = unet(channels, blocks)
    expected_net = unet(channels, blocks).double()
    fused = FusedUNet(net, backend)
    generator = torch.Generator().manual_seed(1)
    # Large, small, empty, one pixel, all: buffers are reused and never leak from one frame into the next.
    for batch, height, width, density in (
        (2, 45, 38, 0.3),
        (1, 9, 14, 0.5),
        (1, 8, 8, 0.0),
        (1, 1, 1, 1.0),
        (1, 20, 31, 1.0),
    ):
        mask = torch.rand(batch, height, width, generator=generator) < density
        pyramid = backend.pyramid(mask, len(channels), stride)
        x = torch.randn(int(mask.sum()), 3, generator=generator)
        with torch.no_grad():
            expected = expected_net(x.double(), Pyramid.build(mask, len(channels), stride))
        actual = fused(x, pyramid).double()
        assert actual.shape == expected.shape
        if len(expected):
            assert float((actual - expected).abs().max() / expected.abs().max()) <= 1e-5


@pytest.mark.parametrize("name", ["torch", "cpu"])
def test_exhausted_memory_costs_that_frame_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever allocation of a large frame fails, it fails with the allocator's error, and the next frame is right."""
    if missing := backend_class(name).missing(CPU):
        pytest.skip(f"{name}: {missing}")
    net, allocate = unet((16, 24), 1), torch.empty
    backend = pick_backend(name, CPU)
    generator = torch.Generator().manual_seed(2)
    small, large = (torch.rand(1, side, side, generator=generator) < 0.7 for side in (12, 30))
    frames = [(mask, torch.randn(int(mask.sum()), 3, generator=generator)) for mask in (small, large)]
    with torch.no_grad():
        expected = [net(x, Pyramid.build(mask, 2, "floor")) for mask, x in frames]
    left = 0

    def limited(*args: Any, **options: Any) -> torch.Tensor:
        nonlocal left
        left -= 1
        if left < 0:
            return allocate(1 << 55)  # more than there are addresses: the allocator's own refusal
        return allocate(*args, **options)

    fused = FusedUNet(net, backend)
    failures = 0
    for allowed in range(100):
        left = allowed
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", limited)
            try:
                fused(frames[1][1], backend.pyramid(large, 2, "floor"))
                break
            except RuntimeError as error:
                assert is_out_of_memory(error)
                failures += 1
        actual = fused(frames[0][1], backend.pyramid(small, 2, "floor"))
        torch.testing.assert_close(actual, expected[0], rtol=1e-4, atol=1e-4)
        fused._buffers.clear()
    assert failures >= 8, "every buffer of the frame was refused once"
    actual = fused(frames[1][1], backend.pyramid(large, 2, "floor"))
    torch.testing.assert_close(actual, expected[1], rtol=1e-4, atol=1e-4)


def test_fused_unet_keeps_its_own_weights() -> None:
    net = unet((8, 12), 2).double()
    mask = torch.rand(1, 12, 12, generator=torch.Generator().manual_seed(0)) < 0.4
    pyramid = Pyramid.build(mask, 2, "floor")
    x = torch.randn(int(mask.sum()), 3, dtype=torch.float64)
    expected = net(x, pyramid).detach()
    fused = FusedUNet(net, pick_backend("torch", CPU), torch.float64)
    for parameter in net.parameters():
        torch.nn.init.zeros_(parameter)
    torch.testing.assert_close(fused(x, pyramid), expected, rtol=1e-12, atol=1e-12)


def test_unknown_and_unfit_backends_are_refused() -> None:
    with pytest.raises(ParameterError, match="'spam' is unknown; choose one of auto, torch"):
        pick_backend("spam", CPU)
    with pytest.raises(ParameterError, match="'torch' cannot run on cpu: it computes in .*, not in int32; choose"):
        pick_backend("torch", CPU, torch.int32)


def test_the_node_offers_every_backend() -> None:
    assert BY_NAME["sparse_backend"].choices == ("auto", *BACKENDS)


@pytest.mark.parametrize("name", BACKENDS)
def test_eight_megapixels(name: str) -> None:
    """Larger than any camera's frame: the same sites and values."""
    if name == "spconv":
        torch.set_num_threads(1)
    if name == "triton" or (missing := backend_class(name).missing(CPU)):
        pytest.skip(f"{name}: {'an interpreter takes minutes for it' if name == 'triton' else missing}")
    backend, net = pick_backend(name, CPU), unet((16, 6), 1)
    mask = edge_mask(2048, 4096, 0.02)
    mask[0, -2:, -2:] = True
    x = torch.randn(int(mask.sum()), 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = net(x, Pyramid.build(mask, 2, "floor"))
    actual = FusedUNet(net, backend)(x, backend.pyramid(mask, 2, "floor"))
    assert float((actual - expected).abs().max() / expected.abs().max()) <= 1e-5
