"""Config of training (`train.*`) and of the optimizer (`optim.*`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from zeta.config_field import check_choice, check_range, free
from zeta.models.attention import BACKENDS
from zeta.models.trainable import check_trainable
from zeta.run.ledger import QuarantineConfig
from zeta.run.watchdog import WatchdogConfig
from zeta.train.optimizers import check_optimizer_params
from zeta.zero.config import ZeroConfig
from zeta.zero.passthrough import check_passthrough

UNITS = ("steps", "images", "tokens")
"""What the progress of a run is counted in."""


@dataclass
class EvaluateConfig:
    """Evaluation during training, on all images of `data.val_shards`."""

    every: int = free(1000)
    """Steps between two evaluations; the last step is evaluated in any case."""
    tokens: list[int] = free(factory=list)
    """Further token budgets: larger images are shrunk to so many patches, and the scores named
    after it, as in val/top1_at_64_tokens. val/loss and val/top1 have no suffix: there, images are
    as large as training shows them at most."""

    def __post_init__(self) -> None:
        check_range("train.evaluate.every", self.every, 1)
        for tokens in self.tokens:
            check_range("train.evaluate.tokens", tokens, 1)


@dataclass
class TrainConfig:
    """The loop. World size is never configured: it is what the launcher started."""

    packs_per_step: int = 8
    """P: packs (so, token budgets) that one optimizer step averages over, whatever the ranks."""
    max_steps: int | None = free(None)
    """Optimizer steps after which the run is finished."""
    max_images: int | None = free(None)
    """Images trained on, over all ranks, at which the run is finished: the first step to reach
    them is the last."""
    max_tokens: int | None = free(None)
    """Tokens trained on, over all ranks, at which the run is finished."""
    max_epochs: int | None = free(None)
    """Passes over the data after which the run is finished."""
    zero_stage: int = free(2)
    """DeepSpeed ZeRO stage: what is sharded (1 optimizer, 2 also gradients, 3 also weights)."""
    device: str = free("auto")
    """cuda, cpu, or auto: CUDA where there is a device."""
    dtype: str = "bf16"
    """Compute dtype: bf16 (fp32 master weights and accumulation) or fp32."""
    peak_tflops: float | None = free(None)
    """Peak of one device in TFLOP/s, dense and in `dtype`, against which throughput/mfu is
    measured; unset, known GPUs are looked up by name and MFU is not reported for others."""
    compile: str = free("auto")
    """torch.compile the blocks: auto (where a compiler is found), true or false."""
    attention: str = free("auto")
    """Attention back-end: varlen (one fused kernel; CUDA, bf16), sdpa_segments (image by image;
    any device), or auto: varlen where it can run."""
    activation_checkpointing: bool = free(False)
    """Recompute each block in the backward pass: a third more compute, much less memory."""
    ema_decay: float | None = free(None)
    """Keep an exponential moving average of the weights with this decay a step (0.9999), for
    `zeta export --ema`; it decays faster over the first steps: min(ema_decay, (1 + n) / (10 + n))
    after n of them. Null: none."""
    log_every: int = free(10)
    """Steps between two lines of metrics."""
    checkpoint_every: int | None = free(1000)
    """Steps between two checkpoints; null: none by steps. One is written at the end of the run and
    when it is asked to stop in any case. Training goes on meanwhile, after a copy to host memory,
    which takes as much as the files of a rank."""
    checkpoint_minutes: float | None = free(None)
    """Minutes after which the next step is followed by a checkpoint, by rank 0's clock; null: none
    by time."""
    keep_last: int = free(2)
    """Newest checkpoints to keep."""
    keep_every: int | None = free(None)
    """Checkpoints at multiples of so many steps are written besides, and kept for good."""
    max_nonfinite_steps: int = free(10)
    """Steps in a row whose loss or gradient is not finite (and so changed nothing) that end the
    run with exit code 93."""
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    deepspeed: dict[str, Any] = free(factory=dict)
    """More settings of DeepSpeed, laid out as its config (zero_optimization.offload_optimizer,
    bucket sizes); settings that zeta itself decides are refused by name."""
    init_from: str | None = None
    """Begin at the weights of a run directory, of a checkpoint in it, of a folder written by
    `zeta export`, or of a ViT of timm or SigLIP (a folder or file of safetensors, see
    `zeta.export.timm.published`); optimizer, data and schedule begin anew. A head for other classes
    keeps its initial values; of an image-text run a classifier takes the image encoder. Null:
    initial weights."""
    new_head: bool = False
    """With `init_from`: the head is not taken from there in any case, and begins at zero."""
    trainable: str = "all"
    """Which parameters learn: all, head (a linear probe), or last-K: the last K blocks, norm,
    pooling and head. The others keep the weights they begin at."""
    quarantine: QuarantineConfig = field(default_factory=QuarantineConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    seed: int = 0
    """Seed of the weights and of dropout; `data.seed` is the seed of everything in the data."""

    def __post_init__(self) -> None:
        check_range("train.packs_per_step", self.packs_per_step, 1)
        check_range("train.zero_stage", self.zero_stage, 0, 3)
        check_passthrough(self.deepspeed, self.zero_stage)
        if self.ema_decay is not None:
            check_range("train.ema_decay", self.ema_decay, 0, 1, open_high=True)
        check_trainable(self.trainable)
        check_range("train.log_every", self.log_every, 1)
        check_range("train.keep_last", self.keep_last, 1)
        check_range("train.max_nonfinite_steps", self.max_nonfinite_steps, 1)
        if self.peak_tflops is not None and not 0 < self.peak_tflops < float("inf"):
            raise ValueError(f"train.peak_tflops is {self.peak_tflops:g}; it must be above 0")
        check_choice("train.device", self.device, ("auto", "cpu", "cuda"))
        check_choice("train.attention", self.attention, BACKENDS)
        check_choice("train.dtype", self.dtype, ("bf16", "fp32"))
        self.compile = str(self.compile).lower()  # YAML reads true and false as booleans
        check_choice("train.compile", self.compile, ("auto", "true", "false"))
        if self.checkpoint_minutes is not None and not 0 < self.checkpoint_minutes < float("inf"):
            raise ValueError(
                f"train.checkpoint_minutes is {self.checkpoint_minutes:g}; it must be above 0"
            )
        limits = ("max_steps", "max_images", "max_tokens", "max_epochs")
        for name in (*limits, "checkpoint_every", "keep_every"):
            value = getattr(self, name)
            if value is not None:
                check_range(f"train.{name}", value, 1)

    @property
    def zero(self) -> ZeroConfig:
        """What DeepSpeed is told."""
        return ZeroConfig(self.zero_stage, self.dtype, self.packs_per_step, self.deepspeed)


@dataclass
class OptimConfig:
    """The optimizer and its learning-rate schedule."""

    kind: str = "adamw"
    """Name of the optimizer, see `zeta.train.optimizers`: adamw, adam, adamax, nadam, radam,
    rmsprop or sgd, the classes of torch.optim."""
    params: dict[str, Any] = free(factory=dict)
    """Further arguments of the optimizer: {momentum: 0.9} with kind sgd. Rate, weight decay and
    clipping have fields of their own."""
    lr: float = 1e-3
    """Peak learning rate."""
    schedule: str = "cosine"
    """After the warm-up: cosine (to 0 at the end), rsqrt (lr * sqrt(warm-up / position)), constant,
    or wsd (constant, with a cooldown)."""
    schedule_by: str = "steps"
    """What warm-up, cooldown and end are counted in: steps, images or tokens trained on so far,
    over all ranks. The end is train.max_steps, train.max_images or train.max_tokens."""
    warmup_steps: int = 0
    """Linear warm-up from 0, with schedule_by=steps."""
    warmup_images: int = 0
    """The same in images, with schedule_by=images."""
    warmup_tokens: int = 0
    """The same in tokens, with schedule_by=tokens."""
    cooldown_steps: int = 0
    """The last steps before the end, over which every schedule but cosine falls to 0."""
    cooldown_images: int = 0
    """The same in images, with schedule_by=images."""
    cooldown_tokens: int = 0
    """The same in tokens, with schedule_by=tokens."""
    cooldown_shape: str = "linear"
    """linear, or sqrt: 1 - sqrt(share of the cooldown)."""
    weight_decay: float = 0.05
    """Of the matrices of the body; norms, biases, position tables, learned tokens and the pooling
    query are never decayed."""
    head_weight_decay: float | None = None
    """Of the matrix of a classifier's head; that of the body unless set."""
    layer_decay: float = 1.0
    """Factor on the learning rate from each block to the one before it, for fine-tuning: 0.75, say.
    The head has the full rate, and so have the last norm and the pooling."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the two moments of adamw; other optimizers take theirs from `params`."""
    clip: float = 1.0
    """Largest global gradient norm; 0: no clipping."""

    def __post_init__(self) -> None:
        check_optimizer_params(self.kind, self.params)
        check_choice("optim.schedule", self.schedule, ("cosine", "rsqrt", "constant", "wsd"))
        check_choice("optim.schedule_by", self.schedule_by, UNITS)
        check_choice("optim.cooldown_shape", self.cooldown_shape, ("linear", "sqrt"))
        ramps = [f"{ramp}_{unit}" for ramp in ("warmup", "cooldown") for unit in UNITS]
        for name in ("lr", *ramps, "weight_decay", "clip"):
            check_range(f"optim.{name}", getattr(self, name), 0, open_high=True)
        if self.head_weight_decay is not None:
            check_range("optim.head_weight_decay", self.head_weight_decay, 0, open_high=True)
        if not 0 < self.layer_decay <= 1:
            raise ValueError(
                f"optim.layer_decay is {self.layer_decay:g}; it must be above 0 and at most 1"
            )
        for index, beta in enumerate(self.betas):
            check_range(f"optim.betas[{index}]", beta, 0, 1, open_high=True)
