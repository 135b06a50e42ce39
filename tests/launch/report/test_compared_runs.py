"""Several runs on one page: drawn over each other, aligned, and told apart."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from launch.report.axes import along
from launch.report.compared_runs import MAX_RUNS, ComparedRuns
from launch.report.logged_run import read_run
from launch.report.page import write_report
from launch.report.tables import config_changes
from tests.launch.report.reported_runs import (
    CHARTS_IN_PAGE,
    Page,
    row,
    write_full_run,
    write_metrics,
    write_second_run,
)
from zeta import metric_names as names


@pytest.fixture
def full_run(tmp_path):
    return write_full_run(tmp_path / "first")


def _compared(runs: list[Path], out: Path, axis: str = "step") -> Page:
    return Page(write_report(runs[0], out, runs[1:], axis).read_text(encoding="utf-8"))


def test_runs_are_drawn_over_each_other_with_a_legend_in_every_chart(full_run, tmp_path):
    other = write_second_run(full_run, tmp_path / "other", "second try")
    out = tmp_path / "compared.html"
    page = _compared([full_run, other], out)
    svgs = re.findall(r"<figure class=\"card.*?</figure>", out.read_text(), re.DOTALL)
    figures = [svg for svg in svgs if "<svg" in svg]
    assert len(figures) == CHARTS_IN_PAGE
    for figure in figures:
        assert "first try" in figure
        assert "second try" in figure
        for colour in ("--series-1", "--series-2"):
            assert re.search(rf"stroke: var\({colour}\)|fill: var\({colour}\)", figure), figure[:80]
    assert "Settings that differ: 3" in page.text
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_settings_that_differ_are_listed_with_the_value_of_each_run():
    a = {"optim": {"lr": 0.1, "betas": [0.9, 0.95]}, "data": {"shards": "x"}, "only": 1}
    b = {"optim": {"lr": 0.2, "betas": [0.9, 0.95]}, "data": {"shards": "x"}, "new": {"key": None}}
    assert dict(config_changes([a, b])) == {"optim.lr": [0.1, 0.2], "only": [1, None]}
    assert list(config_changes([a, a])) == []


def test_runs_are_aligned_by_step_tokens_images_or_time(full_run, tmp_path):
    other = write_second_run(full_run, tmp_path / "other", "second try", tokens_a_step=4000)
    records = [read_run(full_run), read_run(other)]
    steps = np.array([0.0, 5.0, 100.0, 300.0])
    assert along(records[0], "step", steps).tolist() == steps.tolist()
    assert along(records[0], "tokens", steps).tolist() == (2000 * steps).tolist()
    assert along(records[1], "tokens", steps).tolist() == (4000 * steps).tolist()
    assert along(records[1], "images", steps).tolist() == (50 * steps).tolist()
    assert along(records[1], "time", steps).tolist() == pytest.approx((0.1 * steps).tolist())
    for axis, label in (("tokens", "tokens seen"), ("time", "seconds in training steps")):
        page = _compared([full_run, other], tmp_path / f"{axis}.html", axis)
        assert label in page.text
    with pytest.raises(ValueError, match="choose one of step, tokens"):
        _compared([full_run, other], tmp_path / "no.html", "epochs")
    write_metrics(other, [{"step": 10, names.TRAIN_LOSS: 1.0}])
    with pytest.raises(ValueError, match=r"other did not log data/tokens_seen"):
        _compared([full_run, other], tmp_path / "no.html", "tokens")
    assert not (tmp_path / "no.html").exists()


def test_a_long_run_has_an_axis_of_hours(full_run):
    write_metrics(full_run, [{**row(step), names.STEP_S: 60.0} for step in range(10, 310, 10)])
    runs = ComparedRuns([read_run(full_run)], "time")
    assert runs.axis_label == "hours in training steps"
    assert runs.curve(runs.first, names.FILL).steps[-1] == pytest.approx(5.0)


def test_comparing_a_run_with_itself_or_with_too_many_is_refused(full_run, tmp_path):
    with pytest.raises(ValueError, match="given twice"):
        _compared([full_run, full_run / ".." / full_run.name], tmp_path / "no.html")
    others = [tmp_path / str(number) for number in range(MAX_RUNS)]
    for folder in others:
        shutil.copytree(full_run, folder)
    with pytest.raises(ValueError, match="at most 8"):
        _compared([full_run, *others], tmp_path / "no.html")
    page = _compared([full_run, *others[1:]], tmp_path / "yes.html")
    assert str(others[3]) in page.text  # runs of one name are told apart by their directories
