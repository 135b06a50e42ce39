"""A loader that binds for long is said once, and again only after it has kept up."""

from __future__ import annotations

from zeta.train.device_clock import DeviceTime
from zeta.train.progress import Progress
from zeta.train.supply import LONG_S, SupplyWatch


def test_a_loader_that_binds_for_long_is_said_once():
    watch = SupplyWatch()
    assert watch.warning(0.5, LONG_S - 1) is None
    said = watch.warning(0.5, 60)
    assert said is not None
    assert "training has waited for data, now 50% of the time" in said
    assert "zeta shards shrink" in said
    assert watch.warning(0.5, 10 * LONG_S) is None


def test_a_loader_that_has_kept_up_begins_anew():
    watch = SupplyWatch()
    for _ in range(10):
        assert watch.warning(0.5, LONG_S - 1) is None
        assert watch.warning(0.95, LONG_S) is None
    watch.warning(0.2, LONG_S)
    watch.warning(1.0, 1)
    assert watch.warning(0.2, LONG_S) is not None


def test_the_ratio_is_the_share_of_a_step_without_waiting():
    progress = Progress()
    for seconds, waited in ((1.0, 0.5), (3.0, 0.5)):
        progress.commit(
            images=1, tokens=1, rejected=0, budget=1, flops=0, epoch=0, result=None,
            seconds=seconds, waited=waited, device=DeviceTime(0, 0, 0),
        )  # fmt: skip
    assert progress.take_metrics()["data/supply_ratio"] == 0.75
