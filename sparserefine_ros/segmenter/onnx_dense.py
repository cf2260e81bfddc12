"""The dense segmenter in ONNX Runtime: from a file that is exported on first use and kept, or from one that was given.

Selection and refinement stay with torch and the sparse engines. torch's network is there while it is exported, and no
longer.

Shape shorthand: B images, K classes, h, w low resolution.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparserefine_ros.errors import BundleError
from sparserefine_ros.native import cache_folder, users_cache
from sparserefine_ros.segmenter.bundle_files import read_weights
from sparserefine_ros.segmenter.onnx_session import Progress, onnxruntime, open_session, pick_providers, provider_of

NUMPY = {torch.float32: np.float32, torch.float16: np.float16}
ELSEWHERE = b"\n\x08location"  # begins the field of a tensor that names the file of its data (onnx.proto)
FORMAT = 1  # of the files kept; another number exports anew
MAX_SESSIONS = 8  # where each serves one size: cameras that change theirs must not fill the memory
MAX_FILES = 32  # exported, of all networks and sizes, and as many engines: nor the disk

logger = logging.getLogger("sparserefine_ros")


class ExportedNetwork:
    """A network of torch's, exported on first use.

    input, output, dtype: names of the file's tensors, and their number format; one_image: whether it takes one image
    at a time; dynamic: whether one file serves images of every size and number.

    Args:
        load: gives the network, with its temperature, on a CPU; called whenever there is something to export.
        identity: whatever tells its weights from others'; JSON's types.
        half: compute in float16; images and logits are float32 in any case.
        folder: where files are kept.

    Raises ExportError, on use, where the network cannot be exported.
    """

    input, output, dtype, one_image = "images", "logits", torch.float32, False

    def __init__(self, load: Callable[[], nn.Module], identity: Any, half: bool, folder: Path) -> None:
        from sparserefine_ros.segmenter.export import is_dynamic

        self.load, self.identity, self.half, self.folder = load, identity, half, folder
        self.dynamic = is_dynamic(load())

    def file(self, size: tuple[int, int], fixed: bool) -> Path:
        """The file for images of ``size`` (h, w); with ``fixed``, for one image of that size alone."""
        from sparserefine_ros.segmenter.export import OPSET, export_dense

        what = [FORMAT, OPSET, str(torch.__version__), self.identity, self.half, size if fixed else None]
        key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
        file = self.folder / f"dense-{key[:24]}.onnx"
        if file.exists():
            _touch(file)
        else:
            logger.info("exporting the dense segmenter to %s", file)
            started = time.monotonic()
            # Of processes that export at once the last one wins.
            done = export_dense(self.load(), file, size, fixed, self.half)
            drop_unused(self.folder, "dense-*.onnx", file)
            seconds = time.monotonic() - started
            logger.info("exported in %.0f s; differs from torch by %.1e of the largest logit", seconds, done.difference)
        return file

    def content(self) -> None:
        """The file is read as it is: nobody else's."""


@dataclass(frozen=True)
class GivenFile:
    """A file that somebody exported, as `onnx_file.inspect` found it; read as `ExportedNetwork`."""

    path: Path
    input: str
    output: str
    dtype: torch.dtype
    one_image: bool
    sha256: str
    dynamic: bool = True  # of one size, its bundle asks for no other

    def file(self, size: tuple[int, int], fixed: bool) -> Path:
        return self.path

    def content(self) -> bytes:
        """What is hashed is what is parsed; BundleError where that is not what the bundle says, or not all of it: the
        runtime would read weights in other files unhashed, from wherever the process was started."""
        content = read_weights(self.path.parent, self.path.name, self.sha256)
        if ELSEWHERE in content:
            raise BundleError(f"{self.path} has weights in other files; import it again, which makes one file of them")
        return content


Source: TypeAlias = ExportedNetwork | GivenFile


