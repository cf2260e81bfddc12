"""A model of the Hugging Face hub to a folder on this machine, when it is asked for and not before."""

from __future__ import annotations

from pathlib import Path

from sparserefine_ros.errors import BundleError
from sparserefine_ros.segmenter.hub_names import WEIGHTS

FILES = ("config.json", "preprocessor_config.json", WEIGHTS, "README.md", "LICENSE*", "COPYING*")
"""All that is fetched: what an import reads, and the terms."""


def download(name: str) -> Path:
    """The folder with FILES of the model ``name`` ("owner/model"), in the hub's own cache; shows how far it is.

    The folder is called as the commit that it holds. Raises BundleError where it cannot be had.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise BundleError(
            f"--download needs the package huggingface_hub: pip install huggingface_hub ({error})"
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as error:  # of the hub, of the network and of the system; no base in common
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BundleError(
            f"cannot download {name}: {first}; check its name and the network (models that ask for consent need "
            "`hf auth login` first), or give a folder"
        ) from error
