"""A viewer whose clock differs from that of the ranks judges them by theirs."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict

import pytest

from launch.status.snapshot import _time_of_ranks
from zeta.run.heartbeat import Heartbeat


def write(folder, when):
    beat = Heartbeat("train", 7, 0.5, 900.0, when, 0, "elsewhere", 5)
    (folder / "rank_00000.json").write_text(json.dumps(asdict(beat)))


@pytest.mark.parametrize("ahead_s", [60.0, 3600.0, -60.0, -3600.0])
def test_ranks_that_beat_are_fresh_by_any_clock(tmp_path, ahead_s):
    write(tmp_path, time.time() - ahead_s)
    threading.Timer(0.2, write, [tmp_path, time.time() - ahead_s + 0.2]).start()
    assert abs(_time_of_ranks(tmp_path, 0.4) - (time.time() - ahead_s)) < 2


@pytest.mark.parametrize("ahead_s", [60.0, -60.0])
def test_ranks_that_do_not_beat_are_silent_by_any_clock(tmp_path, ahead_s):
    last = time.time() - ahead_s
    write(tmp_path, last)
    assert _time_of_ranks(tmp_path, 0.2) - last >= 30


def test_a_fresh_heartbeat_is_not_waited_for(tmp_path):
    write(tmp_path, time.time() - 5)
    began = time.monotonic()
    assert abs(_time_of_ranks(tmp_path, 5.0) - time.time()) < 1
    assert time.monotonic() - began < 1
