"""`sparserefine train`: a recipe to a bundle."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from sparserefine_ros.commands.arguments import check_threads, parse_path

HELP = "train the networks of a bundle from a recipe: dense segmenter, threshold, refiner"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=parse_path, help="a file like config/train/camvid.yaml")
    parser.add_argument("--data", type=parse_path, help="folder of the data set, where the recipe needs one")
    parser.add_argument("--runs", type=parse_path, default=Path("runs"), help="checkpoints and logs (default: runs)")
    parser.add_argument(
        "--models", type=parse_path, default=Path("models"), help="where the bundle goes (default: models)"
    )
    parser.add_argument("--seed", type=int, help="in place of the recipe's; run and bundle are then called NAME-seedN")
    parser.add_argument("--no-refiner", action="store_true", help="leave the refiner out")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")
    parser.add_argument("--threads", type=int, help="CPU threads for torch (default: all cores)")


def run(args: argparse.Namespace) -> int:
    import cv2
    import torch

    from sparserefine_ros.evaluation import files
    from sparserefine_ros.segmenter.segmenter import pick_device
    from sparserefine_ros.training.bundle import train_bundle
    from sparserefine_ros.training.recipe import Recipe

    check_threads(args.threads)
    cv2.setNumThreads(1)  # batches are drawn in a pool of threads already
    if args.threads:
        torch.set_num_threads(args.threads)
    recipe = Recipe.load(args.recipe)
    if args.seed is not None:
        recipe = replace(recipe, name=f"{recipe.name}-seed{args.seed}", seed=args.seed)
    if args.no_refiner:
        recipe = replace(recipe, refiner=None, ensembler=None)
    files.check_folder(args.models / recipe.name)
    bundle = train_bundle(
        recipe, args.data, args.runs / recipe.name, args.models / recipe.name, pick_device(args.device)
    )
    print(f"wrote {bundle.path}; its accuracy and cost: sparserefine bench bundle {bundle.path}")
    return 0
