"""`zeta export`: a checkpoint as a model that loads elsewhere."""

from __future__ import annotations

import argparse
from pathlib import Path

from launch.arguments import Subparsers, add_command


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "export",
        run,
        "write the newest checkpoint of a run as safetensors, for zeta or for timm",
        "zeta export runs/first exports/first",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="directory of the run")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    parser.add_argument(
        "--format",
        choices=("zeta", "timm"),
        default="zeta",
        help="timm: for timm.create_model('local-dir:OUT', pretrained=True) (default: zeta)",
    )
    parser.add_argument(
        "--ema",
        action="store_true",
        help="the moving average of the weights, which train.ema_decay keeps",
    )
    parser.add_argument("--step", type=int, help="checkpoint to export (default: the newest)")


def run(args: argparse.Namespace) -> int:
    """Export and say where to."""
    from launch.export import export_run

    out = export_run(args.run_dir, args.out, step=args.step, form=args.format, average=args.ema)
    print(f"exported {args.run_dir} to {out}")
    return 0
