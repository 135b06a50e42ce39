"""`zeta data plan`: images, packs and steps of an epoch, before anything is decoded."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from launch.arguments import (
    Subparsers,
    add_command,
    add_config,
    add_json,
    positive_int,
    positive_number,
)


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "plan",
        run,
        "print images, tokens, packs, steps and fill of an epoch, and the length of the run",
        "zeta data plan navit_b16_classification data.shards=shards/train --world-size 8",
    )
    add_config(parser)
    parser.add_argument(
        "--world-size", type=positive_int, default=1, metavar="W", help="ranks (default: 1)"
    )
    parser.add_argument(
        "--images-per-s",
        type=positive_number,
        metavar="N",
        help="rate of all ranks together (the img/s that a run prints): adds the time of the run",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the plan's numbers."""
    from data_pipeline.plan.summary import summarise
    from data_pipeline.shards.weighted import open_shards
    from launch.config.load import load_config
    from launch.config.resolve import resolve_with_shards, training_plan
    from launch.run.length import length_by_plan, length_rows
    from launch.tables import plan_table, plan_warnings

    config = load_config(args.config, args.overrides)
    manifest = open_shards(config.data.shards)
    config = resolve_with_shards(config, manifest)
    plan = training_plan(config, manifest)
    summary = summarise(plan, args.world_size)
    length = length_by_plan(config.train, plan, summary)
    if args.json:
        run_of = {"steps": length.steps, "epochs": length.epochs, "images": length.images}
        print(json.dumps(asdict(summary) | {"run": run_of}))
    else:
        lines = plan_table(summary, plan.num_lanes, args.world_size)
        lines += [f"{name:<18}{text}" for name, text in length_rows(length, args.images_per_s)]
        print("\n".join(lines))
    for warning in plan_warnings(summary, plan, args.world_size):
        print(f"zeta: warning: {warning}", file=sys.stderr)
    return 0
