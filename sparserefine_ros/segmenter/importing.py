"""A checkpoint of mmsegmentation, a folder from the Hugging Face hub, or an ONNX file, to a bundle.

Every weight of a checkpoint must find its place and every weight of the network must be filled; anything else is an
error that names the keys. What came from where is written into the bundle as a report. An ONNX file stays what it is.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sparserefine_ros import __version__
from sparserefine_ros.datasets.classes import ClassList
from sparserefine_ros.errors import BundleError
from sparserefine_ros.networks.registry import DENSE, build
from sparserefine_ros.segmenter import onnx_file
from sparserefine_ros.segmenter.bundle import ONNX, Bundle, NetworkSpec, construct, save_network
from sparserefine_ros.segmenter.checkpoints import Checkpoint, read_checkpoint
from sparserefine_ros.segmenter.hub_download import download
from sparserefine_ros.segmenter.hub_names import class_names, read_architecture, read_weights
from sparserefine_ros.segmenter.licences import find_licence, write_import_card
from sparserefine_ros.segmenter.mmseg_names import ARCHITECTURES, BLOCKS, OFFSET_PREFIX, Architecture, Renames
from sparserefine_ros.segmenter.preprocess import low_resolution_size
from sparserefine_ros.untrusted import load_yaml
from sparserefine_ros.whole_files import write_whole

REPORT = "import.txt"
"""The report's name in the bundle."""
HUB_NAME = r"[\w.-]+/[\w.-]+"  # owner and model
SUFFIXES = (".pth", ".safetensors", ".onnx")  # of files, which no name on the hub ends with
PLACEHOLDER = r"(label|class)?[ _]?\d*"
NAMED = 12  # keys that an error lists before it only counts


@dataclass(frozen=True)
class Row:
    """What became of one weight of the checkpoint."""

    key: str
    targets: tuple[str, ...]  # names in the network; none where the weight is not needed or left over
    note: str  # "used", "renamed", "split", or "not needed: ..." or "left over"

    def __str__(self) -> str:
        return f"{self.key} -> {', '.join(self.targets) or '-'} ({self.note})"


def import_checkpoint(
    file: Path,
    network: str | None,
    classes: ClassList,
    folder: Path,
    native_size: tuple[int, int],
    scale: float = 1.0,
    renames: Renames = (),
    may_download: bool = False,
    any_names: bool = False,
    output: str | None = None,
) -> Bundle:
    """Writes the bundle ``folder`` from the checkpoint ``file``, with a report and a model card.

    Args:
        file: .safetensors, or a .pth that torch reads without running code; or a folder of the hub's; or .onnx.
        network: a name of `mmseg_names.ARCHITECTURES`; None to tell it from the weights, and for a folder, whose
            config.json says what it is, and an ONNX file.
        classes: must have as many classes as the checkpoint, and where that names them, of these names in this order.
        folder: must hold neither a bundle nor ``file`` nor what would be written over; its name becomes the bundle's.
        native_size: (H, W) of the frames it is meant for; other sizes work too.
        scale: low resolution over native resolution.
        renames: applied before the architecture's own.
        may_download: ``file`` may be a name on the hub.
        any_names: the checkpoint may call its classes otherwise.
        output: of an ONNX file that has several, the one with the logits.

    Raises:
        BundleError: an unknown network or none that can be told, an unreadable file, weights that are missing, left
            over, misshapen or not finite, a name on the hub that may not or cannot be downloaded, classes or a size
            that no bundle may have, or classes that the checkpoint calls otherwise.
    """
    if (folder / "model.yaml").exists():
        raise BundleError(f"{folder} holds a bundle already; remove it or give another name")
    bundle = Bundle(
        path=folder, name=folder.name, classes=classes, scale=scale, native_size=native_size,
        dense=NetworkSpec(ONNX, {}, "dense.onnx", ""), provenance={"version": __version__},
    )  # fmt: skip
    bundle.check()  # before anything is written
    if not file.exists() and re.fullmatch(HUB_NAME, str(file)) and file.suffix not in SUFFIXES:
        name = str(file)
        if not may_download:
            raise BundleError(
                f"no {name} here, and nothing is downloaded unasked; if it is a name on the hub, add --download"
            )
        file = download(name)
        bundle.provenance.update(hub=name, revision=file.name)
    onnx = file.suffix.lower() == ".onnx"
    if onnx and (network is not None or renames):
        what = "--renames" if network is None else f"--network {network}"
        raise BundleError(f"{file} is an ONNX file, which says what it is; leave {what} out")
    if output is not None and not onnx:
        raise BundleError(f"{file} is no ONNX file, of whose outputs one could be chosen; leave --output {output} out")
    if folder.resolve() in (file.resolve(), file.resolve().parent):  # whose card, or weights, it would write over
        raise BundleError(f"{folder} holds the checkpoint itself; give the bundle another name, or move {file.name}")
    there = [name for name in ("README.md", "dense.safetensors", "dense.onnx") if (folder / name).exists()]
    if there and not (folder / REPORT).exists():  # which an earlier try may have left
        raise BundleError(f"{folder} holds {there[0]} and no bundle; give another name, or move what is there")
    licence = find_licence(file) if file.exists() else ""
    if onnx:
        bundle, report, found = _import_onnx(file, bundle, output)
        licence = found or licence
    else:
        bundle, rows = _import_weights(file, network, bundle, renames, any_names)
        report = [str(row) for row in rows]
    bundle.provenance["licence"] = licence
    write_whole(folder / REPORT, "".join(f"{line}\n" for line in report).encode())
    write_import_card(bundle, REPORT)
    bundle.save()  # last: without its model.yaml the folder is no bundle, and the same command may be given again
    return bundle


