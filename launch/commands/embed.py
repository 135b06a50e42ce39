"""`zeta embed`: write features of images as arrays."""

from __future__ import annotations

import argparse
import json

from launch.arguments import (
    Subparsers,
    add_command,
    add_evaluation_ranks,
    add_json,
    input_path,
    output_path,
    positive_int,
)


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "embed",
        run,
        "write the features of all images of shards as features.npy, with keys.txt and labels.npy",
        "zeta embed exports/first shards/photos/val features/val",
    )
    parser.add_argument("export", metavar="EXPORT", type=input_path, help="folder from zeta export")
    parser.add_argument("shards", metavar="SHARDS", nargs="+", help="as for data.shards")
    parser.add_argument("out", metavar="OUT", type=output_path, help="new folder")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--resolution",
        default="native",
        help="native, or a side s in pixels, for the area s*s (default: native)",
    )
    size.add_argument(
        "--tokens", type=positive_int, metavar="N", help="shrink larger images to N patches"
    )
    add_evaluation_ranks(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Embed, and print where the features are."""
    from launch.evaluate.embed import check_embed, embed_shards
    from launch.run.evaluation_ranks import evaluation_world, has_ranks_to_start, start_ranks

    if has_ranks_to_start(args.nproc):
        check_embed(args.export, args.shards, args.out, args.resolution, args.tokens)
        return start_ranks(args.nproc)
    with evaluation_world() as world:
        facts = embed_shards(
            args.export,
            args.shards,
            args.out,
            world,
            resolution=args.resolution,
            tokens=args.tokens,
            workers=args.workers,
        )
        if not world.is_main:
            return 0
    if args.json:
        print(json.dumps(facts))
        return 0
    left_out = ""
    if facts["rejected"]:
        left_out = f"; {facts['rejected']:,} left out, see {args.out / 'rejected.jsonl'}"
    print(f"{args.out}: features of {facts['images']:,} images, {facts['dim']} each{left_out}")
    return 0
