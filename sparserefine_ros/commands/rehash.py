"""`sparserefine rehash`: a bundle's hashes after its weights were changed on purpose."""

from __future__ import annotations

import argparse

HELP = "write the SHA-256 of a bundle's weights into its model.yaml, after you changed them yourself"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="bundle: a folder or a name under models/")


def run(args: argparse.Namespace) -> int:
    import numpy as np

    from sparserefine_ros.segmenter.bundle import Bundle, find_bundle
    from sparserefine_ros.segmenter.bundle_files import rehash
    from sparserefine_ros.segmenter.segmenter import Segmenter

    path = find_bundle(args.model)
    changed = rehash(path)
    bundle = Bundle.load(path)
    # What does not fit, or does not run, is told now and not by the node.
    Segmenter(bundle, "cpu").segment([np.zeros((*bundle.native_size, 3), np.uint8)])
    said = f"new sha256 of {', '.join(changed)}" if changed else "every sha256 is right"
    print(f"{path / 'model.yaml'}: {said}")
    return 0
