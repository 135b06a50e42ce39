"""`zeta embed`: write features of images as arrays."""

from __future__ import annotations

import argparse
import json

from launch.arguments import (
    Subparsers,
    add_command,
    add_evaluation_ranks,
    add_export,
    add_images,
    add_json,
    add_size,
    output_path,
)


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "embed",
        run,
        "write the features of images as features.npy, with keys.txt and labels.npy",
        "zeta embed exports/first photos features/photos",
    )
    add_export(parser)
    add_images(parser)
    parser.add_argument("out", metavar="OUT", type=output_path, help="new folder")
    add_size(parser)
    add_evaluation_ranks(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Embed, and print where the features are."""
    from launch.evaluate.embed import check_embed, check_out, embed_shards
    from launch.evaluate.images import are_shards, as_shards
    from launch.run.evaluation_ranks import evaluation_world, has_ranks_to_start, start_ranks

    check_out(args.export, args.out)
    in_shards = are_shards(args.images)
    if has_ranks_to_start(args.nproc):
        if in_shards:
            check_embed(args.export, args.images, args.out, args.resolution, args.tokens)
        return start_ranks(args.nproc)
    with (
        evaluation_world() as world,
        as_shards(args.images, world, labels=True, workers=args.workers) as images,
    ):
        facts = embed_shards(
            args.export,
            images.shards,
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
    shape = f"{facts['images']} x {facts['dim']}"
    print(f"wrote {args.out / 'features.npy'}, {shape} (images x channels){left_out}")
    return 0
