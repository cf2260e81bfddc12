"""ONNX Runtime's sessions: which provider runs a file, its settings, and what is said while one opens.

The providers for CUDA and TensorRT are written after ONNX Runtime's documentation and **not yet run on a GPU**; the
CPU's is tested.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sparserefine_ros.errors import BundleError, ParameterError

PROVIDERS = {"tensorrt": "TensorrtExecutionProvider", "cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
"""Names of ours to ONNX Runtime's, the fastest first."""
PROGRESS_S = 10.0

logger = logging.getLogger("sparserefine_ros")  # the package's own: where launch is imported, none propagates


def onnxruntime() -> Any:
    """The package, which then tells nobody that it is used; ParameterError saying how to install it."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # once imported, its wheels queue device and CPU for Microsoft
    try:
        import onnxruntime
    except ImportError as error:
        raise ParameterError(
            "runtime is 'onnxruntime', which is not installed: pip install onnxruntime onnx (on a machine with a GPU "
            f"onnxruntime-gpu onnx), or set runtime to torch ({error})"
        ) from error
    return onnxruntime


def pick_providers(provider: str, device: torch.device, available: list[str]) -> tuple[list[str], bool]:
    """Names of PROVIDERS to try in order, and whether the first is a must.

    ParameterError where ``provider`` is not there.
    """
    there = [name for name, theirs in PROVIDERS.items() if theirs in available]
    if provider == "auto":
        return [name for name in there if name == "cpu" or device.type == "cuda"], False
    if provider not in there:
        package = "onnxruntime" if provider == "cpu" else "onnxruntime-gpu"
        raise ParameterError(
            f"provider '{provider}' is not there; this onnxruntime has: {', '.join(there)}; "
            f"choose one of them or auto, or pip install {package}"
        )
    if provider != "cpu" and device.type != "cuda":
        raise ParameterError(f"provider '{provider}' runs on CUDA, but device is '{device}'; set device to cuda")
    return ([provider] if provider == "cpu" else [provider, "cpu"]), True


def open_session(
    runtime: Any, file: Path, wanted: list[str], strict: bool, device: torch.device, half: bool, engines: Path,
    content: bytes | None = None,
) -> Any:  # fmt: skip
    """A session that runs ``file`` on the first of ``wanted`` that starts.

    Args:
        content: of ``file``, where that was checked: the file is not read again.
        wanted, strict: as `pick_providers` gives them.
        half: TensorRT may compute in float16.
        engines: where TensorRT keeps what it has built.

    Raises:
        ParameterError: ``strict``, and the first does not start.
        BundleError: ONNX Runtime does not read the file.
    """
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that wait for the next frame by spinning take the cores from the refiner, which runs between two frames:
    # camvid takes half as long again with it.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    index = str(device.index or 0)
    settings: dict[str, dict[str, str]] = {
        "tensorrt": {
            "device_id": index, "trt_fp16_enable": str(int(half)), "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(engines), "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(engines),
        },
        "cuda": {"device_id": index},
        "cpu": {},
    }  # fmt: skip
    try:
        session = runtime.InferenceSession(
            str(file) if content is None else content,
            options,
            providers=[(PROVIDERS[name], settings[name]) for name in wanted],
        )
    except Exception as error:  # its exceptions share no base of their own
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise BundleError(f"onnxruntime {runtime.__version__} cannot run {file}: {first}") from error
    found = provider_of(session)
    if strict and found != wanted[0]:
        raise ParameterError(
            f"provider '{wanted[0]}' does not start here and onnxruntime took '{found}' instead; "
            "its log above says which library is missing; or set provider to auto"
        )
    logger.info("onnxruntime %s runs %s, provider %s", runtime.__version__, file.name, found)
    if found == "cpu" and device.type == "cuda" and not strict:
        logger.warning(
            "the dense segmenter runs on the CPU, with device %s: this onnxruntime has no provider that starts there; "
            "install onnxruntime-gpu for its CUDA, or set runtime to torch where the model has its weights", device,
        )  # fmt: skip
    return session


def provider_of(session: Any) -> str:
    """Our name of the provider that a session runs on."""
    theirs = session.get_providers()[0]
    return next((ours for ours, name in PROVIDERS.items() if name == theirs), str(theirs))


class Progress:
    """Tells a log, and whoever asks, what takes long and for how long it has."""

    def __init__(self, every_s: float = PROGRESS_S) -> None:
        self.every_s = every_s
        self._what, self._started = "", 0.0

    @property
    def text(self) -> str:
        """What is under way and since when; empty where nothing is. May be read from any thread."""
        what = self._what
        return f"{what}: {time.monotonic() - self._started:.0f} s so far" if what else ""

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Logs ``what`` now, how long it has taken every ``every_s`` seconds, and its end."""
        logger.info("%s; this can take minutes", what)
        done = threading.Event()
        self._started, self._what = time.monotonic(), what

        def tell() -> None:
            while not done.wait(self.every_s):
                logger.info("%s", self.text)

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self._what = ""
            logger.info("%s: done after %.0f s", what, time.monotonic() - self._started)
