"""`zeta shards stats`: statistics of the images of shards, as text and as a picture."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from launch.arguments import Subparsers, add_command, add_json, add_shards, positive_int


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "stats",
        run,
        "print counts, sizes, aspect ratios and tokens of the images of indexed shards",
        "zeta shards stats shards/photos --png stats.png",
    )
    add_shards(parser)
    parser.add_argument(
        "--patch-size",
        type=positive_int,
        default=16,
        metavar="P",
        help="side of a patch in pixels, for the token counts (default: %(default)s)",
    )
    parser.add_argument("--png", metavar="FILE", help="also draw the histograms to this file")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the statistics, and draw them if asked."""
    from data_pipeline.shards.manifest import Manifest
    from data_pipeline.shards.stats import shard_stats
    from launch.report.shard_statistics import draw_histograms, stats_lines

    stats = shard_stats(Manifest.open(args.shards), args.patch_size)
    print(json.dumps(asdict(stats)) if args.json else "\n".join(stats_lines(stats)))
    if args.png:
        draw_histograms(stats, args.png)
    return 0
