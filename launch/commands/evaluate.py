"""`zeta eval`: accuracy of an export on labelled shards."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from launch.arguments import Subparsers, add_command, add_json


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "eval",
        run,
        "measure top-1 and top-5 of an export on labelled shards, every image once",
        "zeta eval exports/first shards/photos/val --resolutions native,128,224 --tokens 64",
    )
    parser.add_argument("export", metavar="EXPORT", type=Path, help="folder from zeta export")
    parser.add_argument("shards", metavar="SHARDS", nargs="+", help="labelled shards")
    parser.add_argument(
        "--resolutions",
        help="comma-separated: native, or a side s in pixels, for the area s*s (default: native)",
    )
    parser.add_argument(
        "--tokens",
        default="",
        help="comma-separated: token budgets; larger images are shrunk to so many patches, as by "
        "train.evaluate.tokens",
    )
    parser.add_argument("--workers", type=int, default=2, help="decoding processes (default: 2)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate and print."""
    from launch.evaluate import evaluate_export
    from launch.tables import accuracy_table

    tokens = [_budget(text) for text in _listed(args.tokens)]
    if args.resolutions is None:
        resolutions = [] if tokens else ["native"]
    else:
        resolutions = _listed(args.resolutions)
        if not resolutions:
            raise ValueError("--resolutions is empty; give native or sides, as in native,128,224")
    result = evaluate_export(
        args.export, args.shards, resolutions, tokens=tokens, workers=args.workers
    )
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
