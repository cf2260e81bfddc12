"""The dense segmenter in ONNX Runtime, from a file that is exported on first use and kept.

Selection and refinement stay with torch and the sparse engines. The providers for CUDA and TensorRT are written after
ONNX Runtime's documentation and **not yet run on a GPU**; the CPU's is tested.

Shape shorthand: B images, K classes, h, w low resolution.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparserefine_ros.errors import ParameterError
from sparserefine_ros.native import cache_folder

RUNTIMES = ("torch", "onnxruntime")
PROVIDERS = {"tensorrt": "TensorrtExecutionProvider", "cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
"""Names of ours to ONNX Runtime's, the fastest first."""
FORMAT = 1  # of the files kept; another number exports anew
PROGRESS_S = 10.0

logger = logging.getLogger("sparserefine_ros")  # the package's own: where launch is imported, none propagates


class OnnxDense:
    """Normalised images [B, 3, h, w] to logits [B, K, h, w], as the network it was made from.

    Args:
        network: torch's, with its temperature.
        identity: whatever tells its weights from others'; JSON's types.
        device: torch's device of the images, where the logits go too.
        provider: a name of PROVIDERS; "auto" takes the fastest that is there and fits the device.
        half: compute in float16; images and logits are float32 in any case.
        folder: where files and TensorRT's engines are kept; by default in the user's cache.

    Raises:
        ParameterError: onnxruntime is not installed, or the provider is not there.
        ExportError: the network cannot be exported.
    """

    def __init__(
        self, network: nn.Module, identity: Any, device: torch.device, provider: str = "auto", half: bool = False,
        folder: Path | None = None,
    ) -> None:  # fmt: skip
        from sparserefine_ros.segmenter.export import is_dynamic

        self.runtime = _onnxruntime()
        self.network, self.identity, self.device, self.half = network, identity, device, half
        self.folder = cache_folder() / "onnx" if folder is None else folder
        self.wanted, self.strict = pick_providers(provider, device, self.runtime.get_available_providers())
        # An engine of TensorRT is fast for the one size that it was built for.
        self.fixed = self.wanted[0] == "tensorrt" or not is_dynamic(network)
        self.sessions: dict[tuple[int, int] | None, Any] = {}  # by size; None for every size
        self.degraded = ""  # why torch runs the network after all, where it does
        self.shapes: dict[tuple[int, ...], tuple[int, ...]] = {}  # of images to that of their logits

    def prepare(self, size: tuple[int, int]) -> Any:
        """The session for images of ``size`` (h, w): exports the network and builds engines where not done yet.

        None, and a reason in ``degraded``, where the disk is full: torch then runs the network.
        """
        key = size if self.fixed else None
        if key not in self.sessions:
            self.sessions[key] = self._session(size)
        return self.sessions[key]

    def _session(self, size: tuple[int, int]) -> Any:
        """A new session, or None where its file cannot be written."""
        try:
            file, kept = self._file(size)
            try:
                return self._open(file, size)
            except ParameterError:
                raise
            except Exception as error:  # onnxruntime's share no base of their own
                if not kept:
                    raise
                logger.warning("%s cannot be used and is made anew: %s", file, error)
                file.unlink(missing_ok=True)
            return self._open(self._file(size)[0], size)
        except OSError as error:
            self.degraded = (
                f"torch runs the dense segmenter in place of onnxruntime, whose file cannot be written: {error}; free "
                f"space in {self.folder} or set XDG_CACHE_HOME, and configure again"
            )
            logger.warning(self.degraded)
            return None

    @property
    def provider(self) -> str:
        """The provider in use, once a session is open; else the first that will be tried."""
        for session in self.sessions.values():
            return "none" if session is None else _name(session.get_providers()[0])
        return self.wanted[0]

    def __call__(self, images: Tensor) -> Tensor:  # [B, 3, h, w] -> [B, K, h, w]
        session = self.prepare((images.shape[2], images.shape[3]))
        if session is None:
            logits: Tensor = self.network(images)
            return logits
        images = images.float().contiguous()
        parts = images.split(1) if self.fixed else (images,)
        results = [self._run(session, part) for part in parts]
        return results[0] if len(results) == 1 else torch.cat(results)

    def _run(self, session: Any, images: Tensor) -> Tensor:
        """Inputs and outputs are bound to torch's own memory, on a GPU as on a CPU: nothing is copied."""
        place, index = images.device.type, images.device.index or 0
        binding = session.io_binding()
        binding.bind_input("images", place, index, np.float32, tuple(images.shape), images.data_ptr())
        shape = self.shapes.get(tuple(images.shape))
        if images.is_cuda:  # the runtime works on a stream of its own
            torch.cuda.current_stream(images.device).synchronize()
        if shape is None:
            binding.bind_output("logits", "cpu")
            session.run_with_iobinding(binding)
            shape = self.shapes[tuple(images.shape)] = tuple(binding.get_outputs()[0].shape())
        logits = torch.empty(shape, device=images.device)
        binding.bind_output("logits", place, index, np.float32, shape, logits.data_ptr())
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return logits

    def _file(self, size: tuple[int, int]) -> tuple[Path, bool]:
        """The exported file, written where it is not there, and whether it was."""
        from sparserefine_ros.segmenter.export import export_dense

        what = [FORMAT, self.identity, self.half, size if self.fixed else None]
        key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
        file = self.folder / f"dense-{key[:24]}.onnx"
        kept = file.exists()
        if not kept:
            logger.info("exporting the dense segmenter to %s", file)
            started = time.monotonic()
            partial = file.with_suffix(f".{os.getpid()}.part")  # of processes that export at once the last one wins
            try:
                done = export_dense(self.network, partial, size, self.fixed, self.half)
                with partial.open("rb") as written:
                    os.fsync(written.fileno())  # a name must not outlive a power cut that its content does not
                partial.replace(file)
            finally:
                partial.unlink(missing_ok=True)
            seconds = time.monotonic() - started
            logger.info("exported in %.0f s; differs from torch by %.1e of the largest logit", seconds, done.difference)
        return file, kept

    def _open(self, file: Path, size: tuple[int, int]) -> Any:
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        engines = self.folder / "tensorrt"
        index = str(self.device.index or 0)
        settings: dict[str, dict[str, str]] = {
            "tensorrt": {
                "device_id": index, "trt_fp16_enable": str(int(self.half)), "trt_engine_cache_enable": "1",
                "trt_engine_cache_path": str(engines), "trt_timing_cache_enable": "1",
                "trt_timing_cache_path": str(engines),
            },
            "cuda": {"device_id": index},
            "cpu": {},
        }  # fmt: skip
        builds = self.wanted[0] == "tensorrt"
        if builds:
            engines.mkdir(parents=True, exist_ok=True)
        what = f"TensorRT builds an engine of {file.name} for {size[0]}x{size[1]}, or reads it from {engines}"
        with progress(what) if builds else nullcontext():
            session = self.runtime.InferenceSession(
                str(file), options, providers=[(PROVIDERS[name], settings[name]) for name in self.wanted]
            )
            if builds:  # the first run builds what opening did not
                session.run(None, {"images": np.zeros((1, 3, *size), np.float32)})
        found = _name(session.get_providers()[0])
        if self.strict and found != self.wanted[0]:
            raise ParameterError(
                f"provider '{self.wanted[0]}' does not start here and onnxruntime took '{found}' instead; "
                "its log above says which library is missing; or set provider to auto"
            )
        logger.info("onnxruntime %s runs %s, provider %s", self.runtime.__version__, file.name, found)
        return session


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


@contextmanager
def progress(what: str, every_s: float = PROGRESS_S) -> Iterator[None]:
    """Logs ``what`` now, how long it has taken every ``every_s`` seconds, and its end."""
    logger.info("%s; this can take minutes", what)
    started, done = time.monotonic(), threading.Event()

    def tell() -> None:
        while not done.wait(every_s):
            logger.info("%s: %.0f s so far", what, time.monotonic() - started)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        logger.info("%s: done after %.0f s", what, time.monotonic() - started)


def _name(provider: str) -> str:
    return next((ours for ours, theirs in PROVIDERS.items() if theirs == provider), provider)


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ParameterError(
            "runtime is 'onnxruntime', which is not installed: pip install onnxruntime onnx (on a machine with a GPU "
            f"onnxruntime-gpu onnx), or set runtime to torch ({error})"
        ) from error
    return onnxruntime
