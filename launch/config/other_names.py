"""Settings under the names that other libraries give them, and where zeta has them."""

from __future__ import annotations

_BATCH = (
    "the batch of a step is train.packs_per_step packs of data.token_budget tokens, on any number "
    "of ranks (`zeta data plan` says how many images that is)"
)
_PASS = "train.tokens_per_forward is what goes through one forward pass; auto takes as much as fits"
_ACCUMULATION = (
    "gradient accumulation needs no setting: a step averages over train.packs_per_step packs, and "
    "those that do not fit into train.tokens_per_forward go through further passes"
)
_RAND = "that is data.augment.rand_augment.layers, and data.augment.rand_augment.magnitude"

_WHERE: dict[str, tuple[str, ...]] = {
    _BATCH: ("batch_size", "batch", "global_batch_size", "total_batch_size", "train_batch_size"),
    _PASS: (
        "micro_batch_size",
        "microbatch_size",
        "per_device_batch_size",
        "per_device_train_batch_size",
        "train_micro_batch_size_per_gpu",
    ),
    _ACCUMULATION: (
        "gradient_accumulation",
        "gradient_accumulation_steps",
        "grad_accum",
        "grad_accum_steps",
        "accumulate_grad_batches",
        "accum_iter",
        "accumulation_steps",
    ),
    "that is optim.lr": ("learning_rate", "peak_lr", "base_lr"),
    "that is optim.warmup_share, a share of the run": ("warmup", "warmup_ratio", "warmup_epochs"),
    "that is optim.clip": ("clip_grad", "grad_clip", "max_grad_norm", "gradient_clip_val"),
    "that is train.max_epochs": ("epochs", "num_epochs", "num_train_epochs"),
    "that is train.dtype": ("precision", "amp", "mixed_precision", "bf16", "fp16"),
    "that is train.ema_decay": ("ema", "model_ema", "model_ema_decay"),
    "that is train.activation_checkpointing": ("gradient_checkpointing", "grad_checkpointing"),
    "that is model.stochastic_depth": ("drop_path", "drop_path_rate"),
    "that is objective.label_smoothing": ("smoothing",),
    "that is data.mix.mixup_alpha": ("mixup",),
    "that is data.mix.cutmix_alpha": ("cutmix",),
    _RAND: ("randaugment", "rand_augment", "randaug", "auto_augment", "aa"),
    "that is data.augment.flip": ("hflip", "horizontal_flip"),
    "that is data.workers": ("num_workers", "dataloader_num_workers"),
}
OTHER_NAMES = {name: said for said, names in _WHERE.items() for name in names}
"""What to say of each name, the last part of a dotted key."""
