"""Maps, input features and U-Net of a frame as one CUDA graph, on the triton backend.

A frame on the triton backend is some seventy kernels, many shorter than it takes to launch them, and between its
maps and its layers the host waits to hear how many sites there are. Here every level has room for a fixed number of
sites instead, the kernels find the counts on the device, and one launch replays all of them. The host reads the counts
once, afterwards: its caller needs them anyway, and a frame that did not fit shows in them and runs again, uncaptured.

Capture and replay have NOT been run on a GPU yet; what is captured has, in Triton's interpreter, where a "replay" runs
the same calls on the same static tensors.

Shape shorthand
    B, H, W   batch, rows, columns of the mask
    L, N_l    levels, sites there; N = N_0
    C         channels
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparserefine_ros.networks.fused_unet import FusedUNet
from sparserefine_ros.networks.graphed import Recent
from sparserefine_ros.sparse import Pyramid, SiteSet
from sparserefine_ros.sparse.backends.triton_backend import TritonBackend

ROWS = 1024  # capacities are multiples of this, or a level's every pixel

Gather = Callable[..., Tensor]
"""gather(sites, *inputs) -> [N, in_channels]: the U-Net's input at each of ``sites``, a `SiteSet`.

On CUDA it is captured, so it neither synchronises nor makes tensors from numbers on the host. It is called with more
sites than there are: (0, 0, 0) stands behind the last.
"""


def capacity(count: int, pixels: int) -> int:
    """Room for ``count`` sites and a quarter more, at a level of so many ``pixels``."""
    return min(-(-max(1, count) * 5 // (4 * ROWS)) * ROWS, pixels)


class GraphedUNet:
    """Runs ``unet``, which is on the triton backend, as a CUDA graph for frames of one form after another.

    The first frame of a form (shapes and dtypes) runs uncaptured and gives the capacities; the next is captured, those
    after it replay. A frame with more sites than fit runs uncaptured after its replay, with larger capacities from the
    next frame of its form on. Beyond `graphed.FORMS` forms in turn, and where capture fails, which a warning says,
    frames run uncaptured. One instance serves one thread at a time.

    now: what is known of the form that the last frame had.
    """

    def __init__(self, unet: FusedUNet, stride: str, gather: Gather) -> None:
        """stride: as in `sparse.strided`. Raises ValueError for a U-Net on another backend."""
        if not isinstance(unet.backend, TritonBackend):
            raise ValueError(f"the U-Net runs on the {unet.backend.name} backend: only triton's can be captured")
        self.unet, self.stride, self.gather = unet, stride, gather
        self.forms = Recent(Form)
        self.now = Form()
        self._captures = True

    @torch.inference_mode()
    def __call__(self, mask: Tensor, *inputs: Tensor) -> tuple[SiteSet, Tensor]:
        """The sites of ``mask`` [B, H, W] bool and their features [N, C_0]; valid until the next call.

        inputs: what ``gather`` takes, on the mask's device.
        """
        now = self.now = self.forms.of(tuple((tensor.shape, tensor.dtype) for tensor in (mask, *inputs)))
        if now.frame is None and now.capacities is not None and self._captures:
            now.frame = self._capture(now.capacities, mask, inputs)
        if now.frame is not None:
            counts, sites, features = now.frame(mask, *inputs)
            if all(count <= room for count, room in zip(counts, now.frame.capacities, strict=True)):
                return SiteSet(sites.sites[: counts[0]], sites.shape), features[: counts[0]]
            now.frame = None  # its memory goes before any other is taken
        pyramid = self.unet.backend.pyramid(mask, len(self.unet.levels), self.stride)
        now.grow(pyramid)
        sites = pyramid.levels[0]
        return sites, self.unet(self.gather(sites, *inputs), pyramid)

    def _capture(self, capacities: tuple[int, ...], mask: Tensor, inputs: Sequence[Tensor]) -> Frame | None:
        try:
            frame = Frame(self.unet, self.stride, self.gather, capacities, (mask, *inputs))
            self.unet.release()  # the frame has buffers of its own
            return frame
        except Exception as failure:  # memory, the driver, Triton's compiler: no base class in common
            warnings.warn(f"frames run without a CUDA graph, its capture failed: {failure}", stacklevel=3)
            self._captures = False
            return None


@dataclass
class Form:
    """What is known of frames of one form."""

    capacities: tuple[int, ...] | None = None  # [L] sites a level that a capture has room for
    frame: Frame | None = None

    def grow(self, pyramid: Pyramid) -> None:
        """Makes room for as many sites as ``pyramid`` has, and a quarter more."""
        wanted = (capacity(len(s), s.shape[0] * s.shape[1] * s.shape[2]) for s in pyramid.levels)
        self.capacities = tuple(map(max, self.capacities or (0,) * len(pyramid), wanted))


class Frame:
    """One captured frame of fixed capacities; ``inputs``, of which the mask is first, show its form."""

    def __init__(
        self, unet: FusedUNet, stride: str, gather: Gather, capacities: tuple[int, ...], inputs: Sequence[Tensor]
    ) -> None:
        # A graph knows addresses alone: whatever it reads or writes is kept here, and never replaced.
        self.unet, self.stride, self.gather, self.capacities = unet.with_own_buffers(), stride, gather, capacities
        self.inputs = [tensor.clone() for tensor in inputs]
        self.graph: torch.cuda.CUDAGraph | None = None
        device = inputs[0].device
        if device.type != "cuda":
            return
        with torch.cuda.device(device):
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.run()  # compiles, tunes and fills caches, none of which can be captured
                graph = torch.cuda.CUDAGraph()
                # Other threads may go on using CUDA meanwhile.
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    self.outputs = self.run()
            torch.cuda.current_stream().wait_stream(stream)
        self.graph = graph

    def run(self) -> tuple[Tensor, SiteSet, Tensor]:
        """What is captured: counts [L], and as many sites and features as there is room for."""
        backend = self.unet.backend
        assert isinstance(backend, TritonBackend)
        pyramid, counts = backend.padded_pyramid(self.inputs[0], self.stride, self.capacities)
        sites = pyramid.levels[0]
        return counts, sites, self.unet(self.gather(sites, *self.inputs[1:]), pyramid)

    def __call__(self, *inputs: Tensor) -> tuple[list[int], SiteSet, Tensor]:
        """As `run`, with the counts on the host."""
        for kept, given in zip(self.inputs, inputs, strict=True):
            kept.copy_(given)
        if self.graph is None:
            counts, sites, features = self.run()
        else:
            self.graph.replay()
            counts, sites, features = self.outputs
        return counts.tolist(), sites, features  # the one synchronisation
