"""metrics.csv and TensorBoard's files hold what metrics.jsonl holds, after a resume too."""

from __future__ import annotations

import csv
import errno
from pathlib import Path

import pytest

from launch.config.destinations import check_destinations
from launch.config.load import load_config
from zeta.tracking import csv_sink, tensorboard_sink
from zeta.tracking.config import TrackerConfig
from zeta.tracking.csv_sink import CsvSink
from zeta.tracking.sinks import JsonlSink, SinkOfAll
from zeta.tracking.tensorboard_sink import TensorBoardSink


def sinks(folder: Path, resume_step: int, said: list[str] | None = None) -> SinkOfAll:
    notify = (said if said is not None else []).append
    jsonl = folder / "metrics.jsonl"
    table = CsvSink(folder / "metrics.csv", jsonl, notify)
    return SinkOfAll([JsonlSink(jsonl, resume_step, notify), table])


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_table_has_a_column_for_each_metric_whenever_it_appears(tmp_path):
    sink = sinks(tmp_path, 0)
    sink.log(1, {"train/loss": 1.5})
    sink.log(2, {"train/loss": 1.25, "balance/slowest_host": 'a, "b"'})
    sink.log(3, {"train/loss": 1.0})
    sink.close()
    empty = {"balance/slowest_host": ""}
    assert rows(tmp_path) == [
        {"step": "1", **empty, "train/loss": "1.5"},
        {"step": "2", "balance/slowest_host": 'a, "b"', "train/loss": "1.25"},
        {"step": "3", **empty, "train/loss": "1.0"},
    ]


def test_a_resume_drops_from_the_table_what_it_drops_from_the_lines(tmp_path):
    sink = sinks(tmp_path, 0)
    for step in (1, 2, 3):
        sink.log(step, {"train/loss": float(step)})
    sink.close()
    jsonl = JsonlSink(tmp_path / "metrics.jsonl", 2)
    SinkOfAll([jsonl, CsvSink(tmp_path / "metrics.csv", tmp_path / "metrics.jsonl")]).log(
        3, {"b": 1}
    )
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2", "3"]
    assert rows(tmp_path)[2] == {"step": "3", "b": "1", "train/loss": ""}


def test_a_table_that_cannot_be_written_is_made_anew_when_it_can(tmp_path, monkeypatch):
    said: list[str] = []
    sink = sinks(tmp_path, 0, said)
    write = csv_sink.write_whole_text

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(csv_sink, "write_whole_text", full)
    for step in (1, 2):
        sink.log(step, {"train/loss": 1.0})
    assert len(said) == 1
    assert "metrics.csv cannot be written (No space left on device)" in said[0]
    monkeypatch.setattr(csv_sink, "write_whole_text", write)
    sink.log(3, {"train/loss": 1.0})
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2", "3"]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = TensorBoardSink(tmp_path, 0)
    for step in (1, 2, 3):
        first.log(step, {"train/loss": 10.0 + step, "balance/slowest_host": "text is left out"})
    first.close()
    second = TensorBoardSink(tmp_path, 2)
    second.log(3, {"train/loss": 20.0})
    second.flush()
    second.close()
    shown = EventAccumulator(str(tmp_path))
    shown.Reload()
    assert shown.Tags()["scalars"] == ["train/loss"]
    assert [(e.step, e.value) for e in shown.Scalars("train/loss")] == [(1, 11), (2, 12), (3, 20)]


def test_trackers_are_one_or_a_list_and_wandb_is_off_where_it_is_not_named():
    assert TrackerConfig().kind == ["wandb"]
    assert TrackerConfig().wandb.mode == "auto"
    assert TrackerConfig(kind="csv").kind == ["csv"]
    assert TrackerConfig(kind=["csv", "tensorboard"]).wandb.mode == "disabled"
    assert TrackerConfig(kind=[]).wandb.mode == "disabled"
    assert TrackerConfig(kind=["csv", "csv"]).kind == ["csv"]
    with pytest.raises(ValueError, match=r"tracker\.kind is 5; give one of wandb"):
        TrackerConfig(kind=5)
    with pytest.raises(ValueError, match=r"tracker\.kind is 'mlflow'; choose one of csv"):
        TrackerConfig(kind="mlflow")


def test_tensorboard_that_is_not_installed_is_refused_before_a_run(monkeypatch):
    config = load_config("demo", ["data.shards=x", "tracker.kind=[csv,tensorboard]"])
    monkeypatch.setattr(tensorboard_sink, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"not installed: type `pip install tensorboard`"):
        check_destinations(config)
