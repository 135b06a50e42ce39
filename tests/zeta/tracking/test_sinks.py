"""metrics.jsonl, and how a resume cuts it."""

import json
import resource
from contextlib import contextmanager

import pytest

from zeta.run.jsonl import cut_after
from zeta.tracking.sinks import JsonlSink, NoSink, OnlyNew, WithAxes, last_logged_steps


def _steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def _filled(path, steps):
    sink = JsonlSink(path, 10**9)
    for step in steps:
        sink.log(step, {"train/loss": 1.0 / step})
    sink.close()


def test_each_line_holds_the_step_and_the_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    _filled(path, [1, 2])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "train/loss": 1.0},
        {"step": 2, "train/loss": 0.5},
    ]


def test_a_resume_cuts_to_the_step_of_the_checkpoint_and_keeps_what_it_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    _filled(path, [1, 2, 3, 4])
    sink = JsonlSink(path, 2)
    sink.log(3, {})
    sink.close()
    assert _steps(path) == [1, 2, 3]
    assert _steps(tmp_path / "metrics.jsonl.attempt-1") == [3, 4]
    JsonlSink(path, 0).close()
    assert path.read_text() == ""
    assert _steps(tmp_path / "metrics.jsonl.attempt-2") == [1, 2, 3]
    assert last_logged_steps(path) == {}
    assert last_logged_steps(path, ever=True) == {"step": 4, "train/loss": 4}


def test_a_line_torn_by_a_crash_is_cut_and_nothing_is_cut_without_need(tmp_path):
    path = tmp_path / "metrics.jsonl"
    _filled(path, [1, 2])
    cut_after(path, 2)
    assert not (tmp_path / "metrics.jsonl.attempt-1").exists()
    with path.open("a") as file:
        file.write('{"step": 2, "train/lo')
    cut_after(path, 5)
    assert _steps(path) == [1, 2]
    assert (tmp_path / "metrics.jsonl.attempt-1").read_text() == '{"step": 2, "train/lo'


@contextmanager
def room_for(nbytes):
    """Files of this process may have so many bytes: a disk that is full in the midst of a line."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_delays_lines_is_told_once_and_loses_none(tmp_path):
    said = []
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, 0, said.append)
    with room_for(30):
        for step in range(1, 4):
            sink.log(step, {"train/loss": 0.5})
        with pytest.raises(OSError, match="File too large"):
            sink.flush()
        assert path.stat().st_size == 30
    assert [text.count(f"{path} cannot be written (File too large)") for text in said] == [1]
    sink.log(4, {})
    assert _steps(path) == [1, 2, 3, 4]
    with room_for(30):
        sink.log(5, {})
        sink.close()
    assert len(said) == 3  # that it is full again, and what it cost
    assert "the last lines of" in said[2]
    assert _steps(path) == [1, 2, 3, 4]


def test_a_run_without_metrics_has_logged_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    cut_after(path, 3)
    assert last_logged_steps(path, ever=True) == {}
    assert not path.exists()


def test_a_metric_that_a_step_has_is_not_logged_again_and_one_that_it_lacks_is(tmp_path):
    path = tmp_path / "metrics.jsonl"
    _filled(path, [2, 4])
    sink = OnlyNew(JsonlSink(path, 4), last_logged_steps(path))
    sink.log(4, {"train/loss": 9.0})
    sink.log(4, {"train/loss": 9.0, "val/loss": 8.0})
    sink.log(6, {"train/loss": 7.0})
    sink.close()
    assert [json.loads(line) for line in path.read_text().splitlines()[2:]] == [
        {"step": 4, "val/loss": 8.0},
        {"step": 6, "train/loss": 7.0},
    ]


def test_every_row_can_be_drawn_over_images_and_tokens(tmp_path):
    path = tmp_path / "metrics.jsonl"
    seen = {"data/images_seen": 5, "data/tokens_seen": 70}
    sink = WithAxes(JsonlSink(path, 0), lambda step: seen if step < 3 else {})
    sink.log(1, {"train/loss": 2.0})
    seen["data/images_seen"] = 9
    sink.log(2, {"val/loss": 1.0})
    sink.log(3, {"checkpoint/save_s": 1.0})
    sink.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row.get("data/images_seen") for row in rows] == [5, 9, None]
    assert [row.get("data/tokens_seen") for row in rows] == [70, 70, None]
    assert rows[1]["val/loss"] == 1.0


def test_ranks_without_a_file_have_a_sink_all_the_same(tmp_path):
    sink = NoSink()
    sink.log(7, {"x": 1.0})
    sink.flush()
    sink.close()
    assert not list(tmp_path.iterdir())
