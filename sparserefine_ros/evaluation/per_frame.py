"""What a result file keeps of every frame, so that two runs can be compared frame by frame.

Times and densities are plain lists. Counts of pixels (K * (K + 4) a frame) are packed: little-endian int32, zlib,
base64; a drive of 10,000 frames with 19 classes takes a few megabytes of JSON.

Shape shorthand: F frames, K classes.
"""

from __future__ import annotations

import base64
import binascii
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparserefine_ros.errors import ResultError
from sparserefine_ros.evaluation.replay_metrics import ReplayLog, Score

MAX_BYTES = 2**30
"""Largest array unpacked, checked before anything is allocated: 700,000 frames with 19 classes."""


def table(log: ReplayLog, score: Score | None) -> dict[str, Any]:
    """Columns by frame: all sent ones, and those that were scored.

    ``stamps`` (ns), ``sent_s`` since the first, ``latency_ms`` (None: no mask), ``density``, ``stages_ms`` by stage
    (None: not timed); ``scored`` the stamps behind ``confusion`` [F, K, K + 1] and ``boundary`` [F, K, 3], packed.
    """
    stamps = list(log.sent)
    first = min(log.sent.values(), default=0.0)
    stages = {stage: None for times in log.stage_ms.values() for stage in times}  # in order, once
    counts = score.frames if score else {}
    return {
        "stamps": stamps,
        "sent_s": [round(log.sent[s] - first, 4) for s in stamps],
        "latency_ms": [_rounded((log.answered[s] - log.sent[s]) * 1e3) if s in log.answered else None for s in stamps],
        "density": [_rounded(log.density.get(s), 6) for s in stamps],
        "stages_ms": {stage: [_rounded(log.stage_ms.get(s, {}).get(stage)) for s in stamps] for stage in stages},
        "scored": list(counts),
        "confusion": pack(np.stack([c.confusion for c in counts.values()])) if counts else None,
        "boundary": pack(np.stack([c.boundary for c in counts.values()])) if counts else None,
    }


def pack(counts: np.ndarray) -> dict[str, Any]:
    """Counts of pixels, an integer array, as ``shape`` and ``data``. Raises ValueError where int32 is too small."""
    if counts.size and (counts.min() < 0 or counts.max() > np.iinfo(np.int32).max):
        raise ValueError(f"counts from {counts.min()} to {counts.max()} do not fit int32")
    data = zlib.compress(np.ascontiguousarray(counts, "<i4").tobytes(), 9)
    return {"shape": list(counts.shape), "data": base64.b64encode(data).decode("ascii")}


def unpack(packed: Mapping[str, Any]) -> np.ndarray:
    """The int64 array that `pack` wrote. Raises ResultError for anything else."""
    try:
        shape = tuple(int(n) for n in packed["shape"])
        size = 4 * math.prod(shape)
        if min(shape, default=0) < 0 or size > MAX_BYTES:
            raise ResultError(f"counts of shape {shape} are too large or negative; was the file edited?")
        inflate = zlib.decompressobj()
        data = inflate.decompress(base64.b64decode(packed["data"], validate=True), size + 1)
        return np.frombuffer(data, "<i4").reshape(shape).astype(np.int64)
    except (KeyError, TypeError, ValueError, zlib.error, binascii.Error) as error:
        raise ResultError(f"packed counts are damaged ({error}); write the result file again") from error


def numbers(column: Sequence[float | None]) -> np.ndarray:
    """[F] float64, nan for None."""
    return np.array([np.nan if v is None else v for v in column], np.float64)


def _rounded(value: float | None, digits: int = 3) -> float | None:
    return None if value is None else round(value, digits)
