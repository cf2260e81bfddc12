"""A function of one tensor as a CUDA graph: one launch instead of hundreds, once frames of a form come again.

Capture and replay have NOT been run on a GPU yet; on a CPU a "replay" runs the same calls on the same static tensor.
`graphed_unet` does this for the sparse part, whose sizes change from frame to frame.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

FORMS = 4  # graphs kept; every one holds the memory of a whole forward pass
Function = Callable[[Tensor], tuple[Tensor, ...]]


class Graphed:
    """Runs ``function``, which neither synchronises nor decides on values, as a CUDA graph a form of its input.

    The first input of a form (shape and dtype) runs uncaptured and fills caches; the next is captured, those after it
    replay. Results are valid until the next call. Beyond FORMS forms, and where capture fails, which a warning says,
    calls run uncaptured: so they do with transformers' Mask2Former, which sends its maps' sizes in every call. One
    instance serves one thread at a time.
    """

    def __init__(self, function: Function) -> None:
        self.function = function
        self.replays: dict[object, Replay | None] = {}  # None: seen once
        self._captures = True

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        form = (x.shape, x.dtype)
        replay = self.replays.get(form)
        if replay is None and form in self.replays and self._captures:
            replay = self.replays[form] = self._capture(x)
        if replay is not None:
            return replay(x)
        if len(self.replays) < FORMS:
            self.replays.setdefault(form, None)
        return self.function(x)

    def _capture(self, x: Tensor) -> Replay | None:
        try:
            return Replay(self.function, x)
        except Exception as failure:  # memory, the driver, a network that synchronises: no base class in common
            warnings.warn(f"frames run without a CUDA graph, its capture failed: {failure}", stacklevel=3)
            self._captures = False
            return None


class Replay:
    """One captured call, on inputs of the form of ``x``."""

    def __init__(self, function: Function, x: Tensor) -> None:
        # A graph knows addresses alone: what it reads and writes is kept here, and never replaced.
        self.function, self.x = function, x.clone()
        self.graph: torch.cuda.CUDAGraph | None = None
        if x.device.type != "cuda":
            return
        with torch.cuda.device(x.device):
            stream = torch.cuda.Stream(x.device)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                function(self.x)  # chooses algorithms and workspaces, which cannot be captured
                graph = torch.cuda.CUDAGraph()
                # Other threads may go on using CUDA meanwhile.
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    self.outputs = function(self.x)
            torch.cuda.current_stream().wait_stream(stream)
        self.graph = graph

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        self.x.copy_(x)
        if self.graph is None:
            return self.function(self.x)
        self.graph.replay()
        return self.outputs
