"""`zeta shards build` and `zeta shards index`: from images on disk to shards with a manifest."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import errors
from launch.arguments import (
    Subparsers,
    add_command,
    add_json,
    add_shards,
    add_workers,
    expanded,
    output_path,
    positive_int,
    size_mb,
)
from launch.commands.shards.shrink import add_rule, rule, say, summary

if TYPE_CHECKING:
    from data_pipeline.shards.manifest import Manifest


def add_parser(subparsers: Subparsers) -> None:
    """Declare both commands."""
    build = add_command(
        subparsers,
        "build",
        run_build,
        "write WebDataset shards from a folder of images, a table of paths, or other shards",
        "zeta shards build photos/ shards/train",
    )
    build.add_argument(
        "source",
        metavar="SRC",
        type=expanded,
        help="folder of images (its subfolders are the classes), a .csv or .jsonl file with "
        "columns path and label or caption, or .tar shards",
    )
    build.add_argument("out", metavar="OUT", type=output_path, help="new folder for the shards")
    build.add_argument(
        "--max-size",
        type=size_mb,
        default="512MB",
        metavar="SIZE",
        help="largest size of a shard, such as 512MB or 2GB (default: %(default)s); with "
        "--max-side, a copy counts as a byte a pixel, more than it needs",
    )
    build.add_argument(
        "--max-count",
        type=positive_int,
        default=10_000,
        metavar="N",
        help="largest number of images in a shard (default: %(default)s)",
    )
    order = build.add_mutually_exclusive_group()
    order.add_argument("--seed", type=int, default=0, help="seed of the shuffle (default: 0)")
    order.add_argument("--no-shuffle", action="store_true", help="keep the order of the source")
    build.add_argument(
        "--val-share",
        type=float,
        metavar="X",
        help="hold out this share of the images, such as 0.05: they are written to OUT/val, the "
        "others to OUT/train; a picture is on one side with all its rows and copies",
    )
    build.add_argument("--no-labels", action="store_true", help="write no classes")
    build.add_argument(
        "--root",
        metavar="DIR",
        help="folder that the files of a table must lie in (default: that of the table)",
    )
    add_rule(build, required=False)
    add_workers(build)
    add_json(build)
    index = add_command(
        subparsers,
        "index",
        run_index,
        "index shards that another program wrote, or that have changed",
        "zeta shards index '/data/laion/{00000..00127}.tar'",
    )
    add_shards(index)
    index.add_argument(
        "--no-checksums",
        action="store_true",
        help="read headers only, and keep no checksum of each image's bytes",
    )
    add_workers(index)
    add_json(index)


def run_build(args: argparse.Namespace) -> int:
    """Write the shards and their index, and print a summary."""
    from data_pipeline.shards.build import build_shards, build_split

    options: dict[str, Any] = {
        "max_size_mb": args.max_size,
        "max_count": args.max_count,
        "seed": None if args.no_shuffle else args.seed,
        "labels": not args.no_labels,
        "root": args.root,
        "shrink": rule(args),
        "workers": args.workers,
        "progress": not args.json,
    }
    if args.val_share is None:
        parts = {"": build_shards(args.source, args.out, **options)}
    else:
        parts = build_split(args.source, args.out, args.val_share, **options)
    shrunk = {name: _shrunk(args.out / name) for name in parts} if options["shrink"] else {}
    if args.json:
        numbers = {
            name: _numbers(part) | ({"shrink": shrunk[name]} if name in shrunk else {})
            for name, part in parts.items()
        }
        print(json.dumps(numbers.get("", numbers)))
    else:
        for name, manifest in parts.items():
            print(f"{args.out}/{name}: " if name else "", end="")
            _say(manifest, as_json=False)
            if name in shrunk:
                say(shrunk[name])
    return errors.FAILED if any(part["unreadable"] for part in shrunk.values()) else 0


def run_index(args: argparse.Namespace) -> int:
    """Write the index, and print a summary of the shards."""
    from data_pipeline.shards.index import index_shards

    _tell_of_other_names(args.shards)
    manifest = index_shards(
        args.shards,
        workers=args.workers,
        progress=not args.json,
        checksums=not args.no_checksums,
    )
    return _say(manifest, args.json)


def _shrunk(folder: Path) -> dict[str, Any]:
    """Return what became of the images of a build with --max-side."""
    from data_pipeline.shards.shrinking.report import read_reports

    return summary(list(read_reports(folder).values()))


def _tell_of_other_names(shards: Sequence[str]) -> None:
    """Say which files in folders of shards are left out for their names."""
    from data_pipeline.shards.folder import nearly_shards, spec_parts

    for part in spec_parts(shards):
        others = nearly_shards(Path(part)) if Path(part).is_dir() else []
        if others:
            print(
                f"WARNING: {len(others):,} files in {part}, such as {others[0]}, are left out, "
                "because their names do not end in .tar: unpack or rename them",
                file=sys.stderr,
            )


def _numbers(manifest: Manifest) -> dict[str, Any]:
    from data_pipeline.shards.manifest import SampleFlag

    rejected = int(((manifest.samples["flags"] & SampleFlag.BAD) != 0).sum())
    return {
        "shards": len(manifest.shards),
        "images": len(manifest.samples) - rejected,
        "rejected": rejected,
        "unread": [asdict(unread) for unread in manifest.unread],
        "classes": None if manifest.class_names is None else len(manifest.class_names),
        "bytes": sum(shard.nbytes for shard in manifest.shards),
        "fingerprint": manifest.fingerprint,
    }


def _say(manifest: Manifest, as_json: bool) -> int:
    from data_pipeline.shards.unread import unread_lines

    numbers = _numbers(manifest)
    if as_json:
        print(json.dumps(numbers))
        return 0
    named = "" if numbers["classes"] is None else f" of {numbers['classes']} classes"
    shards = f"{numbers['shards']:,} {'shard' if numbers['shards'] == 1 else 'shards'}"
    print(f"{numbers['images']:,} images{named} in {shards}, {numbers['bytes'] / 1e6:,.1f} MB")
    if numbers["rejected"]:
        print(
            f"{numbers['rejected']:,} samples cannot be used ({manifest.reasons()}); see "
            "manifest_rejected.jsonl beside the shards"
        )
    for line in unread_lines(manifest.unread):
        print(line)
    return 0
