"""The benchmarks measure what they say: masks of the wanted density, work counted by hand, ratios of one run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparserefine_ros import cli
from sparserefine_ros.benchmarks import decoders, sparse, sparse_peers, spconv_peer
from sparserefine_ros.benchmarks.masks import edge_mask
from sparserefine_ros.benchmarks.sparse import measure
from sparserefine_ros.benchmarks.sparse_case import Case
from sparserefine_ros.benchmarks.sparse_report import draw, markdown
from sparserefine_ros.commands.bench import CARD_MARK, write_card
from sparserefine_ros.errors import ParameterError
from sparserefine_ros.networks.fused_unet import FusedUNet
from sparserefine_ros.networks.graphed_unet import GraphedUNet
from sparserefine_ros.networks.unet import SparseUNet
from sparserefine_ros.sparse import Pyramid, SiteSet
from sparserefine_ros.sparse.backends import Backend
from sparserefine_ros.sparse.backends.triton_backend import TritonBackend


@pytest.mark.parametrize("density", [0.0, 0.118, 1.0])
def test_edge_mask_has_its_density_and_is_made_of_blocks(density: float) -> None:
    mask = edge_mask(64, 96, density)
    assert float(mask.float().mean()) == pytest.approx(density, abs=1 / (32 * 48))
    blocks = mask.view(1, 32, 2, 48, 2).float().mean((2, 4))
    assert set(blocks.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(mask, edge_mask(64, 96, density))


def test_edge_mask_is_as_dense_in_neighbours_as_real_selections() -> None:
    """8.14 of 9 neighbours are there at 11.8 %, the figure of the masks that real predictions give."""
    pyramid = Pyramid.build(edge_mask(512, 1024, 0.118), 1)
    assert pyramid.submanifold[0].pairs / len(pyramid.levels[0]) == pytest.approx(8.1, abs=0.4)


@pytest.mark.parametrize(
    ("size", "density", "message"), [((63, 96), 0.1, "63x96.*even"), ((64, 96), 1.5, "1.5.*0 to 1")]
)
def test_edge_mask_refuses(size: tuple[int, int], density: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        edge_mask(*size, density)


def test_measured_work_is_pairs_times_channels() -> None:
    case = Case((32, 64), 0.2, (4, 6), blocks=1, stride="floor")
    result = measure(case, ["torch"], 1)
    pyramid = Pyramid.build(case.mask(), 2, "floor")
    fine, coarse, strided = (m.pairs for m in (*pyramid.submanifold, *pyramid.strided))
    n = len(pyramid.levels[0])
    expected = {
        "level 0": fine * (3 * 4 + 4 * 4 + 4 * 4 + 8 * 4 + 4 * 4) + n * 8 * 4,
        "between 0 and 1": strided * 2 * 4 * 6,
        "level 1": coarse * 2 * 6 * 6,
    }
    assert {row["level"]: round(row["gmac"] * 1e9) for row in result["levels"]} == expected
    for row in result["levels"]:
        assert row["gflops"] == pytest.approx(2e3 * row["gmac"] / row["ms"])
        assert row["share"] == pytest.approx(row["gflops"] / result["peak_gflops"])
    assert result["ratios"]["gather_gemm"] == 1.0
    assert result["ratios"]["dense"] == pytest.approx(result["totals"]["dense"] / result["totals"]["torch"])
    assert result["ratios"]["torchsparse"] is None and "torchsparse" in result["missing"]
    assert f"{result['totals']['dense']:.1f}" in markdown(result)


def test_frames_of_the_triton_backend_are_measured_as_graphs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, where what a graph would replay runs again."""
    if missing := TritonBackend.missing(torch.device("cpu")):
        pytest.skip(f"triton backend: {missing}")
    case = Case((16, 32), 0.3, (4,), blocks=1)
    result = measure(case, ["triton"], 1, peers=False)
    assert set(result["totals"]) == {"triton", "triton graph"} and not result["missing"]
    assert f"| triton graph | {result['totals']['triton graph']:.1f} | – |" in markdown(result)

    class Wrong(GraphedUNet):
        def __call__(self, *inputs: Tensor) -> tuple[SiteSet, Tensor]:
            sites, features = super().__call__(*inputs)
            return sites, features.flip(0)

    class Failing(GraphedUNet):
        def _capture(self, *args: object) -> None:
            warnings.warn("no graph today", stacklevel=1)

    net, mask = FusedUNet(case.unet(), TritonBackend()), case.mask()
    for broken, why in ((Wrong, "its result differs from triton's"), (Failing, "no graph today")):
        monkeypatch.setattr(sparse, "GraphedUNet", broken)
        missing: dict[str, str] = {}
        assert sparse.graph_frame(case, net, mask, case.colours(int(mask.sum())), missing) is None
        assert why in missing["triton graph"]


