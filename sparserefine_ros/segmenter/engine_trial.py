"""Which sparse engine "auto" is on a GPU: measured there, at the first start, and remembered.

What a kernel does on one GPU says little about the next, and one that fails may end its process or hang it. So every
engine that is installed runs the refiner's network, with random weights, on made frames in a process of its own, beside
plain torch. The fastest of those that give torch's values is taken.

Shape shorthand: K classes, H, W native size, h, w low resolution, C feature channels, N selected pixels.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparserefine_ros import __version__
from sparserefine_ros.errors import ParameterError, is_out_of_memory
from sparserefine_ros.native import cache_folder
from sparserefine_ros.networks.refiner import SparseRefiner
from sparserefine_ros.segmenter.dense import PRECISIONS
from sparserefine_ros.segmenter.onnx_session import Progress
from sparserefine_ros.segmenter.refining import Refined, Seen, Sparse
from sparserefine_ros.sparse.backends import Backend, pick_backend
from sparserefine_ros.whole_files import write_whole

TRIED = {"cuda": {"triton": "triton", "torchsparse": "torchsparse", "spconv": "spconv"}}
"""Engines, by device, that a trial decides about, and the package that each needs."""
CHILD = (sys.executable, "-m", __name__)
DENSITIES = (0.25, 0.1, 0.2)  # the first is the largest: graphs have room for a quarter more than they have seen
ROUNDS = 10  # of all frames, timed
LIMIT_S = 600.0  # for compiling every layer on a slow CPU
TOLERANCES = {"fp32": 1e-3, "fp16": 0.05, "bf16": 0.4}
"""Of the worst pixel, eight times how far torch in that number format is from torch in float32; 1 = a wrong pixel."""

logger = logging.getLogger("sparserefine_ros")


@dataclass(frozen=True)
class Case:
    """What is tried: a refiner of K ``classes``, built of ``args``, on frames of ``size`` (H, W)."""

    classes: int
    args: Mapping[str, Any]  # of SparseRefiner
    size: tuple[int, int]
    device: str
    precision: str  # of PRECISIONS


def fastest(case: Case) -> Backend:
    """The engine for ``case``: the fastest of TRIED that is there and right, or what "auto" is without a trial.

    The first call for a GPU takes as long as its engines compile; the log shows it. The verdict is kept in the cache.
    """
    device, dtype = torch.device(case.device), PRECISIONS[case.precision]
    there = [name for name, package in TRIED.get(device.type, {}).items() if find_spec(package)]
    untried = pick_backend("auto", device, dtype)
    if not there:
        return untried
    try:
        file = _verdict_file(case, there)
        trials = _read(file, there)
        if trials is None:
            with Progress()(f"trying sparse engines {', '.join(there)} on {device}, which is done once"):
                trials = {name: _try(name, case) for name in there}
            _keep(file, trials)
    except OSError as error:  # no folder to write to, no process to be had
        logger.warning("sparse engines cannot be tried: %s; %s runs", error, untried.name)
        return untried
    for name, trial in trials.items():
        said = f"{trial['ms']:.2f} ms a frame, torch {trial['torch_ms']:.2f}" if "ms" in trial else trial["error"]
        logger.info("sparse engine %s here: %s", name, said)
    ratios = {name: trial["ms"] / trial["torch_ms"] for name, trial in trials.items() if "ms" in trial}
    best = min(ratios, key=lambda name: ratios[name], default="")
    if ratios.get(best, 1.0) >= 1:
        return untried
    try:
        return pick_backend(best, device, dtype)
    except ParameterError as error:  # what it needs has gone since
        logger.warning("%s; %s runs instead. Delete %s to try anew", error, untried.name, file)
        return untried


def _verdict_file(case: Case, engines: Sequence[str]) -> Path:
    """Where the verdict on ``case`` lies, for this GPU and these versions."""
    device = torch.device(case.device)
    gpu: Any = device.type
    if device.type == "cuda":
        gpu = [torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)]
    specs = [find_spec(TRIED[device.type][name]) for name in engines]
    files = [Path(spec.origin) for spec in specs if spec and spec.origin]
    installed = [(str(file), file.stat().st_mtime_ns) for file in files]
    facts = {**asdict(case), "device": gpu, "versions": [__version__, torch.__version__, *installed]}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return cache_folder() / f"engines-{key[:32]}.json"


def _read(file: Path, engines: Sequence[str]) -> dict[str, dict[str, Any]] | None:
    """The trials in ``file``, or None where it holds none such."""
    try:
        trials = json.loads(file.read_text())
        timed = [trial for trial in (trials[name] for name in engines) if "error" not in trial]
        whole = all(float(trial["ms"]) >= 0 and float(trial["torch_ms"]) > 0 for trial in timed)
        return {name: trials[name] for name in engines} if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(file: Path, trials: Mapping[str, Mapping[str, Any]]) -> None:
    if any(trial.get("passing") for trial in trials.values()):
        return
    try:
        write_whole(file, json.dumps(trials, indent=1).encode())
    except OSError as error:
        logger.warning("the trial of sparse engines cannot be kept, the next start repeats it: %s", error)


def _try(engine: str, case: Case) -> dict[str, Any]:
    """``ms`` and ``torch_ms`` a frame, or the ``error`` that rules the engine out: only for now where ``passing``."""
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            CHILD, stdin=subprocess.PIPE, stdout=output, stderr=output, env=environment,
            start_new_session=True,  # Ctrl-C in the terminal is ours, and no verdict on the engine
        )  # fmt: skip
        assert process.stdin is not None
        try:
            with process.stdin as pipe, suppress(BrokenPipeError):
                pipe.write(json.dumps({"engine": engine, **asdict(case)}).encode() + b"\n")
                pipe.flush()
                process.wait(LIMIT_S)  # with the pipe open: it ends where we do
        except subprocess.TimeoutExpired:
            return {"error": f"it took longer than {LIMIT_S:.0f} s"}
        finally:
            process.kill()
            process.wait()
        output.seek(0)
        lines = output.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
    if process.returncode == 0:
        with suppress(ValueError):
            result: dict[str, Any] = json.loads(lines[-1])
            return result
    if process.returncode == -signal.SIGKILL:
        return {"error": "its process was killed, as where memory ends", "passing": True}
    return {"error": f"its process ended with status {process.returncode}: {lines[-1]}"}


def measure(engine: str, case: Case) -> dict[str, Any]:
    """What `_try` gives, in this process."""
    device, dtype = torch.device(case.device), PRECISIONS[case.precision]
    try:
        sides = {name: _refiner(case, pick_backend(name, device, dtype)) for name in ("torch", engine)}
        frames = [_frame(case, density, seed) for seed, density in enumerate(DENSITIES)]
        ms: dict[str, list[float]] = {name: [] for name in sides}
        autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)
        with torch.inference_mode(), autocast:
            for seen in frames:  # graphs are captured at the second
                difference = _difference(sides[engine](seen), sides["torch"](seen))
                if not difference <= TOLERANCES[case.precision]:  # nor NaN
                    return {"error": f"a pixel differs from torch's by {difference:.2g} of its size"}
            for _ in range(ROUNDS):
                for name, refiner in sides.items():
                    for seen in frames:
                        ms[name].append(_time(refiner, seen, device))
    except Exception as error:  # of a compiler, a driver, a library: no base in common
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        return {"error": text, "passing": is_out_of_memory(error)}
    return {"ms": statistics.median(ms[engine]), "torch_ms": statistics.median(ms["torch"])}


def _refiner(case: Case, backend: Backend) -> Sparse:
    torch.manual_seed(0)  # both sides have the same weights
    network = SparseRefiner(case.classes, **case.args).eval().to(case.device)
    return Sparse(network, backend, PRECISIONS[case.precision], None)


def _frame(case: Case, density: float, seed: int) -> Seen:
    """Noise, and a selection along the borders of smooth regions, as an entropy threshold gives."""
    generator, (height, width) = torch.Generator().manual_seed(seed), case.size
    grid = torch.randn(1, 1, height // 32 + 2, width // 32 + 2, generator=generator)
    from_border = F.interpolate(grid, (height // 2 or 1, width // 2 or 1), mode="bicubic")[0].abs()
    limit = from_border.flatten().kthvalue(max(1, int(density * from_border.numel()))).values
    selected = F.interpolate((from_border <= limit).float()[None], case.size, mode="nearest")[0] > 0
    native = torch.randint(256, (1, height, width, 3), generator=generator, dtype=torch.uint8)
    logits = 3 * torch.randn(1, case.classes, height // 2 or 1, width // 2 or 1, generator=generator)
    seen = (selected, native, native[:, ::2, ::2], logits.softmax(1))
    selected, native, low, probabilities = (tensor.to(case.device) for tensor in seen)
    return Seen(selected, native, low, probabilities if case.args.get("context") else None, None)


def _difference(given: Refined | None, right: Refined | None) -> float:
    """How far the worst pixel's features are from the right ones, by the size of a usual pixel's; NaN for other pixels.

    Features are [N, C].
    """
    if given is None or right is None or not torch.equal(given.sites.sites, right.sites.sites):
        return float("nan")
    expected: Tensor = right.features.double()
    off = (given.features.double() - expected).norm(dim=1)  # [N]
    return float(off.max() / expected.norm(dim=1).square().mean().sqrt())


def _time(refiner: Sparse, seen: Seen, device: torch.device) -> float:
    """Milliseconds of a frame, until the device is done."""
    start = time.perf_counter()
    refiner(seen)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    """``python -m`` this module: one `Case` and its engine as a line of JSON in, the last line out is the result."""
    case = json.loads(sys.stdin.readline())

    def end_with_the_parent() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=end_with_the_parent, daemon=True).start()
    result = measure(case.pop("engine"), Case(**{**case, "size": tuple(case["size"])}))
    print(f"\n{json.dumps(result)}", flush=True)
    os._exit(0)  # the thread waits for the parent; a library's own end may hang


if __name__ == "__main__":
    main()
