"""`zeta eval`: measure the accuracy of an export on labelled images."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from launch.arguments import (
    Subparsers,
    add_command,
    add_evaluation_ranks,
    add_export,
    add_images,
    add_json,
    output_path,
)


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "eval",
        run,
        "measure top-1 and top-5 of an export on labelled images, by size, class and aspect ratio",
        "zeta eval exports/first shards/photos/val --resolutions train,native,128",
    )
    add_export(parser)
    add_images(parser)
    parser.add_argument(
        "--resolutions",
        help="comma-separated sizes: train (as val/top1 of the run), native (each image its own), "
        "or a side s in pixels, for the area s*s (default: train)",
    )
    parser.add_argument(
        "--tokens",
        default="",
        help="comma-separated token budgets: larger images are shrunk to this number of patches, "
        "as by train.evaluate.tokens",
    )
    parser.add_argument(
        "--knn",
        nargs="+",
        metavar="IMAGES",
        help="also classify by the most similar of these images (k-NN on features)",
    )
    parser.add_argument(
        "--probe",
        nargs="+",
        metavar="IMAGES",
        help="also fit a linear classifier on the features of these images",
    )
    parser.add_argument(
        "--template",
        action="append",
        metavar="TEXT",
        help="for image-text models: a prompt with {} for the name of the class; several are "
        "averaged (default: 'a photo of a {}')",
    )
    parser.add_argument(
        "--csv", type=output_path, metavar="FILE", help="write all scores as a table"
    )
    parser.add_argument(
        "--plot", type=output_path, metavar="FILE", help="draw the scores: .png, .svg or .pdf"
    )
    parser.add_argument(
        "--per-image",
        type=output_path,
        metavar="FILE",
        help="write a CSV with every image, its class, the predicted class and the scores, at the "
        "first size",
    )
    parser.add_argument(
        "--confusion",
        type=output_path,
        metavar="FILE",
        help="write the confusion matrix at the first size: .csv, .png, .svg or .pdf",
    )
    add_evaluation_ranks(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate, and print the scores."""
    from launch.evaluate.files import plot, prepare_files, write_csv
    from launch.evaluate.images import are_shards, as_shards
    from launch.evaluate.per_image import confusion_matrix, write_confusion, write_per_image
    from launch.evaluate.requests import Request, check_rows, prepare
    from launch.evaluate.scores import run_evaluation
    from launch.evaluate.zero_shot import TEMPLATES
    from launch.run.evaluation_ranks import evaluation_world, has_ranks_to_start, start_ranks
    from launch.tables import accuracy_table
    from zeta.models.sources import read_image_config

    tokens = [_budget(text) for text in _listed(args.tokens)]
    if args.resolutions is None:
        resolutions = [] if tokens else ["train"]
    else:
        resolutions = _listed(args.resolutions)
        if not resolutions:
            raise ValueError("--resolutions is empty; give sizes, as in train,native,128")
    prepare_files(args.csv, args.plot, args.per_image, args.confusion)
    read_image_config(args.export)  # before images are copied
    sources = {"shards": args.images, "knn": args.knn, "probe": args.probe}
    sources = {name: given for name, given in sources.items() if given is not None}
    in_shards = all(list(map(are_shards, sources.values())))
    request = Request(
        args.export,
        args.images,
        resolutions,
        tokens,
        knn=args.knn,
        probe=args.probe,
        templates=tuple(args.template or TEMPLATES),
        workers=args.workers,
    )
    if has_ranks_to_start(args.nproc):
        if in_shards:
            prepare(request)
        return start_ranks(args.nproc)
    kept: dict[str, Any] = {}
    with evaluation_world() as world, ExitStack() as stack:
        opened = {
            name: stack.enter_context(as_shards(given, world, labels=True, workers=args.workers))
            for name, given in sources.items()
        }
        shards = {name: images.shards for name, images in opened.items()}
        prepared = prepare(
            replace(
                request,
                shards=shards["shards"],
                knn=shards.get("knn"),
                probe=shards.get("probe"),
            )
        )
        wants_rows = args.per_image is not None or args.confusion is not None
        if wants_rows:
            check_rows(prepared, confusion=args.confusion is not None)
        if prepared.warning is not None and world.is_main:
            print(prepared.warning, file=sys.stderr)
        result = run_evaluation(prepared, world, kept.update if wants_rows else None)
        if not world.is_main:
            return 0
    names = prepared.class_names
    if args.csv is not None:
        write_csv(args.csv, result)
    if args.plot is not None:
        plot(args.plot, result)
    if args.per_image is not None:
        write_per_image(args.per_image, kept, names, opened["shards"].files)
    if args.confusion is not None:
        write_confusion(args.confusion, confusion_matrix(kept, len(names)), names)
    if args.json:
        print(json.dumps(result))
        return 0
    print("\n".join(accuracy_table(result)))
    return 0


def _listed(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _budget(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--tokens has {text!r}; give numbers of patches, as in 64,256")
    return int(text)
