"""Starting a dense network from another bundle's encoder, as papers start from ImageNet's.

A few hundred frames are not enough to learn edges and textures from; the encoder of a network that has seen others,
be they synthetic, is. Decoder and classifier start at random.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from sparserefine_ros.errors import TrainingError
from sparserefine_ros.networks.backbones import TimmBackbone
from sparserefine_ros.networks.compact import CompactEncoder
from sparserefine_ros.networks.registry import DENSE, build
from sparserefine_ros.segmenter.bundle import Bundle, build_network


def start_encoder(module: nn.Module, name: str) -> None:
    """Copies the encoder of the dense network of bundle ``name`` into that of ``module``; or, where this is one of
    timm's, the weights of the file ``name``.

    Raises TrainingError where either bundle has no `CompactEncoder` or theirs differ in size; for a file that does not
    hold that model's weights.
    """
    backbone = next((m for m in module.modules() if isinstance(m, TimmBackbone)), None)
    if backbone is not None:
        _start_timm(backbone, Path(name))
        return
    source = Bundle.load(name)
    spec = source.dense
    theirs = _encoder(
        build_network(source.path, spec, lambda: build(DENSE, spec.network, len(source.classes), spec.args)),
        f"bundle {name!r}",
    )
    ours = _encoder(module, "the recipe's dense network")
    for part in CompactEncoder.PARTS:
        try:
            ours.get_submodule(part).load_state_dict(theirs.get_submodule(part).state_dict())
        except RuntimeError as error:
            raise TrainingError(
                f"the encoder of bundle {name!r} has other widths or depths than the recipe's, see {part!r}; make them "
                "the same"
            ) from error


def _start_timm(backbone: TimmBackbone, file: Path) -> None:
    if file.suffix != ".safetensors" or not file.is_file():  # the others are pickles
        raise TrainingError(f"{file} is no file of timm's weights; give the model.safetensors of {backbone.name!r}")
    try:
        backbone.start_from(file)
    except Exception as error:  # timm's readers raise what they like
        raise TrainingError(f"{file} does not hold the weights of timm's {backbone.name!r}: {error}") from error


def _encoder(module: nn.Module, whose: str) -> CompactEncoder:
    found = next((m for m in module.modules() if isinstance(m, CompactEncoder)), None)
    if found is None:
        raise TrainingError(f"{whose} has no compact encoder; leave the recipe's key 'encoder' out")
    return found
