"""Sparse repetition against the same network on whole maps, in float64, where each map is put together before use."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sparserefine_ros.errors import BundleError, ParameterError
from sparserefine_ros.networks.compact import CompactSegmenter
from sparserefine_ros.networks.hrnet import HRNet
from sparserefine_ros.networks.macs import counting_refiner_macs, dense_macs
from sparserefine_ros.networks.registry import DENSE, REFINERS, build
from sparserefine_ros.networks.repeater import RepeatRefiner, check_repeatable
from sparserefine_ros.networks.repetition import OPERATIONS, Repetition, repeat
from sparserefine_ros.networks.repetition_axes import KNOWN, as_map, reshaped, sizes
from sparserefine_ros.networks.repetition_cpu import BLOCKS_OF, CpuEngine
from sparserefine_ros.networks.repetition_recording import Kept, NotRepeatableError, record
from sparserefine_ros.networks.repetition_tables import Engine, Grid, lies_under
from sparserefine_ros.networks.segformer_hub import HubSegFormer
from sparserefine_ros.networks.segnext import SegNeXt
from sparserefine_ros.segmenter.bundle import Bundle, save_network
from sparserefine_ros.segmenter.dense import fold_batch_norm
from sparserefine_ros.segmenter.fitting import check_refiner
from sparserefine_ros.segmenter.segmenter import Segmenter
from sparserefine_ros.sparse import SiteSet
from sparserefine_ros.sparse.backends import BACKENDS, backend_class, pick_backend
from sparserefine_ros.sparse.backends.cpu import CpuBackend
from sparserefine_ros.training.bundle import copy_dense

CPU = torch.device("cpu")
K = 5


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A few seeds give a compact network whose pooled features are all 0, and with them their gradients."""
    torch.manual_seed(0)


def compact() -> nn.Module:
    return CompactSegmenter(K, (8, 12, 16, 16), (1, 2, 2))


SEGFORMER = {
    "hidden_sizes": [8, 12, 20, 32], "depths": [1, 2, 1, 1], "num_attention_heads": [1, 2, 5, 4],
    "decoder_hidden_size": 16, "num_encoder_blocks": 4, "sr_ratios": [4, 2, 2, 1],
}  # fmt: skip


def segformer() -> nn.Module:
    pytest.importorskip("transformers")
    return HubSegFormer(K, SEGFORMER)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "compact": compact, "hrnet": lambda: HRNet(K, 18), "segformer": segformer,
    "segnext": lambda: SegNeXt(K, "T", offsets=False),
}  # fmt: skip
WIDE = (16, 24, 32, 32)  # channels enough for the CPU's blocks


