"""Somebody's own dense segmenter as an ONNX file, to a bundle: it is looked at, run, and copied as one file.

Shape shorthand: B images, K classes, h, w low resolution, h', w' size of the logits.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparserefine_ros.errors import BundleError, ParameterError
from sparserefine_ros.segmenter.onnx_session import onnxruntime
from sparserefine_ros.whole_files import write_whole

TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16"}
DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")  # of operators that ONNX Runtime brings
MAX_BYTES = 2**31 - 1  # of a protocol buffer
CLOSE = 1e-3  # of the largest logit: what one file may differ by from run to run, or between numbers of images


@dataclass(frozen=True)
class OnnxFile:
    """What `inspect` found."""

    model: Any  # onnx.ModelProto, its weights inside
    args: dict[str, Any]  # input, output, dtype, size [h, w] or None, one_image: what runs it needs to know
    logits: tuple[int, int]  # (h', w') for images of the size that it was run at
    baked: bool  # it calls its sizes dynamic, and fails or errs at others than that
    opset: int
    licence: str  # of its metadata; empty where there is none

    @property
    def report(self) -> list[str]:
        """One line a fact."""
        size = "x".join(map(str, self.args["size"])) if self.args["size"] else "any size"
        size += " (its graph has that size in it: others fail or come out wrong)" if self.baked else ""
        return [
            f"input {self.args['input']}: normalised images {self.args['dtype']}, {size}, "
            + ("one at a time" if self.args["one_image"] else "any number"),
            f"output {self.args['output']}: logits of {self.logits[0]}x{self.logits[1]}, resized to the images' size",
            f"opset {self.opset}, {len(self.model.graph.node)} operators",
        ]


def inspect(file: Path, num_classes: int, size: tuple[int, int], output: str | None = None) -> OnnxFile:
    """Reads ``file``, weights beside it included, and runs it on noise of ``size`` (h, w), or of its own fixed size.

    ``output`` names the one that is meant, of several. Raises BundleError, saying how to export it instead, where it
    is unreadable, is no segmenter of ``num_classes`` classes, was exported while training, gives class ids or
    probabilities in place of logits, or has several outputs that may be meant.
    """
    onnx, runtime = _packages()
    try:
        model = onnx.load(file)
        if model.ByteSize() > MAX_BYTES:
            raise BundleError(f"{file} has more than 2 GB of weights, which one file cannot hold")
        onnx.checker.check_model(model)
    except BundleError:
        raise
    except Exception as error:  # the parser's, the checker's and the system's
        raise BundleError(f"cannot read {file}: {_first_line(error)}; give a whole ONNX file") from error
    own = {function.domain for function in model.functions}  # as torch's exporter wrote for a while; the runtime knows
    if foreign := sorted({node.domain for node in model.graph.node} - own - set(DOMAINS)):
        raise BundleError(f"{file} has operators of {', '.join(foreign)}; export it with standard operators alone")
    try:
        session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base of their own
        raise BundleError(f"onnxruntime {runtime.__version__} cannot run {file}: {_first_line(error)}") from error
    images = _images(file, session, size)
    output, logits = _logits(file, session, images, num_classes, output)
    given = session.get_inputs()[0]
    fixed = [isinstance(n, int) for n in given.shape]
    named = fixed[2] or fixed[3]
    baked = not named and not _takes_other_sizes(session, output, images, logits)
    args = {
        "input": given.name, "output": output, "dtype": TYPES[given.type],
        "size": list(images.shape[2:]) if named or baked else None,
        "one_image": fixed[0] or not _takes_two(session, output, images, logits),
    }  # fmt: skip
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    metadata = {entry.key.lower(): entry.value for entry in model.metadata_props}
    licence = metadata.get("license") or metadata.get("licence") or ""
    return OnnxFile(model, args, (logits.shape[2], logits.shape[3]), baked, opset, licence)


def save(found: OnnxFile, path: Path) -> None:
    """Writes it as one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    graph = found.model.graph
    for holder in (found.model, graph, *graph.node):
        with suppress(AttributeError):  # in onnx before 1.16 nodes have no remarks
            for remark in [entry for entry in holder.metadata_props if entry.key == "location"]:
                holder.metadata_props.remove(remark)  # it would be taken for the name of a file of weights
    write_whole(path, found.model.SerializeToString())


def _images(file: Path, session: Any, size: tuple[int, int]) -> np.ndarray:
    """Noise [1, 3, h, w] in the form that the file's only input asks for."""
    inputs = session.get_inputs()
    described = ", ".join(f"{i.name} {i.type} {i.shape}" for i in inputs)
    wanted = "one input of normalised images, float32 or float16 [B, 3, h, w]"
    if len(inputs) != 1 or inputs[0].type not in TYPES or len(inputs[0].shape) != 4:
        raise BundleError(f"{file} has inputs {described}; export it with {wanted}")
    batch, channels, height, width = inputs[0].shape
    if (isinstance(channels, int) and channels != 3) or (isinstance(batch, int) and batch != 1):
        raise BundleError(f"{file} has inputs {described}; export it with {wanted}, B being 1 or dynamic")
    height, width = (n if isinstance(n, int) else other for n, other in zip((height, width), size, strict=True))
    return _noise(1, (height, width), TYPES[inputs[0].type])


