"""Config of training (`train.*`) and of the optimizer (`optim.*`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from zeta.config_field import AUTO, check_auto_or_whole, check_choice, check_range, free
from zeta.models.attention import BACKENDS
from zeta.models.trainable import check_trainable
from zeta.probes.classifiers import NEIGHBOURS
from zeta.run.ledger import QuarantineConfig
from zeta.run.watchdog import WatchdogConfig
from zeta.train.optimizers.table import check_optimizer_params
from zeta.zero.config import ZeroConfig
from zeta.zero.passthrough import check_passthrough, offloads_optimizer

UNITS = ("steps", "images", "tokens")
"""Units in which the progress of a run is counted."""


@dataclass
class EvaluateConfig:
    """Evaluation during training, on all images of `data.val_shards`, and probes of the encoder."""

    every: int = free(1000)
    """Steps between two evaluations; the last step is evaluated in any case."""
    tokens: list[int] = free(factory=list)
    """Additional token budgets: images are shrunk to at most this number of patches, and the scores
    are named after it, as in val/top1_at_64_tokens. val/loss and val/top1 have no suffix: their
    images are at most as large as in training."""

    knn: bool = free(False)
    """Log val/knn_top1: the share of held-out images (`data.probe_val_shards`) that the 20 most
    similar labelled ones (`data.probe_shards`) classify rightly, by the pooled embeddings of the
    encoder, at the sizes of val/loss. As `zeta eval --knn`, for any objective."""
    probe: bool = free(False)
    """Log val/probe_top1: the same for a linear classifier that is fitted to those embeddings. As
    `zeta eval --probe`."""
    probe_images: int = free(5000)
    """Most images of either part, which bounds what the two cost: larger parts are drawn from, the
    same images at every evaluation, and each class gets equally many of those to learn from. All
    ranks embed the images, again for the average of `ema_decay`, and rank 0 fits on its device:
    `probe` with 5,000 images of 192 channels and 100 classes takes one to two minutes on a busy CPU
    of two cores, and longer with more channels or classes; `knn` takes seconds."""

    def __post_init__(self) -> None:
        check_range("train.evaluate.every", self.every, 1)
        check_range("train.evaluate.probe_images", self.probe_images, NEIGHBOURS)
        for tokens in self.tokens:
            check_range("train.evaluate.tokens", tokens, 1)


@dataclass
class TrainConfig:
    """The training loop. World size is not a setting: it is the number of ranks that were
    started."""

    packs_per_step: int = 8
    """P: packs (token budgets) that one optimizer step averages over, on any number of ranks: the
    batch size. `zeta data plan` says how many images they hold."""
    max_steps: int | None = free(None)
    """Optimizer steps after which the run is finished."""
    max_images: int | None = free(None)
    """Images trained on, over all ranks, after which the run is finished: the first step that
    reaches this number is the last."""
    max_tokens: int | None = free(None)
    """Tokens trained on, over all ranks, after which the run is finished."""
    max_epochs: int | None = free(None)
    """Passes over the data after which the run is finished."""
    tokens_per_forward: Any = free("auto")
    """Tokens that go through one forward pass: as many of a rank's packs are joined as this allows
    (auto: as the device has memory and use for). The others follow in further passes of the step
    (gradient accumulation). It changes speed and memory, but no result."""
    zero_stage: Any = free("auto")
    """DeepSpeed ZeRO stage: what is sharded (0 nothing, 1 optimizer, 2 also gradients, 3 also
    weights), or auto: the lowest that fits (with optim.kind=muon always 0). Gradients are reduced
    once a step at 0 and 1, and once a forward pass at 2 and 3, which keep only a share of them."""
    device: str = free("auto")
    """cuda, cpu, or auto: CUDA if a device is found."""
    dtype: str = "bf16"
    """Compute dtype: bf16 (fp32 master weights and accumulation) or fp32."""
    peak_tflops: float | None = free(None)
    """Dense peak of one device in TFLOP/s at `dtype`, the reference of throughput/mfu. If unset,
    known GPUs are looked up by name, and MFU is not reported for other devices."""
    compile: str = free("auto")
    """Use torch.compile on the blocks: auto (if a compiler is found), true or false."""
    cuda_graph: str = free("auto")
    """Record the forward and backward pass as a CUDA graph, and replay it for every pack: true,
    false, or auto: where launching kernels takes the host longer than the device runs, and the pass
    can be recorded (CUDA, ZeRO 0 to 2, an attention with fixed launches, no class tokens or
    registers, an objective that compares no images). It changes speed, but no result."""
    attention: str = free("auto")
    """Attention back-end: varlen (one fused kernel, cuDNN or FlashAttention 2 as torch chooses; on
    CUDA in bf16), varlen_fa2 or varlen_cudnn (each by name), varlen_fa3 or varlen_fa4 (packages of
    their own), short (a Triton kernel for images of up to some 128 tokens; CUDA in bf16), flex
    (FlexAttention; CUDA), dense (batches of images of nearly equal length; any
    device), sdpa_segments (image by image; any device), or auto: what was measured to be fastest,
    varlen if nothing was, sdpa_segments where varlen cannot run. `make bench-gpu` measures them."""
    activation_checkpointing: bool = free(False)
    """Recompute each block in the backward pass: a third more compute, much less memory."""
    ema_decay: float | None = free(None)
    """Decay a step (0.9999, say) of an exponential moving average of the weights, for
    `zeta export --ema`. The first steps decay faster: min(ema_decay, (1 + n) / (10 + n)) after n
    steps. Null: no average."""
    log_every: int = free(10)
    """Steps between two lines of metrics."""
    checkpoint_every: int | None = free(1000)
    """Steps between two checkpoints; null: no checkpoints by steps. A checkpoint is always written
    at the end of the run and when the run is asked to stop. Training continues during the write,
    after a copy to host memory that takes as much memory as the files of a rank."""
    checkpoint_minutes: float | None = free(None)
    """Minutes between two checkpoints, by rank 0's clock; null: no checkpoints by time."""
    keep_last: int = free(2)
    """Number of newest checkpoints to keep."""
    keep_every: int | None = free(None)
    """Steps between two additional checkpoints that are never deleted; null: none."""
    max_nonfinite_steps: int = free(10)
    """Number of steps in a row with a loss or gradient that is not finite (such steps change
    nothing) after which the run ends with exit code 93."""
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    deepspeed: dict[str, Any] = free(factory=dict)
    """Further DeepSpeed settings in the layout of its config (zero_optimization.offload_optimizer,
    bucket sizes); settings that zeta decides itself are refused by name."""
    init_from: str | None = None
    """Source of the first weights: a run directory, a checkpoint in it, a folder written by
    `zeta export`, or a published encoder: a folder of transformers, or a folder or file of timm
    (docs/export.md). Optimizer, data and schedule start from the beginning. A head for
    other classes keeps its initial values; between runs of different kinds (a classifier, siglip,
    clip, lejepa, distill) only the image encoder is taken, without its head. Null: initial
    weights."""
    new_head: bool = False
    """With `init_from`: never take the head from there; it starts at zero."""
    trainable: str = "all"
    """Parameters that learn: all, head (a linear probe), or last-K: the last K blocks, norm,
    pooling and head. The others keep their first weights."""
    quarantine: QuarantineConfig = field(default_factory=QuarantineConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    seed: int = 0
    """Seed of the weights and of dropout; `data.seed` is the seed of the data."""

    def __post_init__(self) -> None:
        check_range("train.packs_per_step", self.packs_per_step, 1)
        check_auto_or_whole("train.tokens_per_forward", self.tokens_per_forward, 1)
        check_auto_or_whole("train.zero_stage", self.zero_stage, 0, 3)
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
        self.cuda_graph = str(self.cuda_graph).lower()
        check_choice("train.cuda_graph", self.cuda_graph, ("auto", "true", "false"))
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
    def lowest_stage(self) -> int:
        """The ZeRO stage, or if it is auto the lowest that the other settings allow."""
        if self.zero_stage == AUTO:
            return int(offloads_optimizer(self.deepspeed))
        return int(self.zero_stage)

    @property
    def zero(self) -> ZeroConfig:
        """The part of the config that DeepSpeed needs."""
        return ZeroConfig(self.lowest_stage, self.dtype, self.packs_per_step, self.deepspeed)


@dataclass
class OptimConfig:
    """The optimizer and its learning-rate schedule."""

    kind: str = "adamw"
    """Name of the optimizer, a class of torch.optim: adamw, adam, adamax, nadam, radam, rmsprop,
    sgd (see `zeta.train.optimizers.table`), or muon: Muon for the matrices of the transformer
    blocks and adamw for all else, at ZeRO stage 0 only."""
    params: dict[str, Any] = free(factory=dict)
    """Further arguments of the optimizer, such as {momentum: 0.9} with kind sgd. Learning rate,
    weight decay and clipping have fields of their own."""
    lr: float = 1e-3
    """Peak learning rate."""
    schedule: str = "cosine"
    """Learning rate after the warm-up: cosine (to 0 at the end), rsqrt (lr * sqrt(warm-up /
    position)), constant, or wsd (constant, with a cooldown)."""
    schedule_by: str = "steps"
    """Unit of warm-up, cooldown and end: steps, images or tokens trained on so far, over all ranks.
    The end is train.max_steps, train.max_images or train.max_tokens; where only train.max_epochs is
    set, it is planned from the data."""
    warmup_share: float = 0.0
    """Share of the run for linear warm-up from 0, below 1, such as 0.1. It follows the end of the
    run, and a number of steps, images or tokens wins over it."""
    warmup_steps: int | None = None
    """Steps of linear warm-up from 0, with schedule_by=steps; null: as warmup_share says."""
    warmup_images: int | None = None
    """Images of linear warm-up from 0, with schedule_by=images; null: as warmup_share says."""
    warmup_tokens: int | None = None
    """Tokens of linear warm-up from 0, with schedule_by=tokens; null: as warmup_share says."""
    cooldown_share: float = 0.0
    """Last share of the run, over which every schedule but cosine falls to 0; as warmup_share."""
    cooldown_steps: int | None = None
    """Last steps of the run for the cooldown, with schedule_by=steps; null: as cooldown_share
    says."""
    cooldown_images: int | None = None
    """Last images of the run for the cooldown, with schedule_by=images; null: as cooldown_share
    says."""
    cooldown_tokens: int | None = None
    """Last tokens of the run for the cooldown, with schedule_by=tokens; null: as cooldown_share
    says."""
    cooldown_shape: str = "linear"
    """Shape of the cooldown: linear, or sqrt: 1 - sqrt(share of the cooldown)."""
    weight_decay: float = 0.05
    """Weight decay of the matrices of the body; norms, biases, position tables, learned tokens and
    the pooling query are never decayed."""
    head_weight_decay: float | None = None
    """Weight decay of the matrix of a classifier's head; if unset, that of the body."""
    layer_decay: float = 1.0
    """Factor on the learning rate from each block to the one before it, for fine-tuning: 0.75, say.
    The head, the last norm and the pooling have the full rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the two moments of adamw, also inside muon; other optimizers take theirs from
    `params`."""
    clip: float = 1.0
    """Largest global gradient norm; 0: no clipping."""

    def __post_init__(self) -> None:
        check_optimizer_params(self.kind, self.params)
        check_choice("optim.schedule", self.schedule, ("cosine", "rsqrt", "constant", "wsd"))
        check_choice("optim.schedule_by", self.schedule_by, UNITS)
        check_choice("optim.cooldown_shape", self.cooldown_shape, ("linear", "sqrt"))
        ramps = [f"{ramp}_{unit}" for ramp in ("warmup", "cooldown") for unit in UNITS]
        counts = [name for name in ramps if getattr(self, name) is not None]
        for name in ("lr", *counts, "weight_decay", "clip"):
            check_range(f"optim.{name}", getattr(self, name), 0, open_high=True)
        for name in ("warmup_share", "cooldown_share"):
            check_range(f"optim.{name}", getattr(self, name), 0, 1, open_high=True)
        if self.head_weight_decay is not None:
            check_range("optim.head_weight_decay", self.head_weight_decay, 0, open_high=True)
        if not 0 < self.layer_decay <= 1:
            raise ValueError(
                f"optim.layer_decay is {self.layer_decay:g}; it must be above 0 and at most 1"
            )
        for index, beta in enumerate(self.betas):
            check_range(f"optim.betas[{index}]", beta, 0, 1, open_high=True)