@pytest.mark.skipif(not spconv_peer.installed(), reason="spconv is not installed")
def test_spconv_gives_what_ours_gives(tmp_path: Path) -> None:
    """Another implementation of the same semantics; on one thread in a process of its own."""
    torch.manual_seed(0)
    channels, mask = [6, 8, 10], edge_mask(40, 64, 0.3)
    mask[:, -3:, -3:] = True  # the last coarse row and column exist in both, see "dilate" in `strided`
    unet = SparseUNet(3, channels, 2).eval()
    pyramid = Pyramid.build(mask, 3, "dilate")
    x = torch.randn(len(pyramid.levels[0]), 3)
    job = {"state": unet.state_dict(), "channels": channels, "blocks": 2, "x": x}
    torch.save({**job, "sites": pyramid.levels[0].sites, "shape": [1, 40, 64]}, tmp_path / "job")
    command = [sys.executable, "-m", spconv_peer.__name__, str(tmp_path / "job"), str(tmp_path / "answer")]
    subprocess.run([*command, "--repeats", "1"], check=True, capture_output=True, env={"OMP_NUM_THREADS": "1"})
    theirs = torch.load(tmp_path / "answer", weights_only=True)["features"]
    torch.testing.assert_close(unet(x, pyramid), theirs, rtol=1e-4, atol=1e-5)


def test_spconv_is_measured_only_where_it_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spconv_peer, "installed", lambda: True)
    case = Case((16, 32), 0.3, (4,), blocks=1)
    unet, mask = case.unet(), case.mask()
    x = case.colours(int(mask.sum()))
    right = unet(x, Pyramid.build(mask, 1)).detach()

    def peer(features: Tensor | None) -> tuple[float | None, str]:
        def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
            if features is None:  # as where memory ran out
                return subprocess.CompletedProcess(command, -9, "", "")
            torch.save({"features": features}, command[-1])
            return subprocess.CompletedProcess(command, 0, "1.5\n", "")

        monkeypatch.setattr(sparse_peers.subprocess, "run", run)
        return sparse_peers.spconv_ms(case, unet, mask, x)

    assert peer(right) == (1.5, "")
    assert peer(None) == (None, "failed: exit status -9")
    for wrong in (right.flip(0), right * float("nan")):
        ms, why = peer(wrong)
        assert ms is None and "its result differs from ours" in why
    assert sparse_peers.spconv_ms(case, unet, mask & False, x[:0]) == (None, "takes no frame without selected pixels")
    half = replace(case, dtype=torch.float16)
    assert sparse_peers.spconv_ms(half, unet, mask, x.half()) == (None, "on a CPU it is compared in float32 alone")


def test_the_dense_peer_takes_any_depth() -> None:
    case = Case((128, 128), 0.1, (2,) * 8, blocks=1)
    ms, why = sparse_peers.dense_ms(case, case.unet(), case.mask(), case.colours(0))
    assert ms is not None and ms > 0 and why == ""
    case = Case((96, 128), 0.1, (2,) * 8, blocks=1)
    assert sparse_peers.dense_ms(case, case.unet(), case.mask(), case.colours(0)) == (
        None, "halves 128x96 to whole pixels only where 128 divides both",
    )  # fmt: skip


