"""Names and shapes of the weights in checkpoints of the official release of offset learning.

Facts of github.com/HVision-NKU/OffSeg at commit 1414f6d, whose modules were built once and agreed with these lists key
by key and shape by shape. K classes.
"""

from __future__ import annotations

from zlib import crc32

import numpy as np
import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]

OFFSEG: dict[str, tuple[tuple[int, ...], tuple[str, ...], int, tuple[int, ...]]] = {
    "t": ((32, 48, 120, 224), ("444", "444", "443333444", "443344"), 2, (32, 32, 64, 128)),
    "b": ((32, 64, 144, 288), ("4444", "4444", "443333334444", "44333344"), 4, (32, 64, 128, 256)),
    "l": ((40, 80, 192, 384), ("44444", "44444", "444433333334444", "4443333444"), 6, (32, 64, 128, 256)),
}
"""Variant to widths, expansion of every block by stage, blocks with attention in stages 3 and 4, widths in the head."""
SEGFORMER = {"b0": (32, (2, 2, 2, 2)), "b1": (64, (2, 2, 2, 2)), "b2": (64, (3, 4, 6, 3)), "b3": (64, (3, 4, 18, 3)),
             "b4": (64, (3, 8, 27, 3)), "b5": (64, (3, 6, 40, 3))}  # fmt: skip
SEGNEXT = {"t": ((32, 64, 160, 256), (3, 3, 5, 2), 256), "s": ((64, 128, 320, 512), (2, 2, 4, 2), 256),
           "b": ((64, 128, 320, 512), (3, 3, 12, 3), 512)}  # fmt: skip


def conv(key: str, cout: int, cin: int, *kernel: int) -> Shapes:
    """A convolution with bias, or a linear layer where no kernel is given."""
    return {f"{key}.weight": (cout, cin, *kernel), f"{key}.bias": (cout,)}


def norm(key: str, channels: int) -> Shapes:
    return {f"{key}.weight": (channels,), f"{key}.bias": (channels,)}


def batch_norm(key: str, channels: int) -> Shapes:
    statistics = {f"{key}.running_mean": (channels,), f"{key}.running_var": (channels,)}
    return {**norm(key, channels), **statistics, f"{key}.num_batches_tracked": ()}


def conv_module(key: str, cout: int, cin: int, kind: str) -> Shapes:
    """mmcv's: a 1x1 convolution without bias and a normalisation called ``kind``."""
    make = batch_norm if kind == "bn" else norm
    return {f"{key}.conv.weight": (cout, cin, 1, 1), **make(f"{key}.{kind}", cout)}


def offset_head(channels: int, k: int) -> Shapes:
    key = "decode_head.offset_learning"
    return {
        f"{key}.cls_repr": (1, k, channels), **norm(f"{key}.mask_norm", k),
        f"{key}.cls_offset_proj.weight": (channels, channels), f"{key}.feat_offset_proj.weight": (channels, channels),
        **conv("decode_head.conv_seg", k, channels, 1, 1),
    }  # fmt: skip


def attention(key: str, c: int, cout: int, keys: int, table: int, queries: int, pretrained: tuple[int, int]) -> Shapes:
    """Attention with 8 heads; ``table`` positions, ``pretrained`` queries and positions at 224 x 224."""
    values = 4 * keys
    return {
        f"{key}.attention_biases_seg": (8, table), f"{key}.attention_bias_idxs_seg": (queries, table),
        f"{key}.attention_biases": (8, pretrained[1]), f"{key}.attention_bias_idxs": pretrained,
        **conv(f"{key}.k.0", keys, c, 1, 1), **batch_norm(f"{key}.k.1", keys),
        **conv(f"{key}.v.0", values, c, 1, 1), **batch_norm(f"{key}.v.1", values),
        **conv(f"{key}.v_local.0", values, 1, 3, 3), **batch_norm(f"{key}.v_local.1", values),
        **conv(f"{key}.proj.1", cout, values, 1, 1), **batch_norm(f"{key}.proj.2", cout),
    }  # fmt: skip