def made(network: nn.Module) -> nn.Module:
    """In float64 and evaluation mode, with statistics that are not 0 and 1."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, nn.ReLU):
            module.inplace = False  # what the reference compares stays what it was
    return network.double().eval()


def images(size: tuple[int, int], batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def colours_of(native: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda flat: native.permute(0, 2, 3, 1).reshape(-1, 3)[flat]


def small(native: Tensor, scale: float) -> Tensor:
    size = [max(1, round(side * scale)) for side in native.shape[2:]]
    return F.interpolate(native, size, mode="bilinear", align_corners=False)


class PutTogether(TorchFunctionMode):
    """Every operation on whole maps at native resolution, reading sites that are not active from low resolution."""

    REARRANGING = ("contiguous", "flatten", "movedim", "permute", "reshape", "transpose", "view")

    def __init__(self, selected: Tensor, kept: list[Kept]) -> None:
        super().__init__()
        self.selected, self.kept = selected, (recorded.map() for recorded in kept)
        # By map: itself, so that its id stays its own; at low resolution; its size. Images, pooled maps are missing.
        self.low: dict[int, tuple[Tensor, Tensor, tuple[int, int]]] = {}
        self.after = ""

    def read(self, x: Tensor) -> Tensor:
        """x: [B, C, h, w], or [B, heads, h w, C / heads]"""
        if id(x) not in self.low:
            return x
        _, low, size = self.low[id(x)]
        same = size == self.selected.shape[1:]
        active = self.selected if same else F.adaptive_max_pool2d(self.selected.double(), size) > 0
        enlarged = F.interpolate(low, size, mode="bilinear", align_corners=False)
        if x.shape[2:] == size:
            return torch.where(active[:, None], x, enlarged)
        enlarged = enlarged.unflatten(1, (x.shape[1], x.shape[3])).flatten(3).transpose(2, 3)
        return torch.where(active.flatten(1)[:, None, :, None], x, enlarged)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in self.REARRANGING or name == "batch_norm" and self.after == "conv2d":  # a part of the convolution
            result = func(*args, **kwargs)
            if id(args[0]) in self.low:
                self.low[id(result)] = (result, *self.low[id(args[0])][1:])
            self.after = name
            return result
        if name not in OPERATIONS:
            return func(*args, **kwargs)
        self.after = name
        low, args = next(self.kept), list(args)
        if name == "scaled_dot_product_attention":
            args[1:3] = [self.read(x) for x in args[1:3]]
        everywhere = ("interpolate", "adaptive_avg_pool2d", "group_norm", "hamburger")
        if name in everywhere or (name == "conv2d" and (args[1].shape[2:] != (1, 1) or args[3] not in (1, (1, 1)))):
            x, args[0] = args[0], self.read(args[0])
        else:
            x = next((y for y in args if id(y) in self.low), args[0])
        result = func(*args, **kwargs)
        whole = name != "cat" and id(x) not in self.low and name != "interpolate" and x.shape[1] != 3
        if name != "adaptive_avg_pool2d" and not whole:
            of_map = name in ("conv2d", "interpolate", "cat") or id(x) not in self.low
            self.low[id(result)] = (result, low, tuple(result.shape[2:]) if of_map else self.low[id(x)][2])
        return result


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("size", "batch"), [((64, 96), 1), ((75, 101), 2)])
@torch.no_grad()
def test_all_pixels_selected_is_the_network_at_native_resolution(name: str, size: tuple[int, int], batch: int) -> None:
    network, native = made(NETWORKS[name]()), images(size, batch)
    logits, kept = record(network, small(native, 0.5))
    torch.testing.assert_close(logits, network(small(native, 0.5)), rtol=0, atol=0)
    answer = repeat(network, Grid(torch.ones(batch, *size, dtype=torch.bool)), colours_of(native), kept)
    expected = network(native)
    torch.testing.assert_close(answer, expected.permute(0, 2, 3, 1).reshape(-1, K), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("scale", [0.5, 0.3])
@pytest.mark.parametrize("share", [0.0, 0.002, 0.3])
@torch.no_grad()
def test_some_pixels_selected(name: str, scale: float, share: float) -> None:
    size = (70, 93)
    network, native = made(NETWORKS[name]()), images(size, 2)
    selected = torch.rand(2, *size, generator=torch.Generator().manual_seed(1)) < share
    _, kept = record(network, small(native, scale))
    run = Repetition(Grid(selected), kept, Engine())
    answer = run.of(network, colours_of(native))
    with PutTogether(selected, kept):
        whole = network(native)
    expected = whole.permute(0, 2, 3, 1)[selected]
    torch.testing.assert_close(answer, expected, rtol=1e-9, atol=1e-11)
    _, fewer = record(network, small(native, scale), run.read)
    assert sum(one.tensor is not None for one in fewer) == len(run.read) < 0.6 * len(kept)
    torch.testing.assert_close(repeat(network, Grid(selected), colours_of(native), fewer), answer, rtol=0, atol=0)
    assert check_repeatable(network.float(), network, CPU) == run.read  # whatever is selected, and however large
    if 0 < share < 0.3:  # what low resolution stands in for does matter
        assert (answer - network.double()(native).permute(0, 2, 3, 1)[selected]).abs().max() > 1e-3


@given(st.tuples(st.integers(1, 24), st.integers(1, 24)), st.integers(1, 12), st.integers(1, 12), st.floats(0, 1))
def test_what_lies_under_a_coarser_grid(size: tuple[int, int], down: int, right: int, share: float) -> None:
    """Where halving leads there, in part or not at all: what adaptive pooling says."""
    places = (-(-size[0] // down), -(-size[1] // right))
    for height, width in (size, (places[0] * down, places[1] * right)):
        active = torch.rand(2, height, width, generator=torch.Generator().manual_seed(0)) < share
        assert torch.equal(lies_under(active, places), F.adaptive_max_pool2d(active.double(), places) > 0)


@settings(max_examples=100, deadline=None)
@given(
    st.tuples(st.integers(15, 40), st.integers(15, 40)), st.integers(1, 2),
    st.sampled_from([(1, 1), (3, 3), (2, 2), (5, 3), (1, 7), (7, 1)]), st.integers(1, 3), st.integers(0, 3),
    st.integers(1, 2), st.booleans(), st.booleans(), st.floats(0, 1), st.integers(0, 99),
)  # fmt: skip
@torch.no_grad()
def test_a_convolution_of_any_form(
    size: tuple[int, int], batch: int, kernel: tuple[int, int], stride: int, padding: int, dilation: int,
    by_channel: bool, bias: bool, share: float, seed: int,
) -> None:  # fmt: skip
    """Between one that makes sites of pixels and the way back to their size."""
    around = tuple(min(padding, dilation * (side // 2)) for side in kernel)  # no output lies where nothing is read
    torch.manual_seed(seed)

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 4, 3, padding=1)
            groups, channels = (4, 4) if by_channel else (1, 6)
            self.middle = nn.Conv2d(4, channels, kernel, stride, around, dilation, groups, bias)  # type: ignore[arg-type]

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.middle(F.relu(self.first(x))))
            return F.interpolate(y, x.shape[-2:], mode="bilinear", align_corners=False)

    network, native = Small().double(), images(size, batch, seed)
    selected = torch.rand(batch, *size) < share
    _, kept = record(network, small(native, 0.95))
    answer = repeat(network, Grid(selected), colours_of(native), kept)
    with PutTogether(selected, kept):
        whole = network(native)
    torch.testing.assert_close(answer, whole.permute(0, 2, 3, 1)[selected], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("axes", KNOWN)
@pytest.mark.parametrize("size", [(5, 7), (3, 1), (1, 6), (1, 1)])
def test_axes(axes: str, size: tuple[int, int]) -> None:
    """However a network may put them, the way there and back leaves every value where it was."""
    x, heads = torch.arange(2 * 12 * size[0] * size[1]).view(2, 12, *size), 3
    letters = {"b": 2, "c": 12, "h": size[0], "w": size[1], "g": heads, "d": 4}
    split = x.unflatten(1, (heads, 4))  # b g d h w
    atoms = axes.replace("p", "hw").replace("c", "gd")
    arranged = split.permute(["bgdhw".index(letter) for letter in atoms])
    shape = [size[0] * size[1] if letter == "p" else letters[letter] for letter in axes]
    arranged = arranged.reshape(shape)
    assert sizes(axes, 2, 12, size, heads) == tuple(shape)
    assert torch.equal(as_map(arranged, axes, size), x)
    if 1 not in size:
        found = reshaped(axes, [-1, *shape[1:]], 2, 12, size)
        assert found == (axes, heads if "g" in axes else 1)
    assert reshaped(axes, [*shape, 2], 2, 12, size) is None


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients(name: str) -> None:
    """Of every weight, as autograd has them on whole maps."""
    size = (48, 64)
    network, native = made(NETWORKS[name]()), images(size)
    selected = torch.rand(1, *size, generator=torch.Generator().manual_seed(1)) < 0.05
    with torch.no_grad():
        _, kept = record(network, small(native, 0.5))
    weights = torch.randn(int(selected.sum()), K, dtype=torch.float64)
    (repeat(network, Grid(selected), colours_of(native), kept) * weights).sum().backward()
    found = {key: p.grad for key, p in network.named_parameters()}
    network.zero_grad()
    with PutTogether(selected, kept):
        whole = network(native)
    (whole.permute(0, 2, 3, 1)[selected] * weights).sum().backward()
    for key, p in network.named_parameters():
        got, expected = found[key], p.grad
        assert got is not None and expected is not None and expected.abs().max() > 0, key
        # That of a key's bias is 0: it adds the same to all that a softmax compares.
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-10 * float(expected.abs().max()) + 1e-14, msg=key)


ENGINES = {name: Engine for name in BACKENDS if backend_class(name).missing(CPU) is None}
if "cpu" in ENGINES:
    ENGINES["cpu, with tables in C"] = CpuEngine  # type: ignore[assignment]


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("network", ["compact", "segnext", "segformer"])
@pytest.mark.parametrize("share", [0.1, 0.0])
@torch.inference_mode()
def test_every_engine(name: str, network: str, share: float) -> None:
    """On sites that fill 2x2 blocks, as those of a selection made at low resolution do, and on others."""
    made_by = {**NETWORKS, "compact": lambda: CompactSegmenter(K, WIDE, (1, 2, 2))}[network]
    repeated, native = made(made_by()).float(), images((51, 64), 2).float()
    selected = torch.rand(2, 51, 64, generator=torch.Generator().manual_seed(1)) < share / 2
    selected |= F.interpolate(selected[:, None, ::4, ::4].float(), (51, 64))[:, 0] > 0
    _, kept = record(repeated, small(native, 0.5))
    engine = ENGINES[name](pick_backend(name.split(",")[0], CPU, torch.float32))  # type: ignore[arg-type]
    for _ in range(2):  # the second time with weights that are packed already
        answer = repeat(repeated, Grid(selected), colours_of(native), kept, engine)
    expected = repeat(repeated, Grid(selected), colours_of(native), kept)
    torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif("cpu" not in ENGINES, reason="no C compiler")
@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 90), st.integers(0, 50), st.integers(1, 21), st.integers(1, 70), st.booleans(), st.integers(0, 99)
)
@torch.inference_mode()
def test_convolutions_by_channel_in_c(n: int, count: int, taps: int, channels: int, bias: bool, seed: int) -> None:
    """Rows of any number, and what lies outside."""
    torch.manual_seed(seed)
    rows, weight = torch.randn(count, channels), torch.randn(channels, 1, taps, 1)
    add, table = torch.randn(channels) if bias else None, torch.randint(0, count + 1, (n, taps), dtype=torch.int32)
    padded = torch.cat([rows, torch.zeros(1, channels)]).double()
    expected = torch.einsum("ntc,ct->nc", padded[table.long()], weight[:, 0, :, 0].double())
    expected = (expected if add is None else expected + add).float()
    for engine in (Engine(), CpuEngine(CpuBackend())):
        torch.testing.assert_close(engine.conv_by_channel(rows, weight, add, table), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif("cpu" not in ENGINES, reason="no C compiler")
@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 23), st.integers(1, 23), st.integers(1, 2), st.floats(0, 1), st.integers(1, 3), st.integers(0, 99)
)  # fmt: skip
@torch.inference_mode()
def test_convolutions_by_blocks(height: int, width: int, batch: int, share: float, grain: int, seed: int) -> None:
    """Sites of every shape, and what lies beyond them, against the same layer without blocks."""
    torch.manual_seed(seed)
    coarse = torch.rand(batch, -(-height // grain), -(-width // grain)) < share
    active = coarse.repeat_interleave(grain, 1).repeat_interleave(grain, 2)[:, :height, :width]
    grid, engine = Grid(active), CpuEngine(CpuBackend())
    found, table = engine.under(grid, grid, BLOCKS_OF)
    with_blocks = engine.kernel_map(grid, found, table, BLOCKS_OF)
    without = Engine.kernel_map(engine, grid, found, table, BLOCKS_OF)
    assert with_blocks.n_in == without.n_in == len(grid.sites) + len(found.beyond)
    rows, weight, bias = torch.randn(without.n_in, 16), torch.randn(24, 16, 3, 3), torch.randn(24)
    expected = engine.conv(rows, weight, bias, without)
    torch.testing.assert_close(engine.conv(rows, weight, bias, with_blocks), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(table, Engine.under(Engine(), grid, grid, BLOCKS_OF)[1], rtol=0, atol=0)


@pytest.mark.skipif("cpu" not in ENGINES, reason="no C compiler")
@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 20), st.integers(1, 20), st.integers(1, 30), st.integers(1, 30), st.floats(0, 1), st.integers(1, 40),
    st.integers(0, 99),
)  # fmt: skip
@torch.inference_mode()
def test_interpolation_in_c(h: int, w: int, height: int, width: int, share: float, channels: int, seed: int) -> None:
    """Against F.interpolate of the whole map, and what it reads against torch's."""
    torch.manual_seed(seed)
    low, sites = torch.randn(2, channels, h, w), SiteSet.from_mask(torch.rand(2, height, width) < share)
    rows = low.permute(0, 2, 3, 1).reshape(-1, channels)
    expected = sites.gather(F.interpolate(low, (height, width), mode="bilinear", align_corners=False))
    in_c = CpuEngine(CpuBackend()).corners(sites, (height, width), (h, w), torch.float32)
    in_torch = Engine().corners(sites, (height, width), (h, w), torch.float32)
    read, read_by_torch = torch.zeros(2, len(rows), dtype=torch.bool)
    in_c.mark(read)
    in_torch.mark(read_by_torch)
    assert torch.equal(read, read_by_torch)
    order = torch.randperm(len(rows), dtype=torch.int32)
    shuffled = torch.empty_like(rows).index_copy_(0, order.long(), rows)
    for corners in (in_c, in_torch):
        torch.testing.assert_close(corners.blend(rows), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(corners.through(order).blend(shuffled), expected, rtol=1e-4, atol=1e-5)


class Doing(nn.Module):
    def __init__(self, what: Callable[[Any], Any]) -> None:
        super().__init__()
        self.what, self.conv = what, nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        return self.what(self.conv(x))


@pytest.mark.parametrize(
    ("what", "why"),
    [
        (lambda x: x.mean(), "'mean' of a map is not known at single sites"),
        (lambda x: x.reshape(-1, 4), r"a map of \(1, 4, 64, 64\) as one of \(-1, 4\)"),
        (lambda x: F.layer_norm(x, x.shape[1:]), "layer_norm of a map, its axes bchw"),
        (lambda x: F.linear(x, torch.ones(4, 64)), "linear of a map, its axes bchw"),
        (lambda x: F.max_pool2d(x, 2), "max_pool2d is not known at single sites"),
        (lambda x: F.conv2d(x, torch.ones(4, 2, 3, 3), groups=2), "convolution of 3x3 in 2 groups is not known"),
        (lambda x: F.conv2d(x, torch.ones(4, 4, 3, 3), stride=(1, 2)), r"stride or dilation \(1, 2\)"),
        (lambda x: F.conv2d(x, torch.ones(4, 4, 3, 3), padding="same"), "padding 'same'"),
        (lambda x: F.batch_norm(x.movedim(2, 1), *torch.ones(2, 64)), "batch_norm of maps, their axes bhcw"),
        (lambda x: torch.cat([x, x], 2), "cat of maps, their axes bchw, but by channels"),
        (lambda x: x * torch.ones(64), r"\(64,\) with a map, its axes bchw"),
        (lambda x: x + x.transpose(2, 3), "add of maps of different kinds"),
        (lambda x: F.scaled_dot_product_attention(x, x, x), "attention with a mask or an order, or of maps whose axes"),
        (lambda x: F.adaptive_avg_pool2d(x, 1).flatten(2), "a pooled map, its axes bcp"),
        (lambda x: F.interpolate(x, x.shape[-2:]), "interpolate with mode 'nearest', align_corners None"),
        (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), "scale_factor 2"),
        (lambda x: F.relu(x) + F.adaptive_avg_pool2d(x, 1), "add of maps of different kinds"),
        (lambda x: F.interpolate(x, (9, 9), mode="bilinear"), "logits of another size than the images"),
    ],
)  # fmt: skip
def test_what_cannot_be_repeated_is_named(what: Callable[[Any], Any], why: str) -> None:
    network = Doing(what)
    with pytest.raises((NotRepeatableError, AttributeError), match=why):
        check_repeatable(network, network, CPU)


