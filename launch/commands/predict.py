"""`zeta predict`: name the classes of images."""

from __future__ import annotations

import argparse
import sys

from launch.arguments import (
    Subparsers,
    add_command,
    add_evaluation_ranks,
    add_export,
    add_images,
    add_size,
    output_path,
    positive_int,
)


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "predict",
        run,
        "name the most probable classes of images, as text, CSV or JSON lines",
        "zeta predict exports/first pictures --out predictions.csv",
    )
    add_export(parser)
    add_images(parser)
    parser.add_argument(
        "--top", type=positive_int, default=5, metavar="K", help="classes an image (default: 5)"
    )
    parser.add_argument(
        "--out",
        type=output_path,
        metavar="FILE",
        help="file to write: .csv, .jsonl or .txt (default: the terminal)",
    )
    parser.add_argument(
        "--format",
        choices=("text", "csv", "jsonl"),
        help="format of the lines (default: as the name of FILE says, else text)",
    )
    parser.add_argument(
        "--classes",
        type=_names,
        metavar="NAMES",
        help="for image-text models: comma-separated names to choose from",
    )
    parser.add_argument(
        "--template",
        action="append",
        metavar="TEXT",
        help="for image-text models: a prompt with {} for the name of the class; several are "
        "averaged (default: 'a photo of a {}')",
    )
    add_size(parser)
    add_evaluation_ranks(parser)


def run(args: argparse.Namespace) -> int:
    """Predict, and write the predictions."""
    from launch.evaluate.images import are_shards, as_shards
    from launch.evaluate.predict import Question, check_question, predict_images
    from launch.evaluate.prediction_files import FORMATS, format_of
    from launch.evaluate.zero_shot import TEMPLATES
    from launch.filesystems import check_place
    from launch.run.evaluation_ranks import evaluation_world, has_ranks_to_start, start_ranks
    from zeta.files import write_whole

    write = FORMATS[format_of(args.format, args.out)]
    if args.out is not None:
        check_place(args.out, "--out")
    question = Question(
        args.export,
        args.resolution,
        args.tokens,
        top=args.top,
        classes=args.classes,
        templates=tuple(args.template or TEMPLATES),
        workers=args.workers,
    )
    check_question(question)
    are_shards(args.images)
    if has_ranks_to_start(args.nproc):
        return start_ranks(args.nproc)
    with (
        evaluation_world() as world,
        as_shards(args.images, world, labels=False, workers=args.workers) as images,
    ):
        predictions = predict_images(question, images, world)
        if not world.is_main:
            return 0
    # Names of files may hold bytes that are no text.
    content = write(predictions).encode("utf-8", "surrogateescape")
    failed = sum(each.error is not None for each in predictions)
    if failed:
        print(f"{failed:,} of {len(predictions):,} images could not be used", file=sys.stderr)
    if args.out is None:
        sys.stdout.write(content.decode("utf-8", "replace"))
        return 0
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with write_whole(args.out) as stream:
        stream.write(content)
    print(f"wrote {args.out}, predictions of {len(predictions):,} images")
    return 0


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("it is empty; give names, as in cat,dog")
    return names
