"""What a bundle may say of a network that the package transformers builds: the settings that shape it, and no others.

That package's configurations take more: a name on the hub, of which it reads settings, and a kernel or a class there,
whose code it downloads and runs. A bundle is somebody else's, and asks for none of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparserefine_ros.networks.limits import check_whole

SEGFORMER_KEYS = (
    "num_encoder_blocks", "depths", "sr_ratios", "hidden_sizes", "patch_sizes", "strides", "num_attention_heads",
    "mlp_ratios", "hidden_act", "layer_norm_eps", "decoder_hidden_size",
)  # fmt: skip
MASK2FORMER_KEYS = (
    "feature_size", "mask_feature_size", "hidden_dim", "encoder_feedforward_dim", "activation_function",
    "encoder_layers", "decoder_layers", "num_attention_heads", "dim_feedforward", "pre_norm",
    "enforce_input_projection", "common_stride", "num_queries", "feature_strides",
)  # fmt: skip
SWIN_KEYS = (
    "model_type", "patch_size", "embed_dim", "depths", "num_heads", "window_size", "mlp_ratio", "qkv_bias",
    "hidden_act", "layer_norm_eps", "out_features",
)  # fmt: skip
"""Of the ``backbone_config`` of a Mask2Former."""
MAX_WINDOW = 32  # Swin makes a table of pairs of a window's tokens, its side to the power of 4, while it is built


def check_segformer(config: Mapping[str, Any]) -> None:
    """ValueError where ``config`` is no mapping, or has other keys than SEGFORMER_KEYS."""
    _check_keys("config", config, SEGFORMER_KEYS)


def check_mask2former(config: Mapping[str, Any]) -> None:
    """ValueError where ``config`` is no mapping, has other keys, another backbone than Swin or too large windows."""
    _check_keys("config", config, (*MASK2FORMER_KEYS, "backbone_config"))
    if "backbone_config" in config:
        backbone = config["backbone_config"]
        _check_keys("backbone_config", backbone, SWIN_KEYS)
        if backbone.get("model_type") != "swin":
            raise ValueError(f"backbone_config has model_type {backbone.get('model_type')!r:.80}; write swin")
        check_whole(1, MAX_WINDOW, window_size=backbone.get("window_size", 1))


def _check_keys(what: str, given: Any, keys: tuple[str, ...]) -> None:
    if not isinstance(given, Mapping):
        raise ValueError(f"{what} is {given!r:.80}; give a mapping of {', '.join(keys)}")
    other = [key for key in given if key not in keys]
    if other:
        raise ValueError(f"{what} has {other[0]!r:.80}; it may have {', '.join(keys)}")
