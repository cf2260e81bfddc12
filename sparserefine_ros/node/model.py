"""From parameter values to a segmenter. Imports torch only when a segmenter is built."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from sparserefine_ros.errors import BundleError, is_out_of_memory
from sparserefine_ros.node.parameters import AUTO, Value

if TYPE_CHECKING:
    from sparserefine_ros.segmenter.segmenter import Segmenter

logger = logging.getLogger("sparserefine_ros")


WARM_UP_DENSITY = 0.3
LOADING, BUILDING, WARMING_UP = "loading", "building engine", "warming up"
"""What a start-up is at."""
Announce = Callable[[str], None]


def start_segmenter(values: Mapping[str, Value], announce: Announce) -> Segmenter:
    """`load_segmenter`, then frames that nobody sees, so that the first real ones do not pay for first times.

    One on a CPU; on a GPU three, of which CUDA graphs capture the second. Where cameras share batches and something is
    made for each size of a batch, each has its own.
    """
    segmenter = load_segmenter(values, announce)
    announce(WARMING_UP)
    from sparserefine_ros.networks.graphed import FORMS

    frame, gpu = _first_frame(segmenter.bundle.native_size), segmenter.device.type == "cuda"
    batches = gpu or segmenter.runtime == "torch_compile"
    largest = min(int(values["max_batch"]), FORMS) if values["cameras"] and batches else 1
    try:
        for batch in range(1, largest + 1):
            for _ in range(3 if gpu else 1):
                segmenter.segment([frame] * batch, choose=_busy)
    except Exception as error:
        if not is_out_of_memory(error):  # real frames may be smaller, and have a way out
            raise
        logger.warning("out of memory while warming up with a frame of the model's native size")
    return segmenter


def _busy(entropies: np.ndarray, pixels: int) -> float:
    """A threshold that refines more than most frames need: graphs and buffers have room for what they have seen."""
    return float(np.quantile(entropies, 1 - WARM_UP_DENSITY))


def _first_frame(size: tuple[int, int]) -> np.ndarray:
    """[H, W, 3] uint8, grey with noise in a tenth of its height: some pixels for the refiner, as in a real frame."""
    image = np.full((*size, 3), 127, np.uint8)
    noisy = image[: max(1, size[0] // 10)]
    noisy[:] = np.random.default_rng(0).integers(0, 256, noisy.shape, np.uint8)
    return image


def load_segmenter(values: Mapping[str, Value], announce: Announce = lambda state: None) -> Segmenter:
    """Builds what `decoder`, `model`, `refine`, `scale`, `device`, `precision`, ... ask for.

    ``announce`` is told what takes the time: LOADING, or BUILDING where onnxruntime's engine is made.

    Raises BundleError when the bundle is missing or corrupt, or decoder and model contradict each other, and
    ParameterError when device, runtime or sparse backend are not there or the threshold does not fit the bundle's
    classes.
    """
    announce(LOADING)
    import torch

    torchs_own_threads = _threads_at_first()

    from sparserefine_ros.segmenter.bundle import ONNX, Bundle, default_bundle
    from sparserefine_ros.segmenter.segmenter import Segmenter

    decoder, model, refine = str(values["decoder"]), str(values["model"]), str(values["refine"])
    if model == AUTO:
        model = default_bundle("sparserefine" if decoder == AUTO else decoder)
    bundle = Bundle.load(model)
    if decoder not in (AUTO, *bundle.decoders):
        raise BundleError(
            f"decoder is '{decoder}' but model '{model}' serves {', '.join(bundle.decoders)}; "
            "set decoder to one of these, or choose another model"
        )
    refined = {"true": True, "false": False}.get(refine, False if decoder == "dense" else None)
    threads = int(values["threads"]) or torchs_own_threads
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    if values["runtime"] == "onnxruntime" or bundle.dense.network == ONNX:
        announce(BUILDING)
    return Segmenter(
        bundle,
        device=str(values["device"]),
        precision=str(values["precision"]),
        entropy_threshold=number_or_none(values["entropy_threshold"]),
        refine=refined,
        scale=number_or_none(values["scale"]),
        sparse_backend=str(values["sparse_backend"]),
        runtime=str(values["runtime"]),
        provider=str(values["provider"]),
    )


@cache
def _threads_at_first() -> int:
    """As many as torch takes by itself, while nobody has told it otherwise."""
    import torch

    return torch.get_num_threads()


def number_or_none(value: Value) -> float | None:
    """None for `auto`, else the number."""
    return None if value == AUTO else float(value)
