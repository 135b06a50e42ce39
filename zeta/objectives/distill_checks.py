"""What a distillation cannot work with is refused by name."""

from __future__ import annotations

from typing import Any

from zeta.models.packed_vit import PackedViT
from zeta.objectives.config import DistillConfig
from zeta.objectives.teacher import FIELD


def check_weights(config: DistillConfig) -> None:
    """Raise ValueError if neither pooled embeddings nor tokens are learned."""
    if not config.pooled and not config.tokens:
        raise ValueError(
            "objective.distill.pooled and objective.distill.tokens are both 0, so there is nothing "
            "to learn from the teacher: set one of them above 0"
        )


def check_no_factor(config: DistillConfig) -> None:
    """Raise ValueError for a factor on the distances where they are all that is learned."""
    if config.weight != DistillConfig.weight:
        raise ValueError(
            f"objective.distill.weight is {config.weight:g}, but objective.kind distill learns "
            "nothing beside that it would be weighed against: leave it out; set "
            "objective.distill.pooled and objective.distill.tokens to weigh these two, or "
            "optim.lr to learn faster"
        )


def check_factor(config: DistillConfig) -> None:
    """Raise ValueError if the teacher would run, and count for nothing beside another objective."""
    if not config.weight:
        raise ValueError(
            "objective.distill.weight is 0, so the teacher would run and nothing be learned from "
            "it: set it above 0, or objective.kind without +distill"
        )


def check_fit(encoder: PackedViT, path: str | None, fit: str) -> None:
    """Raise ValueError if a teacher of one size would see images of other shapes."""
    grid = encoder.fixed_grid
    if grid is None:
        return
    if grid[0] != grid[1]:
        raise ValueError(
            f"{FIELD} is {path}, which takes a grid of {grid[0]} x {grid[1]} patches only, and "
            "training images are squares or of any shape: give a teacher that takes squares"
        )
    if fit == "keep":
        raise ValueError(
            f"{FIELD} is {path}, which takes squares only, but data.resolution.fit is keep: set "
            "data.resolution.fit=crop (or squash), or give a teacher that takes any shape"
        )


def check_pooling(image: PackedViT, config: DistillConfig) -> None:
    """Raise ValueError if the pooling has weights and none of them would get a gradient."""
    parts = ("attn_pool", "fc_norm", "pooler")
    found = [part for part in parts if any(True for _ in _parameters(image, part))]
    if found and not config.pooled:
        raise ValueError(
            f"objective.distill.pooled is 0, so nothing would train {found[0]} of the model, which "
            "makes the embeddings: set model.pool=mean, or objective.distill.pooled above 0"
        )


def _parameters(image: PackedViT, part: str) -> Any:
    module = getattr(image, part, None)
    return iter(()) if module is None else module.parameters()
