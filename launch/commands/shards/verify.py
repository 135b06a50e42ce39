"""`zeta shards verify`: decode every image, and list the bad ones."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from launch import errors
from launch.arguments import Subparsers, add_command, add_json, add_shards, add_workers


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "verify",
        run,
        "compare checksums and decode every image of shards, and list the bad ones; exit status 1 "
        "if there are any",
        "zeta shards verify shards/photos",
    )
    add_shards(parser)
    add_workers(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print shard, key and reason of each bad sample."""
    from data_pipeline.shards.unread import unread_lines
    from data_pipeline.verify import verify_shards

    result = verify_shards(args.shards, workers=args.workers, progress=not args.json)
    if args.json:
        numbers = {
            "shards": result.shards,
            "samples": result.samples,
            "unchecked": result.unchecked,
        }
        lists = {
            "bad": [bad._asdict() for bad in result.bad],
            "unread": [asdict(unread) for unread in result.unread],
        }
        print(json.dumps(numbers | lists))
    else:
        for bad in result.bad:
            print(f"{bad.shard}\t{bad.key or '(the shard)'}\t{bad.reason}")
        for line in unread_lines(result.unread):
            print(line)
        print(f"{result.samples:,} samples in {result.shards:,} shards, {len(result.bad):,} faults")
        if result.unchecked:
            print(
                f"{result.unchecked:,} samples have no checksum in the index, so that damage which "
                "still decodes is not seen: `zeta shards index SHARDS` adds them while the shards "
                "are good"
            )
    return errors.FAILED if result.bad else 0
