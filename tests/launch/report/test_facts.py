"""What a report says a run is, and accuracy by class."""

from __future__ import annotations

import json

import pytest

from launch.report.class_table import class_section
from launch.report.compared_runs import ComparedRuns
from launch.report.facts import facts, facts_rows
from launch.report.logged_run import read_run
from launch.report.page import build_page
from tests.launch.report.reported_runs import Page, row, write_metrics, write_open_run

START = {
    "step": 0, "ranks": 3, "time": "2026-03-01T12:30:10+02:00", "hosts": ["n1", "n2"],
    "devices": {"NVIDIA H100": 2, "CPU x": 1}, "parameters": 86_000_000,
    "code": {"package": "1", "commit": "a" * 40, "dirty": True},
}  # fmt: skip


@pytest.fixture
def path(tmp_path):
    return write_open_run(tmp_path / "run")


def _start(path, *starts):
    (path / "starts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))


def _facts(path) -> dict[str, str]:
    return dict(facts(read_run(path)))


def test_a_run_says_when_where_of_which_code_and_how_large_it_is(path):
    _start(path, START)
    assert _facts(path) == {
        "Date": "2026-03-01 10:30 UTC",
        "Host": "n1, n2",
        "Device": "NVIDIA H100 (2 ranks), CPU x (1 rank)",
        "Commit": "aaaaaaaaaaaa, with changes",
        "Parameters": "86,000,000 (86M)",
        "Batch size": "50 images, 2,000 tokens a step on average",
    }
    text = Page(build_page(ComparedRuns([read_run(path)]))).text
    for fact in _facts(path).values():
        assert fact in text


def test_the_facts_are_those_of_the_last_start_and_the_starts_are_listed_with_their_own(path):
    later = {**START, "time": "2026-03-02T00:00:00+00:00", "hosts": [f"m{n}" for n in range(9)]}
    _start(path, START, later)
    found = _facts(path)
    assert found["Date"] == "2026-03-01 10:30 UTC, last start 2026-03-02 00:00 UTC"
    assert found["Host"] == "9 hosts: m0, m1, m2, m3, ..."
    text = Page(build_page(ComparedRuns([read_run(path)]))).text
    for words in ("Started 2 times", "n1, n2", "9 hosts"):
        assert words in text


def test_a_directory_of_an_older_version_gives_what_it_holds(path):
    assert list(_facts(path)) == ["Batch size"]
    _start(path, {"step": 0, "ranks": 2, "time": "2026-03-01T10:30:00+00:00"})
    version = "zeta 0.1.0, commit {}, unchanged\n"
    diff = version.format("b" * 40) + " zeta 9, commit 1234567, unchanged\n"
    (path / "code.diff").write_text(diff + version.format("c" * 40))
    assert _facts(path) == {
        "Date": "2026-03-01 10:30 UTC",
        "Commit": "c" * 12,
        "Batch size": "50 images, 2,000 tokens a step on average",
    }
    write_metrics(path, [{"step": 10, "train/loss": 1.0}])
    assert list(_facts(path)) == ["Date", "Commit"]


@pytest.mark.slow
@pytest.mark.parametrize("odd", [None, 7, "x", [1], {"a": None}, True])
def test_facts_of_another_kind_are_left_out_and_break_nothing(path, odd):
    keys = ("time", "hosts", "devices", "parameters", "code")
    _start(path, *({"step": 0, key: odd} for key in keys), {"step": odd})
    page = build_page(ComparedRuns([read_run(path)]))
    assert "Started 6 times" in page
    _start(path, {"step": 0, **dict.fromkeys(keys, odd)})
    assert "Batch size" in build_page(ComparedRuns([read_run(path)]))


def test_compared_runs_have_their_facts_side_by_side(path, tmp_path):
    _start(path, START)
    other = write_open_run(tmp_path / "other")
    write_metrics(other, [{**row(10), "data/images_seen": 640}])
    runs = ComparedRuns([read_run(path), read_run(other)])
    rows = {label: values for label, *values in facts_rows(runs)}
    assert rows["Host"] == ["n1, n2", "\u2013"]
    assert rows["Batch size"][1] == "64 images, 2,000 tokens a step on average"
    assert "n1, n2" in build_page(runs)


def test_accuracy_by_class_is_listed_lowest_first_for_every_run(path, tmp_path):
    scores = {"cat": {"top1": 0.9, "images": 1000}, "<dog>": {"top1": 0.25, "images": 3}}
    (path / "eval.json").write_text(json.dumps({"per_class": {**scores, "odd": 1, "no": {}}}))
    section = class_section(ComparedRuns([read_run(path)]))
    text = Page(section).text
    for words in ("2 classes", "90.0%", "1,000", "25.0%"):
        assert words in text
    assert text.index("<dog>") < text.index("cat")
    assert "odd" not in text
    other = write_open_run(tmp_path / "other")
    assert "\u2013" in Page(class_section(ComparedRuns([read_run(other), read_run(path)]))).text


@pytest.mark.parametrize("table", [{}, {"per_class": None}, {"per_class": {"a": {"top1": "x"}}}])
def test_without_scores_of_classes_there_is_no_table(path, table):
    (path / "eval.json").write_text(json.dumps(table))
    assert class_section(ComparedRuns([read_run(path)])) == ""


def test_many_classes_are_cut_and_counted(path):
    scores = {f"class {n}": {"top1": n / 3000} for n in range(2500)}
    (path / "eval.json").write_text(json.dumps({"per_class": scores}))
    section = class_section(ComparedRuns([read_run(path)]))
    assert "500 more in eval.json" in section
    assert "<details>" in section
    assert section.count("<tr>") == 2001
