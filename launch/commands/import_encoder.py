"""`zeta import`: make an export of a published encoder."""

from __future__ import annotations

import argparse

from launch.arguments import (
    Subparsers,
    add_command,
    input_path,
    output_path,
    positive_int,
    size_mb,
)


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "import",
        run,
        "make an export of a published encoder: of transformers or timm",
        "zeta import path/to/dinov3 exports/dinov3",
    )
    parser.add_argument(
        "source",
        metavar="SRC",
        type=input_path,
        help="folder of transformers or timm, with model.safetensors and config.json",
    )
    parser.add_argument("out", metavar="OUT", type=output_path, help="folder to write")
    parser.add_argument(
        "--heads",
        type=positive_int,
        metavar="N",
        help="attention heads of a ViT of timm whose config.json does not tell them",
    )
    parser.add_argument(
        "--max-file-size",
        type=size_mb,
        default=5000.0,
        metavar="SIZE",
        help="split larger weights into several files, such as 500MB or 2GB (default: 5GB)",
    )


def run(args: argparse.Namespace) -> int:
    """Import, and print what the model is and what was left out."""
    from zeta.export.importing import import_encoder

    done = import_encoder(
        args.source, args.out, heads=args.heads, max_file_bytes=int(args.max_file_size * 1e6)
    )
    print(f"imported {args.source} to {done.folder}")
    for note in done.notes:
        print(f"  {note}")
    options = (f"model.{k}={v}" for k, v in done.arguments.items() if k != "num_classes")
    print(f"train on from it: zeta finetune {done.folder} IMAGES, or zeta train RECIPE with")
    print(f"  train.init_from={done.folder} {' '.join(options).replace(', ', ',')}")
    return 0
