"""From a run directory to a model that loads elsewhere."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from launch.config import ZetaConfig, load_config
from zeta.checkpoint import load_full_weights, newest_whole, read_trainer_state
from zeta.models.image_text import split_weights, text_arguments
from zeta.pretrained import TextExport, save_pretrained
from zeta.run_dir import RunDir
from zeta.timm_format import save_timm


def export_run(
    run_path: Path,
    out: Path,
    *,
    step: int | None = None,
    form: str = "zeta",
    average: bool = False,
) -> Path:
    """Write the weights of a run's newest whole checkpoint (or of `step`) to the folder `out`.

    Args:
        run_path: run directory.
        out: folder to write; a former export there is replaced once the new one is whole.
        step: checkpoint to export; None: the newest that passes its hashes.
        form: zeta (for `zeta eval` and `NaViT.from_pretrained`; with the text encoder and the
            tokenizer, if there are any) or timm (for ``timm.create_model("local-dir:OUT",
            pretrained=True)``; of an image-text model the image encoder alone).
        average: the moving average of the weights (`train.ema_decay`) instead of the weights.

    Raises:
        ValueError: no run or no whole checkpoint there, no moving average in it, or an option that
            timm cannot express.
    """
    # Only files are read: DeepSpeed, whose types they hold, shall not look for devices and say so.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    run_dir = RunDir(run_path)
    if not run_dir.config.is_file():
        raise ValueError(f"{run_path} is not a run directory: it has no {run_dir.config.name}")
    checkpoint = newest_whole(run_dir.checkpoints, step)
    config = load_config(str(checkpoint / "config.yaml"))
    arguments, objective = config.model.resolve(), config.objective
    weights, text = load_full_weights(checkpoint, average=average), None
    if objective.image_text:
        weights, others = split_weights(weights)
        tokenizer = run_dir.tokenizer if run_dir.tokenizer.exists() else None
        text = TextExport(text_arguments(objective) | {"kind": objective.kind}, others, tokenizer)
    if form == "timm":
        return save_timm(out, weights, arguments)
    facts = _facts(run_dir, checkpoint, config, average)
    return save_pretrained(out, weights, arguments, facts, text)


def _facts(run_dir: RunDir, checkpoint: Path, config: ZetaConfig, average: bool) -> dict[str, Any]:
    resolution = config.data.resolution
    progress = read_trainer_state(checkpoint)["progress"]
    return {
        "step": progress["step"],
        "weights": "moving average" if average else "last step",
        "images_seen": progress["images"],
        "tokens_seen": progress["tokens"],
        "data_fingerprint": progress["data"]["fingerprint"],
        "objective": config.objective.kind,
        "resolution": {name: getattr(resolution, name) for name in ("max", "fit", "max_upscale")},
        "class_names": json.loads(run_dir.classes.read_text())
        if run_dir.classes.exists()
        else None,
    }