def offseg(variant: str, k: int) -> Shapes:
    """OffSeg-T/B/L; the tables are for crops of 512, also in the configurations with larger ones."""
    widths, expansions, attentions, head = OFFSEG[variant]
    first = widths[0]
    shapes = {
        **conv("backbone.patch_embed.0", first // 2, 3, 3, 3), **batch_norm("backbone.patch_embed.1", first // 2),
        **conv("backbone.patch_embed.3", first, first // 2, 3, 3), **batch_norm("backbone.patch_embed.4", first),
    }  # fmt: skip
    for stage, (c, blocks) in enumerate(zip(widths, expansions, strict=True)):
        for i, expansion in enumerate(blocks):
            key, hidden = f"backbone.network.{2 * stage}.{i}", c * int(expansion)
            shapes |= {
                f"{key}.layer_scale_2": (c, 1, 1),
                **conv(f"{key}.mlp.fc1", hidden, c, 1, 1), **batch_norm(f"{key}.mlp.norm1", hidden),
                **conv(f"{key}.mlp.mid", hidden, 1, 3, 3), **batch_norm(f"{key}.mlp.mid_norm", hidden),
                **conv(f"{key}.mlp.fc2", c, hidden, 1, 1), **batch_norm(f"{key}.mlp.norm2", c),
            }  # fmt: skip
            if stage < 2 or i < len(blocks) - attentions:
                continue
            key += ".token_mixer"
            shapes |= {
                key.replace("token_mixer", "layer_scale_1"): (c, 1, 1), **attention(key, c, c, 256, 256, 256, (49, 49)),
                **conv(f"{key}.q.0", 256, c, 1, 1), **batch_norm(f"{key}.q.1", 256),
                **conv(f"{key}.talking_head1", 8, 8, 1, 1), **conv(f"{key}.talking_head2", 8, 8, 1, 1),
            }  # fmt: skip
            if stage == 2:
                shapes |= {**conv(f"{key}.stride_conv.0", c, 1, 3, 3), **batch_norm(f"{key}.stride_conv.1", c)}
    for i, (cin, cout) in enumerate(zip(widths, widths[1:], strict=False)):
        key = f"backbone.network.{2 * i + 1}"
        names = ("conv", "bn") if i == 2 else ("proj", "norm")
        shapes |= {**conv(f"{key}.{names[0]}", cout, cin, 3, 3), **batch_norm(f"{key}.{names[1]}", cout)}
    shapes |= {
        **attention("backbone.network.5.attn", widths[2], widths[3], 128, 1024, 256, (49, 196)),
        **conv("backbone.network.5.attn.q.local.0", widths[2], 1, 3, 3),
        **conv("backbone.network.5.attn.q.proj.0", 128, widths[2], 1, 1),
        **batch_norm("backbone.network.5.attn.q.proj.1", 128),
    }
    for i, (cin, cout) in enumerate(zip(widths, head, strict=True)):
        shapes |= conv_module(f"decode_head.pre.{i}", cout, cin, "gn")
    for i in range(3):
        key, fine, coarse = f"decode_head.freqfusions.{i}", head[2 - i], sum(head[3 - i :])
        c = (fine + coarse) // 4
        shapes |= {
            f"{key}.hamming_lowpass": (1,), f"{key}.hamming_highpass": (1,), f"{key}.dysampler.init_pos": (1, 32, 1, 1),
            **conv(f"{key}.hr_channel_compressor", c, fine, 1, 1),
            **conv(f"{key}.lr_channel_compressor", c, coarse, 1, 1),
            **conv(f"{key}.content_encoder", 25, c, 3, 3), **conv(f"{key}.content_encoder2", 9, c, 3, 3),
            **conv(f"{key}.dysampler.offset", 32, 8, 3, 3), **conv(f"{key}.dysampler.hr_offset", 8, 8, 3, 3),
            **conv(f"{key}.dysampler.direct_scale", 32, c, 3, 3),
            **conv(f"{key}.dysampler.hr_direct_scale", 8, c, 3, 3),
            **norm(f"{key}.dysampler.norm_hr", c), **norm(f"{key}.dysampler.norm_lr", c),
        }  # fmt: skip
    return {**shapes, **conv_module("decode_head.align", 256, sum(head), "gn"), **offset_head(256, k)}


def segformer(size: str, k: int) -> Shapes:
    """SegFormer-B0 to B5 with offset learning."""
    first, depths = SEGFORMER[size]
    widths = [first * factor for factor in (1, 2, 5, 8)]
    shapes: Shapes = {}
    for stage, (c, depth, cin) in enumerate(zip(widths, depths, [3, *widths], strict=False)):
        key, kernel, reduction = f"backbone.layers.{stage}", 3 if stage else 7, (8, 4, 2, 1)[stage]
        shapes |= {**conv(f"{key}.0.projection", c, cin, kernel, kernel), **norm(f"{key}.0.norm", c)}
        shapes |= norm(f"{key}.2", c)
        for i in range(depth):
            key = f"backbone.layers.{stage}.1.{i}"
            shapes |= {
                **norm(f"{key}.norm1", c), **norm(f"{key}.norm2", c),
                f"{key}.attn.attn.in_proj_weight": (3 * c, c), f"{key}.attn.attn.in_proj_bias": (3 * c,),
                **conv(f"{key}.attn.attn.out_proj", c, c), **conv(f"{key}.ffn.layers.0", 4 * c, c, 1, 1),
                **conv(f"{key}.ffn.layers.1", 4 * c, 1, 3, 3), **conv(f"{key}.ffn.layers.4", c, 4 * c, 1, 1),
            }  # fmt: skip
            if reduction > 1:
                shapes |= {**conv(f"{key}.attn.sr", c, c, reduction, reduction), **norm(f"{key}.attn.norm", c)}
        shapes |= conv_module(f"decode_head.convs.{stage}", 256, c, "bn")
    return {**shapes, **conv_module("decode_head.fusion_conv", 256, 1024, "bn"), **offset_head(256, k)}


def segnext(size: str, k: int) -> Shapes:
    """SegNeXt-T, -S and -B with offset learning."""
    widths, depths, head = SEGNEXT[size]
    first = widths[0]
    shapes = {
        **conv("backbone.patch_embed1.proj.0", first // 2, 3, 3, 3),
        **batch_norm("backbone.patch_embed1.proj.1", first // 2),
        **conv("backbone.patch_embed1.proj.3", first, first // 2, 3, 3),
        **batch_norm("backbone.patch_embed1.proj.4", first),
    }
    for stage, (c, depth) in enumerate(zip(widths, depths, strict=True)):
        if stage:
            key = f"backbone.patch_embed{stage + 1}"
            shapes |= {**conv(f"{key}.proj", c, widths[stage - 1], 3, 3), **batch_norm(f"{key}.norm", c)}
        shapes |= norm(f"backbone.norm{stage + 1}", c)
        for i in range(depth):
            key, hidden = f"backbone.block{stage + 1}.{i}", c * (8, 8, 4, 4)[stage]
            shapes |= {
                f"{key}.layer_scale_1": (c,), f"{key}.layer_scale_2": (c,),
                **batch_norm(f"{key}.norm1", c), **batch_norm(f"{key}.norm2", c),
                **conv(f"{key}.attn.proj_1", c, c, 1, 1), **conv(f"{key}.attn.proj_2", c, c, 1, 1),
                **conv(f"{key}.attn.spatial_gating_unit.conv0", c, 1, 5, 5),
                **conv(f"{key}.attn.spatial_gating_unit.conv3", c, c, 1, 1),
                **conv(f"{key}.mlp.fc1", hidden, c, 1, 1), **conv(f"{key}.mlp.dwconv", hidden, 1, 3, 3),
                **conv(f"{key}.mlp.fc2", c, hidden, 1, 1),
            }  # fmt: skip
            for strip, length in enumerate((7, 11, 21)):
                shapes |= conv(f"{key}.attn.spatial_gating_unit.conv{strip}_1", c, 1, 1, length)
                shapes |= conv(f"{key}.attn.spatial_gating_unit.conv{strip}_2", c, 1, length, 1)
    shapes |= {
        **conv_module("decode_head.squeeze", head, sum(widths[1:]), "gn"),
        **conv("decode_head.hamburger.ham_in.conv", head, head, 1, 1),
        **conv_module("decode_head.hamburger.ham_out", head, head, "gn"),
        **conv_module("decode_head.align", head, head, "gn"),
    }
    return {**shapes, **offset_head(head, k)}


def drawn(shapes: Shapes) -> dict[str, Tensor]:
    """float64 values that depend on each key and shape alone, on any machine, so large that all of them matter."""
    pool = np.random.RandomState(0).uniform(-1, 1, 65537)  # a prime: no two rows of a matrix are alike
    state = {}
    for key, shape in shapes.items():
        if key.endswith(("num_batches_tracked", "idxs", "idxs_seg")):
            state[key] = torch.zeros(shape, dtype=torch.long)
            continue
        values = torch.from_numpy(np.resize(np.roll(pool, crc32(key.encode()) % len(pool)), shape))
        if "layer_scale" in key:
            values = 0.2 + 0.1 * values
        elif key.endswith("running_var") or (values.ndim == 1 and key.endswith("weight")):
            values = 1 + 0.5 * values
        elif key.endswith(("bias", "running_mean", "cls_repr")):
            values = 0.3 * values
        elif not key.endswith("attention_biases_seg"):
            values = values * (3 / values[0].numel()) ** 0.5
        state[key] = values
    return state