def _import_onnx(file: Path, bundle: Bundle, output: str | None) -> tuple[Bundle, list[str], str]:
    """``bundle`` with the ONNX file in it, what was found, and the licence of its metadata."""
    wanted = low_resolution_size(bundle.native_size, bundle.scale)
    found = onnx_file.inspect(file, len(bundle.classes), wanted, output)
    size = tuple(found.args["size"] or wanted)
    if size != wanted:
        height, width = bundle.native_size
        raise BundleError(
            f"{file} takes images of {size[0]}x{size[1]} alone, but frames of {height}x{width} at scale "
            f"{bundle.scale:g} give {wanted[0]}x{wanted[1]}; give --native-size and --scale that fit, or export it "
            "with dynamic height and width"
        )
    onnx_file.save(found, bundle.path / "dense.onnx")
    spec = NetworkSpec(ONNX, found.args, "dense.onnx", _sha256(bundle.path / "dense.onnx"))
    bundle.provenance.update(
        imported_as=f"ONNX of opset {found.opset}", checkpoint=file.name, checkpoint_sha256=_sha256(file)
    )
    return replace(bundle, dense=spec), found.report, found.licence


def _import_weights(
    file: Path, network: str | None, bundle: Bundle, renames: Renames, any_names: bool
) -> tuple[Bundle, list[Row]]:
    """``bundle`` with the network that the checkpoint is for, and what became of each weight."""
    classes = bundle.classes
    source, file, (state, names), architecture = _read(file, network, len(classes), renames)
    if not any_names:
        check_names(names, classes, file)
    weights, rows = rename(state, architecture, renames)
    args = architecture.args(weights)

    def make() -> nn.Module:
        network: nn.Module = build(DENSE, architecture.network, len(classes), args)
        return network

    module = construct(make, args, weights, f"{file} as {source}")
    rows = fill(module, weights, rows, f"{file} as {source} with the {len(classes)} classes of {classes.name!r}")
    spec = save_network(bundle.path, module, architecture.network, args, "dense.safetensors")
    bundle.provenance.update(
        torch=str(torch.__version__), imported_as=source, checkpoint=file.name, checkpoint_sha256=_sha256(file)
    )
    return replace(bundle, dense=spec), rows


def _read(
    file: Path, network: str | None, num_classes: int, renames: Renames
) -> tuple[str, Path, Checkpoint, Architecture]:
    """What the checkpoint is called, the file with its weights, what is in it, and what to build for it."""
    if file.is_dir():
        if network is not None:
            raise BundleError(f"{file} is a folder, whose config.json says what it is; leave --network {network} out")
        source, architecture = read_architecture(file, num_classes)
        path, weights = read_weights(file)
        return source, path, Checkpoint(weights, class_names(file)), architecture
    if network is not None and network not in ARCHITECTURES:
        raise BundleError(f"unknown network {network!r}; choose one of {', '.join(ARCHITECTURES)}")
    found = read_checkpoint(file)
    name = network or detect(found.weights, renames)
    if name is None:
        beside = " its folder, whose config.json may say it, or" if (file.parent / "config.json").is_file() else ""
        raise BundleError(
            f"cannot tell from the weights of {file} ({', '.join(list(found.weights)[:3])}, ...) what network they are "
            f"for; give{beside} --network, one of {', '.join(ARCHITECTURES)}, or --renames where only names differ"
        )
    return name, file, found, ARCHITECTURES[name]


def check_names(theirs: Sequence[str], classes: ClassList, file: Path) -> None:
    """BundleError where a checkpoint calls its classes otherwise than ``classes``: their order may be another.

    Capitals and punctuation do not count, nor do the numbers that stand where nobody gave names.
    """
    if len(theirs) != len(classes) or all(re.fullmatch(PLACEHOLDER, name, re.IGNORECASE) for name in theirs):
        return  # another number is told by the shapes of the weights
    ours = classes.names
    differ = [i for i, name in enumerate(theirs) if _letters(name) != _letters(ours[i])]
    if differ:
        listed = ", ".join(f"{i} is {theirs[i]!r}, here {ours[i]!r}" for i in differ[:NAMED])
        more = f" and {len(differ) - NAMED} more" if len(differ) > NAMED else ""
        raise BundleError(
            f"{file} calls its classes otherwise than {classes.name!r}: {listed}{more}; give --classes a list of its "
            "classes in its order, or add --any-names where they mean the same"
        )


