"""Counts of a run, and means of the steps since the last log."""

import json
from dataclasses import asdict

import pytest

from zeta.train.config import TrainConfig
from zeta.train.device_clock import DeviceTime
from zeta.train.engine import StepResult
from zeta.train.progress import Progress


def _commit(progress, images, loss, *, applied=True, result=True, rejected=0):
    made = StepResult(loss * images, {"top1": images / 2}, 3.0, applied) if result else None
    progress.commit(
        device=DeviceTime(0.75, 1, 0.5),
        images=images,
        tokens=10 * images,
        rejected=rejected,
        budget=100,
        flops=1e9 * images,
        epoch=0,
        result=made,
        seconds=0.5,
        waited=0.1,
    )


def test_means_are_over_images_and_rates_over_the_time_of_steps():
    progress = Progress()
    _commit(progress, 2, 1.0)
    _commit(progress, 6, 2.0)
    metrics = progress.take_metrics()
    assert metrics["train/loss"] == pytest.approx((2 * 1.0 + 6 * 2.0) / 8)
    assert metrics["train/top1"] == pytest.approx(0.5)
    assert metrics["throughput/images_per_s"] == pytest.approx(8.0)
    assert metrics["throughput/tokens_per_s"] == pytest.approx(80.0)
    assert metrics["time/host_s"] == 0  # the rest of a step was a wait for data and device
    assert metrics["time/device_s"] == pytest.approx(0.75)
    assert metrics["time/step_s"] == pytest.approx(0.5)
    assert metrics["time/data_wait_s"] == pytest.approx(0.1)
    assert metrics["data/fill"] == pytest.approx(0.4)
    _commit(progress, 4, 5.0)
    assert progress.take_metrics()["train/loss"] == pytest.approx(5.0)
    assert (progress.step, progress.images, progress.tokens) == (3, 12, 120)


def test_a_skipped_step_counts_as_seen_but_not_in_the_loss():
    progress = Progress()
    _commit(progress, 2, 1.0)
    _commit(progress, 6, float("nan"), applied=False)
    assert (progress.skipped_steps, progress.nonfinite_in_a_row) == (1, 1)
    metrics = progress.take_metrics()
    assert metrics["train/loss"] == 1.0
    assert metrics["data/images_seen"] == 8
    _commit(progress, 1, 1.0)
    assert (progress.skipped_steps, progress.nonfinite_in_a_row) == (1, 0)


def test_utilisation_is_operations_over_time_and_peak():
    progress = Progress()
    _commit(progress, 2, 1.0)
    _commit(progress, 6, 2.0)
    assert progress.take_metrics(peak_flops=80e9)["throughput/mfu"] == pytest.approx(0.1)
    _commit(progress, 2, 1.0)
    assert "throughput/mfu" not in progress.take_metrics(peak_flops=None)


def test_steps_without_images_have_no_loss():
    progress = Progress()
    _commit(progress, 0, 0.0, result=False)
    assert "train/loss" not in progress.take_metrics()


def test_progress_survives_json_exactly_in_the_middle_of_a_window():
    progress = Progress(data={"lanes": {"0": {"taken": 3}}})
    _commit(progress, 3, 0.1)
    restored = Progress(**json.loads(json.dumps(asdict(progress))))
    assert restored == progress
    for each in (progress, restored):
        _commit(each, 5, 0.7)
    assert restored.take_metrics() == progress.take_metrics()


def test_the_share_done_is_by_the_nearest_limit():
    progress = Progress(step=10, images=300, tokens=1000)
    assert progress.share_done(TrainConfig(max_epochs=3)) is None
    assert progress.share_done(TrainConfig(max_steps=40)) == 0.25
    assert progress.share_done(TrainConfig(max_images=400, max_tokens=10_000)) == 0.75
    assert progress.share_done(TrainConfig(max_steps=10, max_images=400)) == 1


def test_the_share_shown_counts_passes_over_the_data_the_images_that_were_rejected_too():
    progress = Progress(step=10, images=300, rejected=60, tokens=1000)
    by_epochs = TrainConfig(max_epochs=3)
    assert progress.share_shown(by_epochs, 240) == 0.5
    assert progress.share_shown(by_epochs, 100) == 1
    assert progress.share_shown(by_epochs, None) is None
    assert progress.share_shown(TrainConfig(max_epochs=3, max_steps=16), 240) == 10 / 16
    assert progress.share_shown(TrainConfig(max_steps=40), 240) == 0.25


def test_progress_is_read_from_checkpoints_of_today_and_of_format_1():
    progress = Progress()
    _commit(progress, 2, 1.0)
    saved = json.loads(json.dumps(asdict(progress)))
    assert Progress.from_saved(saved) == progress
    saved["window"] = saved.pop("since_log")  # its name before
    assert Progress.from_saved(saved) == progress


@pytest.mark.parametrize(
    "change",
    [{"step": None}, {"step": "2"}, {"tokens": [1]}, {"since_log": {"a": "b"}}, {"unknown": 1}],
)
def test_a_progress_that_was_rewritten_with_other_types_is_refused_by_field(change):
    name = next(iter(change))
    with pytest.raises(ValueError, match=rf"progress in trainer\.json is damaged .*{name}"):
        Progress.from_saved(asdict(Progress(step=1)) | change)
