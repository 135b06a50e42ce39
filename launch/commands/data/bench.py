"""`zeta data bench`: images a second from shards to packs, and the stage that limits them."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from launch.arguments import Subparsers, add_command, add_config, add_json, positive_int


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "bench",
        run,
        "measure images a second from shards to packs, compared with decoding alone",
        "zeta data bench navit_b16_classification data.shards=shards/train data.workers=4",
    )
    add_config(parser)
    parser.add_argument(
        "--packs", type=positive_int, default=32, metavar="N", help="packs a round (default: 32)"
    )
    parser.add_argument(
        "--rounds", type=positive_int, default=5, metavar="N", help="rounds (default: 5)"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the rates and the stages."""
    from data_pipeline.bench import bench
    from data_pipeline.shards.weighted import open_shards
    from launch.config.load import load_config
    from launch.config.resolve import resolve_with_shards, training_plan
    from launch.tables import bench_table

    config = load_config(args.config, args.overrides)
    manifest = open_shards(config.data.shards)
    plan = training_plan(resolve_with_shards(config, manifest), manifest)
    result = bench(plan, packs=args.packs, rounds=args.rounds)
    print(json.dumps(asdict(result)) if args.json else "\n".join(bench_table(result)))
    return 0