def _logits(
    file: Path, session: Any, images: np.ndarray, num_classes: int, wanted_output: str | None
) -> tuple[str, np.ndarray]:
    """The output that is [1, K, h', w'] of ``num_classes`` classes: its name and its values."""
    outputs = session.get_outputs()
    if wanted_output is not None and wanted_output not in [output.name for output in outputs]:
        names = ", ".join(output.name for output in outputs)
        raise BundleError(f"{file} has no output {wanted_output!r}; --output is one of {names}")
    try:
        arrays = _run(session, None, images)
        again = _run(session, None, images)
    except Exception as error:
        height, width = images.shape[2:]
        raise BundleError(
            f"{file} fails on images of {height}x{width}: {_first_line(error)}; choose --native-size and --scale so "
            "that it gets a size it takes"
        ) from error
    described = ", ".join(f"{o.name} {a.dtype} {list(a.shape)}" for o, a in zip(outputs, arrays, strict=True))
    wanted = f"logits [B, {num_classes}, h, w] of the {num_classes} classes of --classes"
    fitting = [
        (output, values, repeated)
        for output, values, repeated in zip(outputs, arrays, again, strict=True)
        if values.ndim == 4 and values.shape[1] == num_classes and len(values) == 1
        if wanted_output in (None, output.name)
    ]
    if len(fitting) > 1:
        raise BundleError(
            f"{file} has outputs {described}, and more than one may be meant, as where auxiliary heads were exported; "
            f"name it with --output {' or '.join(output.name for output, *_ in fitting)}"
        )
    for output, values, repeated in fitting:
        if values.dtype != images.dtype:
            raise BundleError(
                f"{file} takes images of {images.dtype} and gives {described}; give both one number format (converters "
                "to float16 have an option keep_io_types)"
            )
        if not np.isfinite(values).all():
            raise BundleError(f"{file} gives values that are not finite; check its weights")
        if not np.allclose(values, repeated, atol=CLOSE * float(np.abs(values).max())):
            raise BundleError(f"{file} gives other logits every time; export it for inference, without anything random")
        if values.min() >= 0:
            raise BundleError(
                f"{file} gives probabilities: no value of output {output.name} is negative; export it without its "
                "softmax or sigmoid, a softmax is done here"
            )
        return output.name, values
    ids = any(np.issubdtype(array.dtype, np.integer) for array in arrays)
    hint = "class ids are no logits, export it without its argmax" if ids else f"wanted are {wanted}"
    raise BundleError(f"{file} has outputs {described}, images being {images.dtype}: {hint}")


def _takes_two(session: Any, output: str, images: np.ndarray, logits: np.ndarray) -> bool:
    """Whether two images give what each gives alone; exporters write batch sizes into graphs that they call dynamic."""
    try:
        both = _run(session, [output], np.concatenate([images[:, :, ::-1], images]))[0]
    except Exception:  # whatever a runtime says
        return False
    tolerance = CLOSE * float(np.abs(logits).max())
    return both.shape == (2, *logits.shape[1:]) and bool(np.allclose(both[1:], logits, atol=tolerance))


def _takes_other_sizes(session: Any, output: str, images: np.ndarray, logits: np.ndarray) -> bool:
    """Whether images of other sizes give logits that follow; exporters write sizes, too, into such graphs.

    Multiples of 32 more or less, which every stride of a segmenter divides where it divides the size that is wanted.
    """
    height, width = images.shape[2:]
    half = tuple(max(64, round(n / 64) * 32) for n in (height, width))
    for size in (half, (height + 32, width + 64)):
        try:
            other = _run(session, [output], _noise(1, size, images.dtype))[0]
        except Exception:  # whatever a runtime says
            return False
        ratio = [n * now / before for n, now, before in zip(logits.shape[2:], size, (height, width), strict=True)]
        if any(abs(n - expected) > 1 for n, expected in zip(other.shape[2:], ratio, strict=True)):
            return False
    return True


def _noise(count: int, size: tuple[int, ...], dtype: Any) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, *size)).astype(dtype)


def _run(session: Any, outputs: list[str] | None, images: np.ndarray) -> list[np.ndarray]:
    arrays: list[np.ndarray] = session.run(outputs, {session.get_inputs()[0].name: images})
    return arrays


def _packages() -> tuple[Any, Any]:
    """onnx and onnxruntime."""
    try:
        name = "onnx"
        import onnx

        name = "onnxruntime"
        return onnx, onnxruntime()
    except (ImportError, ParameterError) as error:
        raise BundleError(f"an ONNX file needs the package {name}: pip install onnx onnxruntime ({error})") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
