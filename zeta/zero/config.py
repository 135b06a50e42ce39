"""Build the config of DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from zeta.models.linear import Linear
from zeta.packed import packs_per_rank
from zeta.zero.passthrough import merged, offloads_optimizer


@dataclass(frozen=True)
class ZeroConfig:
    """The sharding and the compute dtype of a model."""

    stage: int
    """ZeRO stage, 0 to 3."""
    dtype: str
    """bf16 or fp32."""
    packs_per_step: int
    """Packs of an optimizer step, over all ranks."""
    extra: Mapping[str, Any]
    """Further settings of DeepSpeed: `train.deepspeed`."""


def deepspeed_config(zero: ZeroConfig, world_size: int) -> dict[str, Any]:
    """Return DeepSpeed's config: sharding, dtype and the settings of `train.deepspeed`.

    Clipping, schedule and logging are zeta's own.

    Gradients are summed over ranks in fp32, except at ZeRO-3 in bf16, where the weights of linear
    layers are gathered in bf16 and their gradients reduced in bf16.
    """
    packs = packs_per_rank(zero.packs_per_step, world_size)
    autocast: dict[str, Any] = {"enabled": zero.dtype == "bf16", "dtype": "bfloat16"}
    reduced = [f"{kind.__module__}.{kind.__qualname__}" for kind in (nn.Linear, Linear)]
    autocast["lower_precision_safe_modules"] = reduced if zero.stage == 3 else []
    zero_optimization: dict[str, Any] = {"stage": zero.stage}
    if zero.stage in (1, 2) and not offloads_optimizer(zero.extra):
        zero_optimization["compute_grad_norm"] = False  # zeta has the norm already
    config = {
        "train_micro_batch_size_per_gpu": 1,  # one pack
        "gradient_accumulation_steps": packs,
        "train_batch_size": packs * world_size,
        "gradient_clipping": 0.0,
        "zero_optimization": zero_optimization,
        "torch_autocast": autocast,
        "zero_allow_untested_optimizer": True,  # zeta tests those that it knows
        "steps_per_print": None,
    }
    return merged(config, zero.extra)
