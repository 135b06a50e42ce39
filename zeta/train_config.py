"""Config of training (`train.*`), the optimizer (`optim.*`) and the tracker (`tracker.*`)."""

from __future__ import annotations

from dataclasses import dataclass, field

from zeta.config_field import check_choice, check_range, free


@dataclass
class QuarantineConfig:
    """How many images may be unusable before the run ends, with exit code 93."""

    max_share: float = free(0.05)
    """Largest share of all images seen, once `probation_images` were seen."""
    probation_images: int = free(10_000)
    """Images before which the share is not judged."""
    max_in_a_row: int = free(100)
    """Most unusable images in a row in one lane; this many at once is a fault of the storage, or
    shards of another kind, rather than bad images."""

    def __post_init__(self) -> None:
        check_range("train.quarantine.max_share", self.max_share, 0, 1)
        check_range("train.quarantine.probation_images", self.probation_images, 0)
        check_range("train.quarantine.max_in_a_row", self.max_in_a_row, 1)


@dataclass
class TrainConfig:
    """The loop. World size is never configured: it is what the launcher started."""

    packs_per_step: int = 8
    """P: packs (so, token budgets) that one optimizer step averages over, whatever the ranks."""
    max_steps: int | None = free(None)
    """Optimizer steps after which the run is finished; learning-rate schedules end here."""
    max_epochs: int | None = free(None)
    """Passes over the data after which the run is finished."""
    zero_stage: int = free(2)
    """DeepSpeed ZeRO stage: what is sharded (1 optimizer, 2 also gradients, 3 also weights)."""
    device: str = free("auto")
    """cuda, cpu, or auto: CUDA where there is a device."""
    dtype: str = "bf16"
    """Compute dtype: bf16 (fp32 master weights and accumulation) or fp32."""
    compile: str = free("auto")
    """torch.compile the blocks: auto (where a compiler is found), true or false."""
    activation_checkpointing: bool = free(False)
    """Recompute each block in the backward pass: a third more compute, much less memory."""
    log_every: int = free(10)
    """Steps between two lines of metrics."""
    checkpoint_every: int = free(1000)
    """Steps between two checkpoints."""
    keep_last: int = free(2)
    """Newest checkpoints to keep."""
    max_nonfinite_steps: int = free(10)
    """Steps in a row whose loss or gradient is not finite (and so changed nothing) that end the
    run with exit code 93."""
    quarantine: QuarantineConfig = field(default_factory=QuarantineConfig)
    seed: int = 0
    """Seed of the weights and of dropout; `data.seed` is the seed of everything in the data."""

    def __post_init__(self) -> None:
        check_range("train.packs_per_step", self.packs_per_step, 1)
        check_range("train.zero_stage", self.zero_stage, 0, 3)
        check_range("train.log_every", self.log_every, 1)
        check_range("train.checkpoint_every", self.checkpoint_every, 1)
        check_range("train.keep_last", self.keep_last, 1)
        check_range("train.max_nonfinite_steps", self.max_nonfinite_steps, 1)
        check_choice("train.device", self.device, ("auto", "cpu", "cuda"))
        check_choice("train.dtype", self.dtype, ("bf16", "fp32"))
        self.compile = str(self.compile).lower()  # YAML reads true and false as booleans
        check_choice("train.compile", self.compile, ("auto", "true", "false"))
        for name in ("max_steps", "max_epochs"):
            value = getattr(self, name)
            if value is not None:
                check_range(f"train.{name}", value, 1)


@dataclass
class OptimConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = 1e-3
    """Peak learning rate."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    schedule: str = "cosine"
    """cosine (to 0 at train.max_steps), rsqrt (lr * sqrt(warmup / step)) or constant."""
    cooldown_steps: int = 0
    """Last steps before train.max_steps over which rsqrt and constant fall linearly to 0."""
    weight_decay: float = 0.05
    """Of matrices; norms, biases, position tables and the pooling query are never decayed."""
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    """Largest global gradient norm; 0: no clipping."""

    def __post_init__(self) -> None:
        check_choice("optim.schedule", self.schedule, ("cosine", "rsqrt", "constant"))
        for name in ("lr", "warmup_steps", "cooldown_steps", "weight_decay", "clip"):
            check_range(f"optim.{name}", getattr(self, name), 0, open_high=True)
        for index, beta in enumerate(self.betas):
            check_range(f"optim.betas[{index}]", beta, 0, 1, open_high=True)


@dataclass
class WandbConfig:
    """Weights & Biases."""

    mode: str = free("auto")
    """auto: online when an API key is configured, else offline; online, offline, disabled."""
    project: str = free("zeta")

    def __post_init__(self) -> None:
        check_choice("tracker.wandb.mode", self.mode, ("auto", "online", "offline", "disabled"))


@dataclass
class TrackerConfig:
    """Where metrics go besides metrics.jsonl."""

    wandb: WandbConfig = field(default_factory=WandbConfig)
