"""Names of the metrics that zeta logs: lowercase `group/name_unit`, the same in every sink."""

STEP = "trainer/step"
"""Optimizer steps committed: W&B's x-axis. (W&B's own `step=` is never passed.)"""

TRAIN_LOSS = "train/loss"
"""Mean loss of the images since the last log."""
LEARNING_RATE = "optim/lr"
GRAD_NORM = "optim/grad_norm"
"""Norm of the last step's gradient before clipping: a sample, where most others are means."""
SKIPPED_STEPS = "optim/skipped_steps"
IMAGES_PER_S = "throughput/images_per_s"
TOKENS_PER_S = "throughput/tokens_per_s"
MFU = "throughput/mfu"
"""Model FLOPs utilisation, 0 to 1 (`zeta.models.flops`). Absent if the peak is unknown."""
STEP_S = "time/step_s"
HOST_S = "time/host_s"
"""Seconds of a step for which the host worked: without waits for data and for the device, which on
a CPU is the host itself. Near `STEP_S`, the host binds."""
DEVICE_S = "time/device_s"
"""Seconds of a step from the device's first operation to its last."""
DATA_WAIT_S = "time/data_wait_s"
SUPPLY_RATIO = "data/supply_ratio"
"""Share of the images that training could take which the loader gives: 1 less the share of a step's
time spent waiting for data. Below 1 the loader binds."""
SUPPLY_FROM = 0.9
"""Supply ratio below which the loader counts as binding (`zeta.train.supply`)."""
FILL = "data/fill"
"""Tokens of images over token budget, for all packs of the steps; empty packs are all padding."""
IMAGES_SEEN = "data/images_seen"
"""Images trained on: of a sample with several views, every view (`data.views`)."""
TOKENS_SEEN = "data/tokens_seen"
EPOCH = "data/epoch"
QUARANTINED = "data/quarantined"
STRAGGLER_RATIO = "balance/straggler_ratio"
"""Own time of the slowest rank over the mean of all ranks (`zeta.train.straggler`)."""
STRAGGLER_FROM = 1.25
"""Straggler ratio from which a rank counts as slow (`zeta.tracking.slow_rank`)."""
SLOWEST_RANK = "balance/slowest_rank"
SLOWEST_HOST = "balance/slowest_host"
"""Host name of that rank (text)."""
PEAK_GIB = "memory/peak_gib"
"""Peak memory of any rank in GiB: allocated on the device, or resident on a CPU."""
CHECKPOINT_SAVE_S = "checkpoint/save_s"
"""Seconds that training waited for the checkpoint last published."""
CHECKPOINT_FAILURES = "checkpoint/failures"
"""Saves that failed since this process started; training continued from memory."""
VAL_IMAGES = "val/images"
"""Held-out images that were scored, once each."""
VAL_REJECTED = "val/rejected"
"""Held-out images that could not be used."""
VAL_BEST_STEP = "val/best_step"
"""Step of the best value so far of the objective's headline score."""
EVALUATION_S = "time/evaluation_s"


EMBEDDING_RANK = "embedding_rank"
"""Score: in how many directions the embeddings of held-out images vary."""
EMBEDDING_DEVIATION = "embedding_deviation"
"""Score: mean over channels of the deviation of these embeddings."""


def train_mean(count: str) -> str:
    """Return the name of an objective's score as a mean over training images: `train/top1`."""
    return f"train/{count}"


def val_score(score: str, tokens: int | None = None, *, average: bool = False) -> str:
    """Return the name of a score on held-out images: `val/top1`, or `val/top1_at_64_tokens`.

    Args:
        score: name of the objective's score.
        tokens: token budget of an image; None: the image sizes of training.
        average: whether the moving average of the weights was scored: `val/top1_of_average`.
    """
    budget = "" if tokens is None else f"_at_{tokens}_tokens"
    return f"val/{score}{budget}{'_of_average' if average else ''}"


def val_best(score: str) -> str:
    """Return the name of the best value so far of a score: `val/best_top1`."""
    return f"val/best_{score}"
