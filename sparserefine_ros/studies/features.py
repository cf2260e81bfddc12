"""The dense segmenter's features, caught on their way to the classifier.

Shape shorthand: B images, F feature channels, h', w' their size.
"""

from __future__ import annotations

from torch import Tensor, nn

from sparserefine_ros.segmenter.dense import unwrapped


class FeatureTap:
    """Keeps what the 1x1 classifier of ``dense`` read last; of a network without one, nothing."""

    def __init__(self, dense: nn.Module) -> None:
        self.latest: Tensor | None = None  # [B, F, h', w'] float32
        self.channels = 0  # F
        classifier = getattr(unwrapped(dense), "classifier", None)
        if isinstance(classifier, nn.Conv2d):
            self.channels = classifier.in_channels
            classifier.register_forward_pre_hook(self._keep)

    def _keep(self, _classifier: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.latest = inputs[0].float()
