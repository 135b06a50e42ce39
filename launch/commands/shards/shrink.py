"""`zeta shards shrink`: the same shards with images of the size that is trained."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from launch import errors
from launch.arguments import (
    Subparsers,
    add_command,
    add_json,
    add_shards,
    add_workers,
    output_path,
    positive_int,
)

if TYPE_CHECKING:
    from data_pipeline.shards.images.smaller import Shrinking
    from data_pipeline.shards.shrinking.report import ShardReport


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "shrink",
        run,
        "write shards again with smaller images; exit status 1 if an image cannot be read",
        "zeta shards shrink shards/photos shards/photos-256 --max-side 256",
    )
    add_shards(parser)
    parser.add_argument("out", metavar="OUT", type=output_path, help="new folder for the shards")
    add_rule(parser, required=True)
    add_workers(parser)
    add_json(parser)


def add_rule(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Declare --max-side, --quality and --drop-unreadable, which `rule` reads."""
    parser.add_argument(
        "--max-side",
        type=positive_int,
        required=required,
        metavar="N",
        help="make JPEGs whose longest side is N pixels of all images that are larger",
    )
    parser.add_argument(
        "--quality", type=positive_int, metavar="Q", help="quality of these JPEGs (default: 90)"
    )
    parser.add_argument(
        "--drop-unreadable",
        action="store_true",
        help="leave out samples whose image cannot be read (default: they stay as they are)",
    )


def rule(args: argparse.Namespace) -> Shrinking | None:
    """Return the rule that the arguments give, None without --max-side; ValueError if bad."""
    if args.max_side is None:
        if args.quality is not None or args.drop_unreadable:
            raise ValueError("--quality and --drop-unreadable are for --max-side N: give it too")
        return None
    from data_pipeline.shards.images.smaller import Shrinking

    options = {} if args.quality is None else {"quality": args.quality}
    shrinking = Shrinking(args.max_side, drop_unreadable=args.drop_unreadable, **options)
    shrinking.check()
    return shrinking


def run(args: argparse.Namespace) -> int:
    """Write the shards, and say what became of their images."""
    from data_pipeline.shards.shrinking.shrink import shrink_shards

    shrinking = rule(args)
    assert shrinking is not None  # argparse requires it
    result = shrink_shards(
        args.shards, args.out, shrinking, workers=args.workers, progress=not args.json
    )
    numbers = summary(result.reports)
    if args.json:
        facts = {"shards": len(result.reports), "fingerprint": result.manifest.fingerprint}
        print(json.dumps(facts | numbers))
    else:
        say(numbers)
    return errors.FAILED if numbers["unreadable"] else 0


def summary(reports: Sequence[ShardReport]) -> dict[str, Any]:
    """Return the totals of reports, and the list of what cannot be read."""
    return {
        "images": sum(report.images for report in reports),
        "copies": sum(report.copies for report in reports),
        "bytes_before": sum(report.bytes_before for report in reports),
        "bytes_after": sum(report.bytes_after for report in reports),
        "unreadable": [
            {"shard": report.name, **line} for report in reports for line in report.unreadable
        ],
        "dropped": any(report.dropped for report in reports),
    }


def say(numbers: dict[str, Any]) -> None:
    """Print the totals; every sample that cannot be read is one line on stderr."""
    print(
        f"{numbers['copies']:,} of {numbers['images']:,} images made smaller: "
        f"{numbers['bytes_before'] / 1e6:,.1f} MB of images became "
        f"{numbers['bytes_after'] / 1e6:,.1f} MB"
    )
    for line in numbers["unreadable"]:
        print(f"{line['shard']}\t{line['key']}\t{line['reason']}", file=sys.stderr)
    if numbers["unreadable"]:
        what = "left out (--drop-unreadable)" if numbers["dropped"] else "kept as they are"
        print(
            f"samples without an image that can be read: {len(numbers['unreadable']):,}, {what}, "
            "and listed in shrink_report.jsonl beside the shards",
            file=sys.stderr,
        )
