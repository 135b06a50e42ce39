"""`train.trainable`: choose the parameters of a model that learn; the others stay fixed."""

from __future__ import annotations

import re

from torch import nn

_LAST_BLOCKS = re.compile(r"last-([1-9]\d*)")


def check_trainable(trainable: str) -> None:
    """Raise ValueError unless `trainable` is all, head or last-K."""
    if trainable not in ("all", "head") and _LAST_BLOCKS.fullmatch(trainable) is None:
        raise ValueError(
            f"train.trainable is {trainable!r}; choose all, head, or last-K for the last K blocks "
            "and what follows them, as in last-2"
        )


def freeze(model: nn.Module, trainable: str) -> None:
    """Freeze the parameters that do not learn; they need no gradient and no optimizer state.

    Args:
        model: the model, whole, sharded or on the meta device.
        trainable: all; head (a linear probe of the pooled embedding); or last-K: the last K blocks,
            norm, pooling and head.

    Raises:
        ValueError: the model does not have these parts.
    """
    check_trainable(trainable)
    if trainable == "all":
        return
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.ModuleList):
        raise ValueError(
            f"train.trainable is {trainable}, which is for classification: a {type(model).__name__}"
            " has several encoders; set train.trainable=all"
        )
    frozen = [child for name, child in model.named_children() if name != "head"]
    if match := _LAST_BLOCKS.fullmatch(trainable):
        count, depth = int(match[1]), len(blocks)
        if count > depth:
            raise ValueError(
                f"train.trainable is {trainable}, but the model has {depth} blocks: set it to "
                f"last-{depth} or less, or to all"
            )
        frozen = [model.get_submodule("embeds"), *blocks[: depth - count]]
    for module in frozen:
        module.requires_grad_(False)


def frozen_names(model: nn.Module) -> list[str]:
    """Return the names of the parameters that do not learn, in the order of the module."""
    return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
