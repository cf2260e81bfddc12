"""How mmsegmentation names the weights of the networks that `sparserefine import` reads: data, no code to run.

Renames are (regular expression, replacement) pairs that are all applied, in order, by `re.sub`. Splits cut one tensor
along its first dimension into as many as names are given. What matches `unneeded` is reported and dropped.

Known are mmseg's own conventions (`backbone.`, `decode_head.`, a ConvModule's `conv`, `bn`, `gn`), the names of its
HRNet, SegFormer and SegNeXt, and those of the official release of offset learning (github.com/HVision-NKU/OffSeg): of
OffSeg, and of SegFormer and SegNeXt with offsets. Where a checkpoint has others, the import names every key and takes
more renames from a file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

from torch import Tensor

from sparserefine_ros.networks.efficientformer import SIZES as ENCODERS
from sparserefine_ros.networks.hrnet import WIDTHS as HRNET_WIDTHS
from sparserefine_ros.networks.offseg import VARIANTS
from sparserefine_ros.networks.segformer import SIZES as SEGFORMER_SIZES
from sparserefine_ros.networks.segnext import SIZES as SEGNEXT_SIZES

Renames = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Architecture:
    """What to build for a checkpoint and how its names become those of the network."""

    network: str  # a name of networks.registry.DENSE
    args: Callable[[Mapping[str, Tensor]], dict[str, Any]]  # from the renamed weights
    renames: Renames
    splits: tuple[tuple[str, tuple[str, ...]], ...] = ()
    unneeded: tuple[tuple[str, str], ...] = ()  # (regular expression, why)


ENCODER_TABLE = "encoder.stages.3.5.attention.bias.table"
"""A weight that every EfficientFormerV2 has and that tells the resolution it was trained for."""

EFFICIENTFORMER: Renames = (
    (r"^backbone\.patch_embed\.([01])\.", r"encoder.stem.0.\1."),
    (r"^backbone\.patch_embed\.3\.", "encoder.stem.1.0."),
    (r"^backbone\.patch_embed\.4\.", "encoder.stem.1.1."),
    (r"^backbone\.network\.0\.", "encoder.stages.0."),
    (r"^backbone\.network\.2\.", "encoder.stages.1."),
    (r"^backbone\.network\.4\.", "encoder.stages.2."),
    (r"^backbone\.network\.6\.", "encoder.stages.3."),
    (r"^backbone\.network\.1\.proj\.", "encoder.downs.0.conv.0."),
    (r"^backbone\.network\.1\.norm\.", "encoder.downs.0.conv.1."),
    (r"^backbone\.network\.3\.proj\.", "encoder.downs.1.conv.0."),
    (r"^backbone\.network\.3\.norm\.", "encoder.downs.1.conv.1."),
    (r"^backbone\.network\.5\.conv\.", "encoder.downs.2.conv.0."),
    (r"^backbone\.network\.5\.bn\.", "encoder.downs.2.conv.1."),
    (r"^backbone\.network\.5\.attn\.", "encoder.downs.2.attention."),
    (r"\.mlp\.fc1\.", ".mlp.0.0."),
    (r"\.mlp\.norm1\.", ".mlp.0.1."),
    (r"\.mlp\.mid\.", ".mlp.1.0."),
    (r"\.mlp\.mid_norm\.", ".mlp.1.1."),
    (r"\.mlp\.fc2\.", ".mlp.2.0."),
    (r"\.mlp\.norm2\.", ".mlp.2.1."),
    (r"\.layer_scale_1$", ".scale_attention"),
    (r"\.layer_scale_2$", ".scale_mlp"),
    (r"\.token_mixer\.", ".attention."),
    (r"\.stride_conv\.", ".shrink."),
    (r"\.talking_head1\.", ".talk_before."),
    (r"\.talking_head2\.", ".talk_after."),
    (r"\.q\.local\.0\.", ".q_local."),
    (r"\.q\.proj\.", ".q."),
    (r"\.attention\.proj\.1\.", ".attention.proj.0."),  # .0 is the activation
    (r"\.attention\.proj\.2\.", ".attention.proj.1."),
    (r"\.attention_biases_seg$", ".bias.table"),
)

OFFSETS: Renames = (
    (r"^decode_head\.offset_learning\.cls_repr$", "classifier.embeddings"),
    (r"^decode_head\.offset_learning\.cls_offset_proj\.", "classifier.offset.class_offset."),
    (r"^decode_head\.offset_learning\.feat_offset_proj\.", "classifier.offset.feature_offset."),
    (r"^decode_head\.offset_learning\.mask_norm\.", "classifier.norm."),
)

OFFSEG = (
    EFFICIENTFORMER
    + OFFSETS
    + (
        (r"^decode_head\.pre\.(\d)\.conv\.", r"project.\1.0."),
        (r"^decode_head\.pre\.(\d)\.gn\.", r"project.\1.1."),
        # Theirs count from the coarsest maps, ours from the finest.
        (r"^decode_head\.freqfusions\.0\.", "fuse.2."),
        (r"^decode_head\.freqfusions\.1\.", "fuse.1."),
        (r"^decode_head\.freqfusions\.2\.", "fuse.0."),
        (r"\.hr_channel_compressor\.", ".compress_fine."),
        (r"\.lr_channel_compressor\.", ".compress_coarse."),
        (r"\.content_encoder\.", ".low_pass."),
        (r"\.content_encoder2\.", ".high_pass."),
        (r"\.dysampler\.norm_hr\.", ".norm_fine."),
        (r"\.dysampler\.norm_lr\.", ".norm_coarse."),
        (r"\.dysampler\.hr_offset\.", ".direction_fine."),
        (r"\.dysampler\.offset\.", ".direction_coarse."),
        (r"\.dysampler\.hr_direct_scale\.", ".magnitude_fine."),
        (r"\.dysampler\.direct_scale\.", ".magnitude_coarse."),
        (r"^decode_head\.align\.conv\.", "align.0."),
        (r"^decode_head\.align\.gn\.", "align.1."),
    )
)

SEGFORMER: Renames = (
    (r"^backbone\.layers\.(\d)\.0\.projection\.", r"encoder.stages.\1.patch_embeddings.proj."),
    (r"^backbone\.layers\.(\d)\.0\.norm\.", r"encoder.stages.\1.patch_embeddings.layer_norm."),
    (r"^backbone\.layers\.(\d)\.1\.", r"encoder.stages.\1.blocks."),
    (r"^backbone\.layers\.(\d)\.2\.", r"encoder.stages.\1.layer_norm."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.attn\.out_proj\.", ".attention.o_proj."),
    (r"\.attn\.attn\.", ".attention."),
    (r"\.attn\.sr\.", ".attention.sequence_reduction.sequence_reduction."),
    (r"\.attn\.norm\.", ".attention.sequence_reduction.layer_norm."),
    (r"\.ffn\.layers\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.dwconv.dwconv."),
    (r"\.ffn\.layers\.4\.", ".mlp.fc2."),
    (r"^decode_head\.convs\.(\d)\.conv\.", r"levels.\1.0."),
    (r"^decode_head\.convs\.(\d)\.bn\.", r"levels.\1.1."),
    (r"^decode_head\.fusion_conv\.conv\.", "fusion.0."),
    (r"^decode_head\.fusion_conv\.bn\.", "fusion.1."),
)
SEGFORMER_PLAIN = SEGFORMER + ((r"^decode_head\.conv_seg\.", "classifier."),)
SEGFORMER_OFFSET = SEGFORMER + OFFSETS
QUERIES_KEYS_VALUES = (
    (r"(.*\.attention)\.in_proj_(weight|bias)", (r"\1.q_proj.\2", r"\1.k_proj.\2", r"\1.v_proj.\2")),
)

SEGNEXT: Renames = (
    *((rf"^backbone\.patch_embed{i + 1}\.(proj\.(?=\d))?", f"embeds.{i}.") for i in range(4)),
    (r"^(embeds\.\d)\.proj\.", r"\1.0."),
    (r"^(embeds\.\d)\.norm\.", r"\1.1."),
    *((rf"^backbone\.block{i + 1}\.", f"stages.{i}.") for i in range(4)),
    *((rf"^backbone\.norm{i + 1}\.", f"norms.{i}.") for i in range(4)),
    (r"\.attn\.proj_1\.", ".before."),
    (r"\.attn\.proj_2\.", ".after."),
    (r"\.attn\.spatial_gating_unit\.conv0\.", ".local."),
    (r"\.attn\.spatial_gating_unit\.conv(\d)_1\.", r".strips.\1.0."),
    (r"\.attn\.spatial_gating_unit\.conv(\d)_2\.", r".strips.\1.1."),
    (r"\.attn\.spatial_gating_unit\.conv3\.", ".mix."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.dwconv\.(dwconv\.)?", ".mlp.1."),  # one level deeper in versions before 1.0
    (r"\.mlp\.fc2\.", ".mlp.3."),
    (r"\.layer_scale_1$", ".scale_attention"),
    (r"\.layer_scale_2$", ".scale_mlp"),
    (r"^decode_head\.hamburger\.ham_in\.conv\.", "ham_in."),
    (r"^decode_head\.hamburger\.(ham_out\.)", r"decode_head.\1"),
    (r"^decode_head\.(squeeze|ham_out|align)\.conv\.", r"\1.0."),
    (r"^decode_head\.(squeeze|ham_out|align)\.gn\.", r"\1.1."),
)
SEGNEXT_PLAIN = SEGNEXT + ((r"^decode_head\.conv_seg\.", "classifier."),)
SEGNEXT_OFFSET = SEGNEXT + OFFSETS

HRNET: Renames = (
    *((rf"^backbone\.{part}{i + 1}\.", f"stem.{i}.{j}.") for i in range(2) for j, part in enumerate(("conv", "bn"))),
    (r"^backbone\.layer1\.", "layer1."),
    # mmseg wraps the convolution that begins a branch once more; those that only change a width it does not.
    *((rf"^backbone\.transition{s + 1}\.(\d)\.(0\.)?(?=[01]\.)", rf"transitions.{s}.\1.") for s in range(3)),
    *((rf"^backbone\.stage{s + 2}\.", f"stages.{s}.") for s in range(3)),
    (r"\.fuse_layers\.", ".fuse."),
    (r"\.conv([123])\.", r".conv\1.0."),
    (r"\.bn([123])\.", r".conv\1.1."),
    (r"\.downsample\.", ".shortcut."),
    (r"^decode_head\.convs\.0\.conv\.", "head.0."),
    (r"^decode_head\.convs\.0\.bn\.", "head.1."),
    (r"^decode_head\.conv_seg\.", "classifier."),
)

TRAINING_ONLY = (
    (r"^auxiliary_head\.", "used in training only"),
    (r"^ema_", "an average that training kept beside the weights"),
)
REPLACED_CLASSIFIER = (*TRAINING_ONLY, (r"^decode_head\.conv_seg\.", "mmseg's plain classifier, which offsets replace"))
COMPUTED = (
    (r"\.attention_bias_idxs(_seg)?$", "an index table, computed here"),
    (r"\.attention_biases$", "the table for classification at 224 x 224; segmentation has its own"),
    (r"\.hamming_(low|high)pass$", "a window of ones"),
    (r"\.dysampler\.init_pos$", "positions of pixels, computed here"),
)


def _offseg_args(variant: str) -> Callable[[Mapping[str, Tensor]], dict[str, Any]]:
    def args(weights: Mapping[str, Tensor]) -> dict[str, Any]:
        table = weights.get(ENCODER_TABLE)
        resolution = {} if table is None or table.ndim != 2 else {"resolution": 32 * isqrt(table.shape[1])}
        return {"variant": variant, **resolution}

    return args


def _size_args(size: str, offsets: bool) -> Callable[[Mapping[str, Tensor]], dict[str, Any]]:
    return lambda weights: {"size": size, "offsets": offsets}


def _width_args(width: int) -> Callable[[Mapping[str, Tensor]], dict[str, Any]]:
    return lambda weights: {"width": width}


ARCHITECTURES: dict[str, Architecture] = {
    **{
        f"hrnet-w{width}": Architecture("hrnet", _width_args(width), HRNET, unneeded=TRAINING_ONLY)
        for width in HRNET_WIDTHS
    },
    **{
        f"offseg-{variant.lower()}": Architecture(
            "offseg", _offseg_args(variant), OFFSEG, unneeded=REPLACED_CLASSIFIER + COMPUTED
        )
        for variant in VARIANTS
    },
    **{
        f"segformer-{size}": Architecture(
            "segformer", _size_args(size, False), SEGFORMER_PLAIN, QUERIES_KEYS_VALUES, TRAINING_ONLY
        )
        for size in SEGFORMER_SIZES
    },
    **{
        f"segformer-ol-{size}": Architecture(
            "segformer", _size_args(size, True), SEGFORMER_OFFSET, QUERIES_KEYS_VALUES, REPLACED_CLASSIFIER
        )
        for size in SEGFORMER_SIZES
    },
    **{
        f"segnext-{size.lower()}": Architecture(
            "segnext", _size_args(size, False), SEGNEXT_PLAIN, unneeded=TRAINING_ONLY
        )
        for size in SEGNEXT_SIZES
    },
    **{
        f"segnext-ol-{size.lower()}": Architecture(
            "segnext", _size_args(size, True), SEGNEXT_OFFSET, unneeded=REPLACED_CLASSIFIER
        )
        for size in SEGNEXT_SIZES
    },
}
"""Names that `sparserefine import --network` takes."""

BLOCKS: dict[str, tuple[str, dict[tuple[int, int], str]]] = {
    "hrnet": (
        r"backbone\.stage2\.0\.branches\.0\.\d+\.conv1\.weight", {(width, 4): f"w{width}" for width in HRNET_WIDTHS}
    ),
    "offseg": (
        r"backbone\.network\.\d\.\d+\.mlp\.fc1\.weight",
        {(ENCODERS[s].widths[0], sum(ENCODERS[s].depths)): variant.lower() for variant, (s, _) in VARIANTS.items()},
    ),
    "segformer": (
        r"backbone\.layers\.\d\.1\.\d+\.ffn\.layers\.0\.weight",
        {(first, sum(depths)): size for size, (first, depths) in SEGFORMER_SIZES.items()},
    ),
    "segnext": (
        r"backbone\.block\d\.\d+\.mlp\.fc1\.weight",
        {(widths[0], sum(depths)): size.lower() for size, (widths, depths, _) in SEGNEXT_SIZES.items()},
    ),
}  # fmt: skip
"""By family: a weight that every block has; and the sizes, by its fewest inputs and how many of it there are."""
OFFSET_PREFIX = "decode_head.offset_learning."
"""What the weights of offset learning begin with, in every head."""