def _letters(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())


def detect(state: Mapping[str, Tensor], renames: Renames = ()) -> str | None:
    """What the weights are for, by the network's blocks: a name in `mmseg_names.ARCHITECTURES`; None if unknown."""
    weights = {_substitute(key, renames): tensor for key, tensor in state.items()}
    offsets = any(key.startswith(OFFSET_PREFIX) for key in weights)
    for family, (pattern, sizes) in BLOCKS.items():
        inputs = [tensor.shape[1] for key, tensor in weights.items() if re.fullmatch(pattern, key) and tensor.ndim > 1]
        if inputs and (size := sizes.get((min(inputs), len(inputs)))):
            return f"{family}-ol-{size}" if offsets and family != "offseg" else f"{family}-{size}"
    return None


def read_renames(file: Path) -> Renames:
    """Pairs [regular expression, replacement] from a YAML list; BundleError where it is none."""
    try:
        pairs = load_yaml(file)
        renames = tuple((pattern, replacement) for pattern, replacement in pairs)
        for pattern, replacement in renames:
            if not isinstance(pattern, str) or not isinstance(replacement, str):
                raise ValueError(f"{[pattern, replacement]} are not two texts, which stand in quotes")
            re.compile(pattern)
    except (OSError, TypeError, ValueError, re.error) as error:
        raise BundleError(
            f"cannot use renames {file}: {error}; it must be a list of [regular expression, replacement]"
        ) from error
    return renames


def rename(
    state: Mapping[str, Tensor], architecture: Architecture, renames: Renames = ()
) -> tuple[dict[str, Tensor], list[Row]]:
    """The weights under the network's names, and what became of each; BundleError where two take one name."""
    weights: dict[str, Tensor] = {}
    rows = []
    for key, tensor in state.items():
        name = _substitute(key, renames)
        reason = next((why for pattern, why in architecture.unneeded if re.search(pattern, name)), None)
        if reason is not None:
            rows.append(Row(key, (), f"not needed: {reason}"))
            continue
        targets: tuple[str, ...] = (_substitute(name, architecture.renames),)
        for pattern, parts in architecture.splits:
            if match := re.fullmatch(pattern, targets[0]):
                targets = tuple(match.expand(part) for part in parts)
        if len(targets) > 1 and (tensor.ndim == 0 or len(tensor) % len(targets)):
            raise BundleError(f"weight {key!r} of shape {tuple(tensor.shape)} cannot be split into {len(targets)}")
        for target, part in zip(targets, tensor.chunk(len(targets)) if len(targets) > 1 else (tensor,), strict=True):
            if target in weights:
                raise BundleError(f"two weights become {target!r}, one of them {key!r}; correct the renames")
            weights[target] = part
        rows.append(Row(key, targets, "split" if len(targets) > 1 else "used" if targets[0] == key else "renamed"))
    return weights, rows


def fill(module: nn.Module, weights: Mapping[str, Tensor], rows: Sequence[Row], what: str) -> list[Row]:
    """Loads ``weights`` into ``module`` and returns ``rows`` as they turned out.

    Shapes may differ in dimensions of size 1, as between a linear layer and a 1x1 convolution. Counters of batch
    normalisation may be absent. Raises BundleError, naming ``what`` and the keys, for anything else.
    """
    wanted = module.state_dict()
    rows = [row if set(row.targets) <= wanted.keys() else Row(row.key, (), "left over") for row in rows]
    left_over = [row.key for row in rows if row.note == "left over"]
    missing = [key for key in wanted if key not in weights and not key.endswith("num_batches_tracked")]
    if left_over or missing:
        raise BundleError(
            f"{what}: {_count(left_over, 'left over')}; {_count(missing, 'missing')}. If only names differ, give "
            "[regular expression, replacement] pairs from the first to the second in a file with --renames"
        )
    for key, tensor in weights.items():
        ours = wanted[key]
        if [n for n in ours.shape if n > 1] != [n for n in tensor.shape if n > 1]:
            raise BundleError(
                f"{what}: weight {key!r} has shape {tuple(tensor.shape)}, needed is {tuple(ours.shape)}; "
                "check the network's size and the number of classes"
            )
        if not tensor.to(ours.dtype).isfinite().all():
            raise BundleError(f"{what}: weight {key!r} has values that are not finite; its training diverged")
        wanted[key] = tensor.reshape(ours.shape).to(ours.dtype)
    module.load_state_dict(wanted)
    return rows


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _substitute(name: str, renames: Renames) -> str:
    for pattern, replacement in renames:
        try:
            name = re.sub(pattern, replacement, name)
        except (re.error, IndexError) as error:  # a group that the pattern does not have
            raise BundleError(
                f"cannot rename {name!r} by {[pattern, replacement]}: {error}; correct the renames"
            ) from error
    return name


def _count(keys: Sequence[str], state: str) -> str:
    listed = ", ".join(keys[:NAMED]) + (f" and {len(keys) - NAMED} more" if len(keys) > NAMED else "")
    return f"{len(keys)} weights {state}" + (f" ({listed})" if keys else "")
