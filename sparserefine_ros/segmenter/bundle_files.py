"""The files of a bundle: what is read of them is what was saved.

Nothing of a file of weights is parsed before its hash is found to be the one in ``model.yaml``. That tells damage and
mixed-up files; it is no signature: who can write the weights can write ``model.yaml`` too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sparserefine_ros.errors import BundleError
from sparserefine_ros.untrusted import beside, load_yaml
from sparserefine_ros.whole_files import write_whole

FORMAT = 1


def read_model_yaml(file: Path) -> dict[str, Any]:
    """The mapping in ``file``, of our format; BundleError otherwise."""
    try:
        data = load_yaml(file)
    except (OSError, ValueError) as error:
        raise BundleError(f"cannot read {file}: {error}; restore the bundle") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise BundleError(f"{file} has format {found!r:.80}, this version reads format {FORMAT}; rebuild the bundle")
    return data


def write_model_yaml(file: Path, data: Mapping[str, Any]) -> None:
    """Writes ``data`` with every value written out, as ``read_model_yaml`` wants it."""
    text = yaml.dump(data, Dumper=_Plain, sort_keys=False, default_flow_style=None, width=110)
    write_whole(file, text.encode())


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def read_weights(path: Path, name: str, sha256: str) -> bytes:
    """The bytes of the file ``name`` in the bundle folder ``path``; BundleError where their hash is not ``sha256``."""
    content = _read(path, name)
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise BundleError(
            f"weights {path / name} have sha256 {found}, but {path / 'model.yaml'} says {sha256}; "
            f"restore the bundle, or if you changed the weights yourself: sparserefine rehash {path}"
        )
    return content


def rehash(path: Path) -> list[str]:
    """Writes the weights' hashes into ``path``'s ``model.yaml``, after a deliberate edit; the names of those changed.

    Comments in ``model.yaml`` are lost. Raises BundleError where the file is broken or weights are missing.
    """
    file = path / "model.yaml"
    data = read_model_yaml(file)
    changed = []
    for key in ("dense", "refiner", "native"):
        spec = data.get(key)
        if isinstance(spec, dict):
            found = hashlib.sha256(_read(path, spec.get("weights"))).hexdigest()
            if spec.get("sha256") != found:
                changed.append(str(spec["weights"]))
                spec["sha256"] = found
    if changed:
        write_model_yaml(file, data)
    return changed


def _read(path: Path, name: Any) -> bytes:
    try:
        return beside(path / "model.yaml", name).read_bytes()
    except FileNotFoundError as error:
        raise BundleError(f"weights {path / name} are missing; restore the bundle") from error
    except (OSError, ValueError) as error:
        raise BundleError(f"{path / 'model.yaml'}: weights {error}") from error
