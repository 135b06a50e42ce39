"""Exports with weights that nobody trained, for tests of what is done with an export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zeta.export.saving import save_pretrained
from zeta.models.config import ModelConfig, build_model

MODEL = {"image_size": 48, "patch_size": 8, "dim": 32, "depth": 2, "heads": 2, "mlp_dim": 64}


def write_export(folder: Path, class_names: Sequence[str], **changes: Any) -> Path:
    """Write an export of a NaViT, or of what `changes` of its config say; the head is not zero."""
    config = ModelConfig(**(MODEL | {"num_classes": len(class_names)} | changes))
    weights = build_model(config, seed=5).state_dict()
    weights["head.weight"] *= 50
    info = {"class_names": list(class_names), "step": 7, "objective": "softmax"}
    info["resolution"] = {"max": 48, "fit": "keep", "max_upscale": 1.0}
    return save_pretrained(folder, weights, config.resolve(), info)
