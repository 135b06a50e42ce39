"""The summary of a run at W&B holds the best value of each score, which of a loss is the lowest."""

import pytest

from zeta.tracking.wandb_worker import best_is


@pytest.mark.parametrize(
    ("name", "best"),
    [
        *(("train/loss", "min"), ("val/loss_at_64_tokens", "min"), ("val/base_loss", "min")),
        *(("train/pooled_loss", "min"), ("val/distill_loss_of_average", "min")),
        *(("val/top1", "max"), ("val/knn_top1", "max"), ("val/embedding_rank", "max")),
        *(("val/images", None), ("val/best_top1", None), ("optim/lr", None)),
    ],
)
def test_the_best_of_every_loss_is_the_lowest(name, best):
    assert best_is(name) == best
