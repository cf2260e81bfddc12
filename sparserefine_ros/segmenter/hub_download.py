"""A model of the Hugging Face hub to a folder on this machine, when it is asked for and not before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparserefine_ros.errors import BundleError
from sparserefine_ros.segmenter.hub_names import INDEX, WEIGHTS

FILES = ("config.json", "preprocessor_config.json", "README.md", "LICENSE*", "COPYING*")
"""All that is fetched, beside the weights: what an import reads, and the terms."""


def download(name: str) -> Path:
    """The folder with FILES of the model ``name`` ("owner/model"), in the hub's own cache; shows how far it is.

    The folder is called as the commit that it holds. Raises BundleError where it cannot be had.
    """
    try:
        from huggingface_hub import list_repo_files, snapshot_download
    except ImportError as error:
        raise BundleError(
            f"--download needs the package huggingface_hub: pip install huggingface_hub ({error})"
        ) from error
    try:
        there = list_repo_files(name)
    except Exception:  # without a network the hub's cache may have it all the same
        there = [WEIGHTS[0]]
    try:
        return Path(snapshot_download(name, allow_patterns=[*FILES, *_weights(there)]))
    except Exception as error:  # of the hub, of the network and of the system; no base in common
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BundleError(
            f"cannot download {name}: {first}; check its name and the network (models that ask for consent need "
            "`hf auth login` first), or give a folder"
        ) from error


def _weights(there: Sequence[str]) -> tuple[str, ...]:
    """Patterns of the files of weights to fetch of those that are ``there``: of one form, as many publish several."""
    for name in WEIGHTS:
        if name in there:
            return (name,)
        if name + INDEX in there:
            stem, ending = name.rsplit(".", 1)
            return (name + INDEX, f"{stem}-*.{ending}")
    return ()
