"""A function of one tensor as a CUDA graph: one launch instead of hundreds, once frames of a form come again.

Capture and replay have NOT been run on a GPU yet; on a CPU a "replay" runs the same calls on the same static tensor.
`graphed_unet` does this for the sparse part, whose sizes change from frame to frame.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

FORMS = 4  # graphs kept, as for batches of one to four cameras; every one holds the memory of a whole forward pass
AGE = 100  # calls after which a form that has not come gives way to another
Function = Callable[[Tensor], tuple[Tensor, ...]]
Known = TypeVar("Known")


class Recent(Generic[Known]):
    """What is known of the forms that come, at most FORMS of them; ``make`` gives what is known of a new one."""

    def __init__(self, make: Callable[[], Known]) -> None:
        self.make, self.calls = make, 0
        self.kept: dict[object, tuple[Known, int]] = {}  # with the call that it last came in, which orders them

    def of(self, form: object) -> Known:
        """Nobody keeps it where there is no room, and none whose form has not come for AGE calls."""
        self.calls += 1
        known, _ = self.kept.pop(form, (None, 0))
        if known is None:
            known = self.make()
            if len(self.kept) == FORMS:
                oldest = next(iter(self.kept))
                if self.calls - self.kept[oldest][1] <= AGE:
                    return known
                del self.kept[oldest]  # its memory goes before any other is taken
        self.kept[form] = known, self.calls
        return known


class Graphed:
    """Runs ``function``, which neither synchronises nor decides on values, as a CUDA graph a form of its input.

    The first input of a form (shape and dtype) runs uncaptured and fills caches; the next is captured, those after it
    replay. Results are valid until the next call. Beyond FORMS forms in turn, and where capture fails, which a warning
    says, calls run uncaptured: so they do with transformers' Mask2Former, which sends its maps' sizes in every call.
    One instance serves one thread at a time.
    """

    def __init__(self, function: Function) -> None:
        self.function = function
        self.forms = Recent(Form)
        self._captures = True

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        form = self.forms.of((x.shape, x.dtype))
        if form.replay is None and form.seen and self._captures:
            form.replay = self._capture(x)
        form.seen = True
        return self.function(x) if form.replay is None else form.replay(x)

    def _capture(self, x: Tensor) -> Replay | None:
        try:
            return Replay(self.function, x)
        except Exception as failure:  # memory, the driver, a network that synchronises: no base class in common
            warnings.warn(f"frames run without a CUDA graph, its capture failed: {failure}", stacklevel=3)
            self._captures = False
            return None


@dataclass
class Form:
    """What is known of inputs of one form."""

    seen: bool = False
    replay: Replay | None = None


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