def test_a_sweep_without_selected_pixels_is_drawn(tmp_path: Path) -> None:
    result = {"case": {"sites": 0, "dtype": "float32", "channels": [4], "device": "CPU"}, "totals": {"torch": 1.0}}
    point = {"density": 0.0, "megapixels": 0.5, "sites": 0.0, "ms": 1.0}
    draw({**result, "ours": "torch"}, {"density": [point], "size": [point]}, tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 10_000


def test_an_adapter_and_its_library_have_rows_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "pick_backend", lambda *arguments: Backend())
    monkeypatch.setattr(sparse, "spconv_ms", lambda *arguments: (7e6, ""))
    result = measure(Case((16, 32), 0.3, (4,), blocks=1), ["spconv", "torch"], 1)
    own = result["totals"]["spconv"]
    assert result["totals"]["spconv peer"] == 7e6 and own < 1e6
    assert result["ratios"]["spconv"] == pytest.approx(7e6 / own)
    assert f"| **spconv** | {own:.1f} | {result['maps']['spconv']:.1f} | 1.00 |" in markdown(result)


def test_command_prints_saves_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(sparse, "DENSITIES", (0.1, 0.2))
    monkeypatch.setattr(sparse, "MEGAPIXELS", {0.002: (32, 64), 0.008: (64, 128)})
    arguments = ["bench", "sparse", "--size", "32x64", "--channels", "4,6", "--repeats", "1", "--no-peers"]
    files = ["--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png")]
    assert cli.main([*arguments, "--backends", "torch", *files]) == 0
    assert "| **torch** |" in capsys.readouterr().out
    saved = json.loads((tmp_path / "b.json").read_text())
    assert saved["ratios"] == {"gather_gemm": 1.0} and len(saved["sweep"]["size"]) == 2
    assert (tmp_path / "b.png").stat().st_size > 10_000
    for bad, message in (
        (["--size", "33x64"], "even"),
        (["--repeats", "0"], "1 or more"),
        (["--channels", "4,0"], "--channels 4,0: give C,C,... of 1 or more each"),
        (["--json", str(tmp_path / "b.json" / "c.json")], "cannot make the folder"),
        (["--json", str(tmp_path)], "it is a folder; give a file"),
        (["--plot", str(tmp_path / "b.txt")], "b.txt is no picture; give a name that ends in"),
    ):
        assert cli.main([*arguments, *bad]) == 2
        assert message in capsys.readouterr().err


def test_sizes_that_do_not_halve_evenly_are_measured_without_the_dense_peer() -> None:
    """Whose levels would not meet again: 34, 17, 9 rows and back."""
    result = measure(Case((34, 64), 0.2, (4, 6, 8), blocks=1), ["torch"], 1)
    assert result["ratios"]["dense"] is None and "dense" not in result["totals"]
    assert "halves 64x34 to whole pixels only where 4 divides both" in markdown(result)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError("Unable to allocate 3.00 GiB"), "memory ran out (Unable to allocate 3.00 GiB); give smaller"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"), "memory ran out ([enforce"),
    ],
)
def test_memory_that_runs_out_is_said_in_one_line(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(sparse, "measure", fail)
    assert cli.main(["bench", "sparse", "--size", "32x64", "--backends", "torch"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]


def test_other_failures_of_a_measurement_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("sizes do not match")

    monkeypatch.setattr(sparse, "measure", fail)
    with pytest.raises(RuntimeError, match="sizes do not match"):
        cli.main(["bench", "sparse", "--size", "32x64", "--backends", "torch"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["node", "--rate", "inf"], "--rate inf --duration 20: give numbers above 0"),
        (["node", "--duration", "nan"], "--rate 30 --duration nan: give"),
        (["budget", "--rate", "inf"], "--rate inf --budget None: give numbers above 0"),
        (["budget", "--simulate", "--plot", "b.png"], "leave it or --simulate out"),
        (["bundle", "street", "--frames", "0"], "--frames is 0; give 1 or more"),
        (["peers", "street", "--frames", "-1"], "--frames is -1; give 1 or more"),
        (["runtimes", "street", "--device", "cpu", "--runtimes", "torch_graph"], "torch_graph"),
    ],
)
def test_measurements_that_cannot_be_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *words]) == 2
    assert message in capsys.readouterr().err


