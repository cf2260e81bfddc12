"""Mask2Former on a Swin transformer, as a segmenter of pixels.

Cheng et al., 2022, "Masked-attention Mask Transformer for Universal Image Segmentation" (arXiv 2112.01527): queries
that each name a class, or none, and draw a mask. All but the classifier is the package transformers' own, built from a
configuration; nothing is downloaded, and weights carry that package's names.

Shape shorthand: B images, K classes, Q queries, H, W input height and width, h, w those of stride 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparserefine_ros.networks.token_pruning import prune_windows

SIZES: dict[str, dict[str, Any]] = {
    "t": {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7},
    "l": {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48], "window_size": 12},
}
"""Swin-T and Swin-L (Liu et al., 2021), which SparseRefine takes; the rest are transformers' defaults, 100 queries."""
MAX_WINDOW = 32
"""Largest side of Swin's windows: its index table, made before anybody can count it, grows with the fourth power."""
FLOOR = 1e-10
"""A class that no query draws at a pixel has this score there, instead of 0, which has no logarithm."""


def semantic_logits(classes: Tensor, masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits [B, K, H, W] of queries' class logits [B, Q, K + 1], none last, and mask logits [B, Q, h, w].

    A class scores s_c = sum over queries of P(class c) sigmoid(mask), and its logit is log max(s_c, 1e-10), as
    SparseRefine's code has it. The softmax of these logits is s_c / sum of s, the scores scaled to sum to one:
    its entropy is small where the queries agree, log 2 where two classes claim a pixel alike, however weakly, and
    log K where none does, so that such a pixel is refined too.

    Scores, not mask logits, are resized from stride 4: mmseg resizes the Q masks first, at five times the memory for 19
    classes; borders move by parts of a pixel.
    """
    shares = classes.softmax(-1)[..., :-1]  # [B, Q, K]
    scores = torch.einsum("bqc,bqhw->bchw", shares, masks.sigmoid()).float()
    return F.interpolate(scores, size, mode="bilinear", align_corners=False).clamp(min=FLOOR).log()


class Mask2Former(nn.Module):
    """Images to logits at the images' own size; see `semantic_logits`.

    Args:
        num_classes: K.
        size: t or l.
        config: transformers' configuration of another Mask2Former, as its config.json has it, in place of ``size``.
        keep: shares of the windows that each stage of Swin computes; None all. See `token_pruning`.

    Raises:
        ValueError: another size, windows above MAX_WINDOW, shares that do not fit, or the package transformers is
            missing or too old.
    """

    def __init__(
        self,
        num_classes: int,
        size: str = "t",
        config: Mapping[str, Any] | None = None,
        keep: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if config is None and size not in SIZES:
            raise ValueError(f"unknown Mask2Former size {size!r}; known are {', '.join(SIZES)}")
        try:
            from transformers import Mask2FormerConfig, Mask2FormerModel
        except ImportError as error:
            raise ValueError(
                "network 'mask2former' needs the package transformers, which is missing; "
                "pip install 'transformers>=5.23'"
            ) from error
        swin = {"model_type": "swin", "out_features": [f"stage{i + 1}" for i in range(4)]}
        settings = Mask2FormerConfig(**({"backbone_config": swin | SIZES[size]} if config is None else config))
        window = getattr(settings.backbone_config, "window_size", 1)
        if not (isinstance(window, int) and 1 <= window <= MAX_WINDOW):
            raise ValueError(f"window_size {window!r:.80}; expected a whole number from 1 to {MAX_WINDOW}")
        with torch.device("meta"):  # what is filled before it is registered, limits.at_most sees here before it is made
            Mask2FormerModel(settings)
        # Not its Mask2FormerForUniversalSegmentation, which adds the classifier, but also losses that need scipy.
        self.model: Any = Mask2FormerModel(settings)
        self.class_predictor = nn.Linear(settings.hidden_dim, num_classes + 1)
        backbone = self.model.pixel_level_module.encoder
        if not hasattr(backbone, "swin"):
            raise ValueError(
                "network 'mask2former' needs a newer transformers, whose Swin backbone has 'swin'; "
                "pip install -U transformers"
            )
        backbone.swin.layernorm = nn.Identity()  # of what nobody reads; the hub's checkpoints lack it
        if keep is not None:
            prune_windows(backbone, keep)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] to logits [B, K, H, W]."""
        output = self.model(images, output_hidden_states=True)  # which hold what the classifier reads
        queries = output.transformer_decoder_intermediate_states[-1].transpose(0, 1)  # [B, Q, C]
        height, width = images.shape[-2:]
        return semantic_logits(self.class_predictor(queries), output.masks_queries_logits[-1], (height, width))