class OnnxDense(nn.Module):
    """Normalised images [B, 3, h, w] to logits [B, K, h, w]; logits of another size are resized, bilinearly.

    Args:
        source: of the file.
        device: torch's device of the images, where the logits go too.
        provider: a name of PROVIDERS; "auto" takes the fastest that is there and fits the device.
        half: TensorRT may compute in float16.
        temperature: divides the logits.
        folder: where TensorRT's engines are kept; by default in the user's cache.

    Raises ParameterError where onnxruntime is not installed, or the provider is not there.
    """

    def __init__(
        self, source: Source, device: torch.device, provider: str = "auto", half: bool = False,
        temperature: float = 1.0, folder: Path | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.runtime = onnxruntime()
        self.source, self.device, self.may_halve, self.temperature = source, device, half, temperature
        self.engines = (onnx_folder() if folder is None else folder) / "tensorrt"
        self.wanted, self.strict = pick_providers(provider, device, self.runtime.get_available_providers())
        # An engine of TensorRT is fast for the one size that it was built for.
        self.fixed = self.wanted[0] == "tensorrt" or not source.dynamic
        self.progress = Progress()
        self.sessions: dict[tuple[int, int] | None, Any] = {}  # by size; None for every size
        self.shapes: dict[tuple[int, ...], tuple[int, ...]] = {}  # of images to that of their logits
        self.degraded = ""  # why torch runs the network after all, where it does
        self.instead: nn.Module | None = None  # that network

    def prepare(self, size: tuple[int, int]) -> Any:
        """The session for images of ``size`` (h, w): exports the network and builds engines where not done yet.

        None, and a reason in ``degraded``, where the disk is full: torch then runs the network.
        """
        if self.degraded:
            return None
        key = size if self.fixed else None
        if key in self.sessions:
            self.sessions[key] = self.sessions.pop(key)  # the one used last stands last
        else:
            try:
                self.sessions[key] = self._session(size)
            except OSError as error:
                if not isinstance(self.source, ExportedNetwork):
                    raise
                self.degraded = (
                    "torch runs the dense segmenter in place of onnxruntime, whose file cannot be written: "
                    f"{error}; free space in {self.source.folder} or set XDG_CACHE_HOME, and configure again"
                )
                logger.warning(self.degraded)
                self.instead = self.source.load().to(self.device)
                return None
            if len(self.sessions) > MAX_SESSIONS:
                self.sessions.pop(next(iter(self.sessions)))
        return self.sessions[key]

    def _session(self, size: tuple[int, int]) -> Any:
        file = self.source.file(size, self.fixed)
        try:
            return self._open(file, size)
        except (BundleError, FileNotFoundError) as error:  # the latter where another process dropped it just now
            if not isinstance(self.source, ExportedNetwork):
                raise
            logger.warning("%s cannot be used and is made anew: %s", file, error)
        file.unlink(missing_ok=True)
        return self._open(self.source.file(size, self.fixed), size)

    @property
    def provider(self) -> str:
        """The provider in use, once a session is open; else the first that will be tried."""
        return next((provider_of(session) for session in self.sessions.values()), self.wanted[0])

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, h, w] -> [B, K, h, w]
        session = self.prepare((images.shape[2], images.shape[3]))
        if self.instead is not None:
            instead: Tensor = self.instead(images)
            return instead
        images = images.to(self.source.dtype).contiguous()
        parts = images.split(1) if self.fixed or self.source.one_image else (images,)
        results = [self._run(session, part) for part in parts]
        logits = (results[0] if len(results) == 1 else torch.cat(results)).float()
        if logits.shape[2:] != images.shape[2:]:
            logits = F.interpolate(logits, images.shape[2:], mode="bilinear")
        return logits if self.temperature == 1 else logits / self.temperature

    def _run(self, session: Any, images: Tensor) -> Tensor:
        """Inputs and outputs are bound to torch's own memory, on a GPU as on a CPU: nothing is copied.

        But where the images are on a GPU and only the CPU's provider is there, or started.
        """
        if provider_of(session) == "cpu" and images.device.type != "cpu":
            return self._run(session, images.cpu()).to(images.device)
        place, index, dtype = images.device.type, images.device.index or 0, NUMPY[self.source.dtype]
        binding = session.io_binding()
        binding.bind_input(self.source.input, place, index, dtype, tuple(images.shape), images.data_ptr())
        shape = self.shapes.get(tuple(images.shape))
        if images.is_cuda:  # the runtime works on a stream of its own
            torch.cuda.current_stream(images.device).synchronize()
        if shape is None:
            binding.bind_output(self.source.output, "cpu")
            session.run_with_iobinding(binding)
            shape = self.shapes[tuple(images.shape)] = tuple(binding.get_outputs()[0].shape())
        logits = torch.empty(shape, dtype=images.dtype, device=images.device)
        binding.bind_output(self.source.output, place, index, dtype, shape, logits.data_ptr())
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return logits

    def _open(self, file: Path, size: tuple[int, int]) -> Any:
        builds, engines = self.wanted[0] == "tensorrt", self.engines
        if builds:
            # It knows an engine by the names in its graph alone: a network trained anew would run with its old weights.
            engines = engines / hashlib.sha256(file.read_bytes()).hexdigest()[:24]
            engines.mkdir(parents=True, exist_ok=True)
            _touch(engines)
            drop_unused(self.engines, "*", engines)
        what = f"TensorRT builds an engine of {file.name} for {size[0]}x{size[1]}, or reads it from {engines}"
        with self.progress(what) if builds else nullcontext():
            session = open_session(
                self.runtime,
                file,
                self.wanted,
                self.strict,
                self.device,
                self.may_halve,
                engines,
                self.source.content(),
            )
            if builds:  # the first run builds what opening did not
                session.run(None, {self.source.input: np.zeros((1, 3, *size), NUMPY[self.source.dtype])})
        return session


def drop_unused(folder: Path, pattern: str, kept: Path) -> None:
    """Removes what has not been used for longest of ``pattern`` in ``folder``, all but MAX_FILES; never ``kept``.

    Other processes may use and remove there at the same time. Where a clock was set back, order is lost, no more.
    """
    used = []
    for path in folder.glob(pattern):
        with suppress(OSError):
            used.append((path != kept, -path.stat().st_mtime_ns, path))
    for *_, path in sorted(used)[MAX_FILES:]:
        logger.info("removing %s, which has not been used for longest", path)
        with suppress(OSError):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def _touch(path: Path) -> None:
    """Used now; on a read-only disk it stays as old as it is."""
    with suppress(OSError):
        os.utime(path)


def onnx_folder() -> Path:
    """Where exported files and engines are kept, with links to those of a user's cache that cannot be written."""
    folder = cache_folder() / "onnx"
    with suppress(OSError):  # a user without a home
        kept = users_cache().resolve() / "onnx"
        if kept != folder.resolve():
            _link(kept, folder)
    return folder


def _link(kept: Path, folder: Path) -> None:
    """Every file below ``kept`` has its link below ``folder``, beside which there is room to write."""
    for file in kept.rglob("*"):
        link = folder / file.relative_to(kept)
        if file.is_file() and not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