def test_figures_are_saved_though_nobody_reads_the_table(tmp_path: Path) -> None:
    """`bench ... --json FILE | head`."""
    code = "import sys; from sparserefine_ros.cli import main; sys.exit(main())"
    words = ["bench", "pipeline", "--models", "hrnet-w48", "--params-only", "--json", str(tmp_path / "p.json")]
    read, write = os.pipe()
    os.close(read)
    with open(write, "wb") as gone:
        done = subprocess.run(
            [sys.executable, "-u", "-c", code, *words], stdout=gone, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 0 and not done.stderr
    assert json.loads((tmp_path / "p.json").read_text()) == {"params_m": {"hrnet-w48": 65.858659}}


def test_the_table_of_a_card_is_replaced_or_added(tmp_path: Path) -> None:
    card = tmp_path / "mine" / "README.md"
    card.parent.mkdir()
    start, end = (CARD_MARK.format(word) for word in ("start", "end"))
    write_card(card, "one")
    assert card.read_text() == f"# mine\n\n{start}\none\n{end}\n"
    write_card(card, "two")
    assert card.read_text() == f"# mine\n\n{start}\ntwo\n{end}\n"
    card.write_text("# Imported\n")  # as `sparserefine import` writes them
    write_card(card, "three")
    assert card.read_text() == f"# Imported\n\n{start}\nthree\n{end}\n"
    card.write_text(f"{end}\n{start}\n")
    with pytest.raises(ParameterError, match="README.md lacks one of"):
        write_card(card, "four")


def test_decoders_whose_package_is_missing_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = decoders.measure(["superpixel ResNet-50", "per-pixel"], (32, 64), torch.device("cpu"), 1)
    assert list(result["rows"]) == ["per-pixel"]
    assert "needs the package transformers" in result["missing"]["superpixel ResNet-50"]
    assert "Not measured: superpixel ResNet-50 (" in decoders.markdown(result)


def test_decoder_stages_add_up_and_count_by_hand() -> None:
    """The 1x1 classifier at stride 2: 32 channels to 19 classes."""
    names = ["per-pixel", "offset learning", "superpixel"]
    result = decoders.measure(names, (64, 96), torch.device("cpu"), 1)
    rows = result["rows"]
    assert rows["per-pixel"]["stages"]["classifier"]["macs_g"] * 1e9 == pytest.approx(32 * 48 * 32 * 19)
    # A, E U^T: N C K each; class offsets: N C K; softmax(A) mixing: N K K; three small products of embeddings.
    n, c, k = 32 * 48, 32, 19
    expected = 3 * n * c * k + n * k * k + 2 * k * c * c + k * k * c
    assert rows["offset learning"]["stages"]["classifier"]["macs_g"] * 1e9 == pytest.approx(expected)
    backbones = [row["stages"]["backbone"]["macs_g"] for row in rows.values()]
    assert backbones == pytest.approx([backbones[0]] * 3), "the three share one encoder"
    for row in rows.values():
        assert sum(stage["macs_g"] for stage in row["stages"].values()) == pytest.approx(row["macs_g"])
        assert row["decoder_macs_g"] == pytest.approx(row["macs_g"] - row["stages"]["backbone"]["macs_g"])
        assert row["decoder_ms"] == pytest.approx(row["ms"] - row["stages"]["backbone"]["ms"])
    assert rows["per-pixel"]["ratio"] == 1
    assert f"{rows['superpixel']['ms']:.1f}" in decoders.markdown(result)
