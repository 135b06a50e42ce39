"""Check that a device can run the attention back-end of the config, and make it ready."""

from __future__ import annotations

import torch

from zeta.models.attention import obstacle, prepare
from zeta.train.config import TrainConfig


def check_attention(train: TrainConfig, device: torch.device, channels: int = 16) -> None:
    """Check that the back-end of `train.attention` can run, and make it ready.

    Args:
        train: settings; `attention` and `dtype` are read.
        device: device of the model.
        channels: size of a head; the default works with every back-end, for checks before the model
            is built.

    Raises:
        ValueError: a back-end is asked for by name, but cannot run here.
    """
    dtype = torch.bfloat16 if train.dtype == "bf16" else torch.float32
    reason = obstacle(train.attention, device, dtype, channels)
    if reason is not None:
        raise ValueError(
            f"train.attention is {train.attention}, which cannot run here: {reason}; set "
            "train.attention=auto"
        )
    prepare(train.attention)
