"""Learning-rate schedules: pure functions of the step."""

from __future__ import annotations

import math

from zeta.train_config import OptimConfig


def learning_rate(step: int, config: OptimConfig, max_steps: int | None) -> float:
    """Return the learning rate of optimizer step `step` (the first is 0).

    All schedules rise linearly to `config.lr` over `warmup_steps`: the first step already learns
    (lr / warmup_steps), and step warmup_steps - 1 is at the peak. Then

    - cosine falls to 0 at `max_steps`;
    - rsqrt is lr * sqrt(warmup_steps / (step + 1)), the schedule of the ViT scaling and NaViT
      papers (Zhai et al. 2022, section 3.5), whose time scale here is the warm-up;
    - constant stays.

    rsqrt and constant are scaled linearly to 0 over the last `cooldown_steps` before `max_steps`.

    Raises:
        ValueError: the schedule needs `max_steps` and there is none.
    """
    needs_end = config.schedule == "cosine" or config.cooldown_steps > 0
    if needs_end and max_steps is None:
        field = "optim.cooldown_steps" if config.cooldown_steps else "optim.schedule = cosine"
        raise ValueError(f"{field} needs to know where the run ends; set train.max_steps")
    warmup = max(config.warmup_steps, 1)
    if step < config.warmup_steps:
        rate = config.lr * (step + 1) / warmup
    elif config.schedule == "cosine":
        assert max_steps is not None
        span = max(max_steps - config.warmup_steps, 1)
        progress = min((step - config.warmup_steps) / span, 1.0)
        rate = config.lr * 0.5 * (1.0 + math.cos(math.pi * progress))
    elif config.schedule == "rsqrt":
        rate = config.lr * math.sqrt(warmup / (step + 1))
    else:
        rate = config.lr
    if config.schedule != "cosine" and config.cooldown_steps:
        assert max_steps is not None
        rate *= min(max(max_steps - step, 0) / config.cooldown_steps, 1.0)
    return rate
