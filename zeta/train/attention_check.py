"""Check that the attention kernel that the config asks for can run on a device."""

from __future__ import annotations

import torch

from zeta.models.attention import varlen_obstacle
from zeta.train.config import TrainConfig


def check_attention(train: TrainConfig, device: torch.device, channels: int = 8) -> None:
    """Check that the attention kernel that `train.attention` asks for can run.

    Args:
        train: settings; `attention` and `dtype` are read.
        device: where the model will be.
        channels: size of a head; the default is one that every kernel takes, for checks made before
            the model is built.

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