def test_networks_of_other_classes_do_not_follow() -> None:
    with pytest.raises(ValueError, match="4 classes where the dense segmenter has 5"):
        check_repeatable(compact().eval(), CompactSegmenter(4, (8, 12, 16, 16), (1, 2, 2)).eval(), CPU)


@pytest.fixture
def repeating(tiny_bundle: Path, tmp_path: Path) -> Bundle:
    """The tiny bundle, its dense segmenter as its own refiner."""
    bundle = copy_dense(Bundle.load(str(tiny_bundle)), tmp_path)
    spec = save_network(tmp_path, RepeatRefiner(), "repeat", {}, "refiner.safetensors")
    bundle = replace(bundle, refiner=spec)
    bundle.save()
    return Bundle.load(str(tmp_path))


def noise(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_in_the_pipeline(repeating: Bundle, temperature: float) -> None:
    """With all pixels refined the mask is that of HR dense; with none, that of LR; the batch makes no difference."""
    bundle = replace(repeating, temperature=temperature)
    frames = [noise((60, 82), seed) for seed in range(2)]
    hr = Segmenter(bundle, "cpu", refine=False, scale=1.0).segment(frames)
    lr = Segmenter(bundle, "cpu", refine=False).segment(frames)
    segmenter = Segmenter(bundle, "cpu", entropy_threshold=0.0)
    for index, result in enumerate(segmenter.segment(frames)):
        assert result.density == 1.0
        np.testing.assert_array_equal(result.mask, hr[index].mask)
        assert np.abs(result.confidence.astype(int) - hr[index].confidence).max() <= 1
        np.testing.assert_array_equal(result.mask, segmenter.segment([frames[index]])[0].mask)
    segmenter.entropy_threshold = float(np.log(len(bundle.classes)))
    assert all(
        result.density == 0 and (result.mask == low.mask).all()
        for result, low in zip(segmenter.segment(frames), lr, strict=True)
    )
    segmenter.entropy_threshold = float(np.median(lr[0].low_entropy))
    some = segmenter.segment(frames[:1])[0]
    outside = some.entropy <= segmenter.entropy_threshold
    assert 0.2 < some.density < 0.8 and (some.mask[outside] == lr[0].mask[outside]).all()
    assert (some.mask == hr[0].mask).mean() > (lr[0].mask == hr[0].mask).mean()


def test_multiply_adds(repeating: Bundle) -> None:
    segmenter = Segmenter(repeating, "cpu", entropy_threshold=0.0)
    with counting_refiner_macs(segmenter.refiner) as counts:  # type: ignore[arg-type]
        segmenter.segment([noise((64, 96))])
    whole = dense_macs(lambda: segmenter.dense(torch.zeros(1, 3, 64, 96)))
    assert whole <= sum(counts) <= 1.02 * whole  # the border's zeros are multiplied too


@pytest.mark.parametrize("name", NETWORKS)
@torch.inference_mode()
def test_multiply_adds_of_every_network(name: str) -> None:
    """With all pixels refined those of the network itself; with a part of them in between."""
    network, native = NETWORKS[name]().eval(), images((64, 96)).float()
    _, kept = record(network, small(native, 0.5))
    refiner, whole = RepeatRefiner(network), dense_macs(lambda: network(native))
    for share in (0.0, 0.1, 1.0):
        with counting_refiner_macs(refiner) as counts:
            selected = F.interpolate(torch.rand(1, 1, 4, 6), (64, 96))[:, 0] < share
            refiner(None, Grid(selected), colours_of(native), kept)
        assert sum(counts) < 0.6 * whole if share < 1 else whole <= sum(counts) <= 1.02 * whole


def test_weights_of_its_own(tiny_bundle: Path, tmp_path: Path) -> None:
    """`own` runs in the place of the bundle's network, and is checked against it when it is loaded."""
    bundle = copy_dense(Bundle.load(str(tiny_bundle)), tmp_path)
    own = {"network": bundle.dense.network, "args": bundle.dense.args}
    torch.manual_seed(3)
    refiner = build(REFINERS, "repeat", len(bundle.classes), {"own": own})
    bundle = replace(bundle, refiner=save_network(tmp_path, refiner, "repeat", {"own": own}, "refiner.safetensors"))
    segmenter = Segmenter(bundle, "cpu", entropy_threshold=0.0)
    frame = noise((60, 82))
    with torch.inference_mode():
        pixels = (torch.from_numpy(frame).float() / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
            [0.229, 0.224, 0.225]
        )
        loaded = build(REFINERS, "repeat", len(bundle.classes), {"own": own}).own
        loaded.load_state_dict({k: v.half().float() if v.ndim > 1 else v for k, v in refiner.own.state_dict().items()})
        expected = loaded.eval()(pixels.permute(2, 0, 1)[None]).argmax(1)[0]
    assert (segmenter.segment([frame])[0].mask == expected.numpy()).mean() > 0.999
    other = {"network": "compact", "args": {"widths": [8, 8, 8, 8], "depths": [2, 2, 3]}}
    refiner = build(REFINERS, "repeat", len(bundle.classes), {"own": other})
    bundle = replace(bundle, refiner=save_network(tmp_path, refiner, "repeat", {"own": other}, "other.safetensors"))
    with pytest.raises(BundleError, match="'repeat' cannot follow network 'compact' of bundle .*; take another"):
        Segmenter(bundle, "cpu")


@pytest.mark.parametrize(
    ("network", "args"),
    [("hrnet", {"width": 18}), ("segnext", {"size": "T", "offsets": False}), ("segformer-hub", {"config": SEGFORMER})],
)
def test_bundles_of_other_networks(network: str, args: dict[str, Any], repeating: Bundle) -> None:
    """On frames of a size that no stride divides, all pixels refined: HR dense."""
    if network == "segformer-hub":
        pytest.importorskip("transformers")
    module = build(DENSE, network, len(repeating.classes), args)
    spec = save_network(repeating.path, made(module).float(), network, args, "dense.safetensors")
    bundle = replace(repeating, dense=spec, native=None)
    frames = [noise((90, 122), seed) for seed in range(2)]
    hr = Segmenter(bundle, "cpu", refine=False, scale=1.0).segment(frames)
    for index, result in enumerate(Segmenter(bundle, "cpu", entropy_threshold=0.0).segment(frames)):
        assert result.density == 1.0 and (result.mask == hr[index].mask).mean() > 0.999
        assert np.abs(result.confidence.astype(int) - hr[index].confidence).max() <= 1 < np.ptp(result.confidence)


def test_other_runtimes_are_refused(repeating: Bundle) -> None:
    segmenter = Segmenter(repeating, "cpu")
    assert segmenter.refiner is not None
    with pytest.raises(ParameterError, match="'repeat' reads features of the dense segmenter; set runtime to torch"):
        check_refiner(repeating, segmenter.refiner, segmenter.dense, repeating.dense, "torch_compile")


@torch.no_grad()
def test_folded_and_not() -> None:
    """A network whose batch normalisation is not folded follows one whose is, and the other way round."""
    network, native = made(compact()), images((48, 64))
    folded = fold_batch_norm(copy.deepcopy(network))
    selected = torch.rand(1, 48, 64, generator=torch.Generator().manual_seed(1)) < 0.05
    answers = []
    for dense in (network, folded):
        _, kept = record(dense, small(native, 0.5))
        answers += [repeat(repeated, Grid(selected), colours_of(native), kept) for repeated in (network, folded)]
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0], rtol=1e-8, atol=1e-10)


@torch.no_grad()
def test_normalisation_before_a_convolution() -> None:
    """Which is an operation of its own, and dropout, which does nothing here."""

    class PreActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Conv2d(8, K, 3, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.last(F.dropout(F.relu(self.norm(F.silu(self.first(x)))), 0.5, self.training))
            return F.interpolate(y, x.shape[-2:], mode="bilinear", align_corners=False)

    network, native = made(PreActivation()), images((31, 42))
    _, kept = record(network, small(native, 0.5))
    assert len(kept) == 7  # conv, silu, norm, relu, dropout, conv, interpolate
    answer = repeat(network, Grid(torch.ones(1, 31, 42, dtype=torch.bool)), colours_of(native), kept)
    torch.testing.assert_close(answer, network(native)[0].flatten(1).T, rtol=1e-9, atol=1e-12)
