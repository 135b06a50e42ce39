"""`zeta export`: write a checkpoint as a model that loads elsewhere."""

from __future__ import annotations

import argparse

from launch.arguments import Subparsers, add_command, input_path, output_path, size_mb
from zeta.export.formats import COMBINED, FORMATS, format_names


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "export",
        run,
        "write a checkpoint of a run as safetensors, for zeta, for timm or for both",
        "zeta export runs/first exports/first --step best --format both",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=input_path, help="directory of the run")
    parser.add_argument("out", metavar="OUT", type=output_path, help="folder to write")
    parser.add_argument(
        "--step",
        type=_step,
        default="latest",
        metavar="N|best|latest",
        help="checkpoint to export: that of step N, the one with the best score on held-out "
        "images, or the newest that is whole (default: latest)",
    )
    parser.add_argument(
        "--ema",
        action="store_true",
        help="export the moving average of the weights, which train.ema_decay keeps",
    )
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="type of the weights in the files (default: fp32, as they were trained)",
    )
    uses = [f"{name}: for {entry.use}" for name, entry in FORMATS.items()]
    uses += [
        f"{name}: {' and '.join(parts)} side by side, in the space of both"
        for name, parts in COMBINED.items()
    ]
    parser.add_argument(
        "--format",
        choices=format_names(),
        default="zeta",
        help=f"{'; '.join(uses)} (default: zeta)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the export that OUT holds"
    )
    parser.add_argument(
        "--max-file-size",
        type=size_mb,
        default=5000.0,
        metavar="SIZE",
        help="split larger weights for zeta into several files, such as 500MB or 2GB "
        "(default: 5GB; timm reads one file, whatever its size)",
    )


def run(args: argparse.Namespace) -> int:
    """Export, and print what was exported and where to."""
    from launch.export import export_run
    from zeta.run.directory import step_of

    done = export_run(
        args.run_dir,
        args.out,
        step=args.step,
        form=args.format,
        average=args.ema,
        dtype=args.dtype,
        max_file_bytes=int(args.max_file_size * 1e6),
        overwrite=args.overwrite,
    )
    step = step_of(done.checkpoint.name)
    print(f"exported {args.run_dir} to {done.folder}: step {step}, {done.why}")
    return 0


def _step(text: str) -> int | str:
    if text in ("best", "latest"):
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a step nor best nor latest")
    return int(text)
