"""`launch_local`: what is refused before any rank starts, and the status of a whole run."""

from __future__ import annotations

import signal

import pytest

from launch.local import combined_exit_code, launch_local


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0, 0], 0),
        ([], 0),
        ([1, 93, 85], 93),
        ([1, 85, 130], 85),
        ([7, 130], 130),
        ([0, 7, 3], 7),
        ([0, -signal.SIGKILL], 137),
        ([-signal.SIGTERM, 85], 85),
    ],
)
def test_the_status_that_asks_for_most_care_wins(codes, expected):
    assert combined_exit_code(codes) == expected


def test_a_wrong_config_is_said_once_before_any_rank_starts(capfd):
    with pytest.raises(ValueError, match=r"did you mean optim\.lr"):
        launch_local("demo", ["data.shards=x", "train.lr=1"], 2)
    assert capfd.readouterr() == ("", "")


def test_more_ranks_than_packs_are_refused(capfd):
    with pytest.raises(ValueError, match=r"3 ranks .* train\.packs_per_step = 2"):
        launch_local("demo", ["data.shards=x", "train.packs_per_step=2"], 3)
    assert capfd.readouterr() == ("", "")
