"""Check that a device can run the attention kernel of the config."""

from __future__ import annotations

import torch

from zeta.models.attention import varlen_obstacle
from zeta.train.config import TrainConfig


def check_attention(train: TrainConfig, device: torch.device, channels: int = 8) -> None:
    """Check that the attention kernel of `train.attention` can run.

    Args:
        train: settings; `attention` and `dtype` are read.
        device: device of the model.
        channels: size of a head; the default works with every kernel, for checks before the model
            is built.

    Raises:
        ValueError: varlen is asked for, but cannot run here.
    """
    if train.attention != "varlen":
        return
    dtype = torch.bfloat16 if train.dtype == "bf16" else torch.float32
    obstacle = varlen_obstacle(device, dtype, channels)
    if obstacle is not None:
        raise ValueError(
            f"train.attention is varlen, which cannot run here: {obstacle}; set "
            "train.attention=auto"
        )
