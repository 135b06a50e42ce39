"""SAVE_NOW and STOP in a run directory, as rank 0 sees them."""

import time

import pytest

from zeta.exit_codes import ExitCode
from zeta.run.directory import RunDir
from zeta.run.requests import RequestFiles
from zeta.run.signals import StopSignals


@pytest.fixture
def run_dir(tmp_path):
    return RunDir(tmp_path)


def test_save_now_is_asked_until_it_is_done_and_the_file_goes_then(run_dir):
    requests = RequestFiles(run_dir, look_s=0)
    assert not requests.save_asked()
    run_dir.save_request.touch()
    assert requests.save_asked()
    assert requests.save_asked()
    requests.taken()
    assert not requests.save_asked()
    assert run_dir.save_request.exists()
    requests.saved()
    assert not requests.save_asked()
    assert not run_dir.save_request.exists()
    run_dir.save_request.touch()
    assert requests.save_asked()


def test_a_save_that_nobody_had_asked_for_leaves_a_new_request_alone(run_dir):
    requests = RequestFiles(run_dir, look_s=0)
    requests.taken()
    run_dir.save_request.touch()
    requests.saved()
    assert requests.save_asked()


def test_a_request_during_a_save_asks_for_another(run_dir):
    requests = RequestFiles(run_dir, look_s=0)
    run_dir.save_request.touch()
    assert requests.save_asked()
    requests.taken()
    time.sleep(0.02)
    run_dir.save_request.touch()
    requests.saved()
    assert requests.save_asked()


def test_a_request_that_cannot_be_deleted_is_honoured_once(run_dir):
    requests = RequestFiles(run_dir, look_s=0)
    run_dir.save_request.mkdir()  # unlink fails
    assert requests.save_asked()
    requests.taken()
    requests.saved()
    assert not requests.save_asked()


def test_stop_holds_once_it_was_seen_and_its_file_stays(run_dir):
    requests = RequestFiles(run_dir, look_s=0)
    with StopSignals(requests.stop_asked) as signals:
        assert signals.requested is None
        run_dir.stop_request.touch()
        assert signals.requested is ExitCode.INTERRUPTED
        run_dir.stop_request.unlink()
        assert signals.requested is ExitCode.INTERRUPTED


def test_the_disk_is_looked_at_once_an_interval_however_often_it_is_asked(run_dir, monkeypatch):
    requests = RequestFiles(run_dir, look_s=0.2)
    assert not requests.save_asked()
    run_dir.save_request.touch()
    assert not requests.save_asked()
    time.sleep(0.2)
    assert requests.save_asked()


def test_asking_costs_a_step_nothing(run_dir):
    requests = RequestFiles(run_dir)
    requests.save_asked()
    began = time.process_time()
    for _ in range(10_000):
        requests.save_asked()
    assert time.process_time() - began < 0.5  # 50 us a call; it takes less than 1


def test_other_ranks_look_at_no_disk():
    requests = RequestFiles(None, look_s=0)
    assert (requests.save_asked(), requests.stop_asked()) == (False, None)
    requests.saved()
