"""The Triton kernels of local attention against dense attention: on a GPU where there is one, else interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from test_local_attention import dense_attention, random_inputs

from sparserefine_ros.networks import local_attention
from sparserefine_ros.networks.local_attention import QueryKeyValue

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
if find_spec("triton"):
    from sparserefine_ros.networks import local_attention_triton as kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# What rounding once may cost, relative. The interpreter cuts bf16 off where a GPU rounds.
ROUNDING = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


# As CASES of test_local_attention, and smaller, as the interpreter is slow.
CASES = [(2, 2, 6, 2, 3, 2, 3), (1, 1, 5, 1, 4, 4, 1), (1, 2, 34, 1, 1, 1, 3), (1, 1, 3, 3, 2, 1, 1)]


@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, torch.float32) for case in CASES), *((CASES[3], dtype) for dtype in ROUNDING)], ids=str
)
@torch.inference_mode()
def test_values_equal_dense_attention(case: tuple[int, ...], dtype: torch.dtype) -> None:
    """Sizes that are no powers of two, grids of one cell, several images: all neighbours found and none invented."""
    pixels, superpixels = (
        QueryKeyValue(*(x.to(DEVICE) for x in side)) for side in random_inputs(case, dtype, spread_by=1.5)
    )
    actual = kernels.local_attention_triton(pixels, superpixels, case[1])
    wide = [QueryKeyValue(*(x.double().cpu() for x in side)) for side in (pixels, superpixels)]
    for ours, expected in zip(actual, dense_attention(wide[0], wide[1], case[1]), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double().cpu(), expected, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


@torch.inference_mode()
def test_scores_beyond_what_exp_can_hold() -> None:
    pixels, superpixels = (
        QueryKeyValue(*(x.to(DEVICE) for x in side))
        for side in random_inputs((1, 2, 6, 2, 2, 1, 2), torch.float32, spread_by=60.0)
    )
    actual = kernels.local_attention_triton(pixels, superpixels, 2)
    expected = local_attention.plain_local_attention(pixels, superpixels, 2)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-2)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs CUDA")
def test_inference_on_a_gpu_takes_the_kernels_and_training_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plain = kernels.local_attention_triton
    monkeypatch.setattr(kernels, "local_attention_triton", lambda *args: calls.append(1) or plain(*args))
    assert kernels.usable(DEVICE)
    calls.clear()
    pixels, superpixels = (QueryKeyValue(*(x.to(DEVICE) for x in s)) for s in random_inputs(CASES[0], torch.float32))
    local_attention.local_attention(pixels, superpixels, 2)
    assert calls == [1]
    pixels.query.requires_grad_()
    local_attention.local_attention(pixels, superpixels, 2)[0].sum().backward()
    assert calls == [1] and pixels.query.grad is not None


def test_the_cpu_never_takes_them() -> None:
    assert not kernels.usable(torch.device("cpu"))


def test_cells_too_large_for_registers_stay_in_plain_torch() -> None:
    """Strides of 64 have 4096 pixels a cell: no compiler gets that into a program."""
    assert kernels.fits(16, 128) and kernels.fits(16, 48) and kernels.fits(64, 32)
    assert not kernels.fits(64, 128) and not kernels.fits(4096, 16) and not kernels.fits(17, 128)


def test_they_compile_for_a_gpu_that_is_not_here() -> None:
    """The paper's layer for compute capability 8.0, down to machine code and within its registers."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    command = [sys.executable, "-c", "import test_local_attention_triton as t; t.compile_kernels()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["compiled"] * 2


def compile_kernels() -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {"P": 16, "D": 128, "PB": 16, "DB": 128}
    types = dict.fromkeys(("query", "key", "value", "out"), "*fp16") | {"scale": "fp32"}
    for kernel in (kernels.to_pixels_kernel, kernels.to_superpixels_kernel):
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
        compiled = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 80, 32))
        assert "cubin" in compiled.asm and ".local" not in compiled.asm["ptx"]
        print("compiled")
