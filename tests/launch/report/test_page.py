from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from launch.cli import entry_point
from launch.report.chart_cards import chart_card
from launch.report.chart_specs import CHARTS, LOSS, score_by_tokens, validation_charts
from launch.report.compared_runs import ComparedRuns
from launch.report.headlines import headlines
from launch.report.logged_run import read_run
from launch.report.page import check_report, write_report
from tests.launch.report.reported_runs import (
    CHARTS_IN_PAGE,
    IN_AN_OPEN_RUN,
    Page,
    row,
    write_full_run,
    write_metrics,
    write_open_run,
    write_starts,
)
from zeta import metric_names as names
from zeta.run.directory import RunDir

pytestmark = pytest.mark.slow

HOSTILE = "</pre></script><script>alert(1)</script><img src=x onerror=alert(2)>&\"'$\\frac{$"


@pytest.fixture
def open_run(tmp_path):
    return write_open_run(tmp_path)


@pytest.fixture
def full_run(tmp_path):
    return write_full_run(tmp_path)


def _page(run_dir: Path) -> Page:
    return Page(write_report(run_dir).read_text(encoding="utf-8"))


def _headline(run_dir: Path, label: str) -> tuple[str, str]:
    return next(
        (value, hint) for name, value, hint in headlines(read_run(run_dir)) if name == label
    )


def test_the_page_is_well_formed_and_ids_are_unique(full_run):
    page = _page(full_run)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    styles = " ".join(attributes.get("style", "") for _, attributes in page.tags)
    clips = " ".join(attributes.get("clip-path", "") for _, attributes in page.tags)
    for target in re.findall(r"url\(#([^)]+)\)", styles + clips):
        assert target in ids


def test_the_page_refers_to_nothing_outside_itself(full_run):
    page = _page(full_run)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        for name in ("src", "href", "xlink:href", "action", "srcset"):
            assert attributes.get(name, "data:").startswith(("data:", "#")), (tag, attributes)
    raw = (full_run / "report.html").read_text()
    assert "http:" not in raw
    assert "https:" not in raw
    assert "@import" not in raw
    assert "default-src 'none'" in raw


def test_only_the_script_of_the_package_may_run(full_run):
    write_report(full_run)
    raw = (full_run / "report.html").read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", raw, re.DOTALL)
    assert script == files("launch.report").joinpath("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'\"" in raw


def test_every_figure_and_number_is_there(full_run):
    page = _page(full_run)
    assert [tag for tag, _ in page.tags].count("svg") == CHARTS_IN_PAGE
    assert not [attributes for _, attributes in page.tags if attributes.get("class") == "absent"]
    shown = ["first try", "Finished", "97.1%", "99.9%", "2 min 31 s", "612", "98.5%", "15,000"]
    shown += ["last 41%", "Straggler ratio", "Image sizes", "of 4 images"]
    for words in [*shown, "truncated JPEG", "cat_7", "native 97.1%", "sizes of training: 32 to 96"]:
        assert words in page.text, words


def test_a_run_that_is_still_going_says_what_is_missing(open_run):
    page = _page(open_run)
    assert "Not finished" in page.text
    assert "last metrics at step 300" in page.text
    for missing in ("config.yaml is missing", "picture of a pack", "eval.json"):
        assert missing in page.text
    assert _headline(open_run, "Validation top-1") == ("\u2013", "")
    assert _headline(open_run, "Wall time") == ("30 s", "sum of the step times")
    assert _headline(open_run, "Images per second")[0] == "503"


def _evaluated(step: int) -> dict[str, float]:
    loss = 1.0 / step
    return {
        "step": step, "val/loss": loss, "val/top1": 0.5 + step / 1000, "val/images": 6,
        "val/loss_at_256_tokens": loss + 0.1, "val/loss_at_64_tokens": loss + 0.2,
        "val/top1_at_64_tokens": 0.4, "val/loss_of_average": loss - 0.01,
        "val/best_step": 40, "val/best_top1": 0.54,
    }  # fmt: skip


def test_scores_on_held_out_images_are_drawn_at_every_size_that_was_logged(open_run):
    before = [tag for tag, _ in _page(open_run).tags].count("svg")
    assert validation_charts(read_run(open_run)) == ()
    write_metrics(open_run, [row(10), row(20), _evaluated(20), row(40), _evaluated(40)])
    loss, top1 = validation_charts(read_run(open_run))
    assert [label for label, _ in loss.curves] == [
        "sizes of training", "64 tokens", "256 tokens", "average of the weights",
    ]  # fmt: skip
    assert top1.curves == (
        ("sizes of training", "val/top1"), ("64 tokens", "val/top1_at_64_tokens"),
    )  # fmt: skip
    page = _page(open_run)
    assert [tag for tag, _ in page.tags].count("svg") == before + 3  # and top-1 by tokens
    for words in ("Validation loss", "Validation top-1", "256 tokens", "last 54%"):
        assert words in page.text, words
    assert _headline(open_run, "Validation top-1") == (
        "54%",
        "during training, each image at up to the largest size there",
    )


def test_another_objective_is_drawn_by_its_own_headline_score(open_run):
    recall = "image_to_text_recall1"
    scores = {"val/loss": 1.0, f"val/{recall}": 0.25, f"val/best_{recall}": 0.25}
    write_metrics(open_run, [row(10), {"step": 10, **scores, "val/best_step": 10}])
    titles = [chart.title for chart in validation_charts(read_run(open_run))]
    assert titles == ["Validation loss", "Validation image to text recall1"]


def test_a_line_cut_short_is_left_out_and_named(open_run):
    rows = [row(10), row(20)]
    write_metrics(open_run, rows, tail='{"step": 30, "train/loss": 1.')
    run = read_run(open_run)
    assert run.steps == 20
    assert any("One line of metrics.jsonl could not be read" in note for note in run.notes)
    assert "One line of metrics.jsonl" in _page(open_run).text


def test_a_loss_that_is_not_finite_is_said_and_the_rest_drawn(open_run):
    rows = [row(step) for step in range(10, 200, 10)]
    rows[5][names.TRAIN_LOSS] = rows[6][names.TRAIN_LOSS] = float("nan")
    rows[7][names.TRAIN_LOSS] = float("inf")
    write_metrics(open_run, rows)
    page = _page(open_run)
    assert "The loss is not finite at 3 logged steps" in page.text
    assert [tag for tag, _ in page.tags].count("svg") == IN_AN_OPEN_RUN


@pytest.mark.parametrize("chart", [LOSS, *CHARTS], ids=lambda chart: chart.name)
@pytest.mark.parametrize("nan", [True, False])
def test_a_metric_without_a_finite_value_costs_only_its_curve(open_run, chart, nan):
    metrics = {metric for _, metric in chart.curves}
    for lost in metrics:
        rows = [row(10), row(20)]
        for each in rows:
            each[lost] = float("nan")
            if not nan:
                del each[lost]
        write_metrics(open_run, rows)
        figure = chart_card(ComparedRuns([read_run(open_run)]), chart)
        assert ("<svg" in figure) == (len(metrics) > 1)
        assert (lost in figure) == (len(metrics) == 1)


def test_a_page_without_any_metric_but_the_step_is_a_page(open_run):
    write_metrics(open_run, [{"step": 10}, {"step": 20, names.TRAIN_LOSS: float("nan")}])
    page = _page(open_run)
    assert [tag for tag, _ in page.tags].count("svg") == 0
    assert "The loss is not finite at 1 logged steps" in page.text


def test_a_step_logged_twice_counts_once_and_the_later_line_wins(open_run):
    write_metrics(open_run, [row(10), {**row(20), names.FILL: 0.1}, {**row(20), names.FILL: 0.9}])
    fill = read_run(open_run).series[names.FILL]
    assert fill.steps.tolist() == [10, 20]
    assert fill.values.tolist() == [0.98, 0.9]


@pytest.mark.parametrize("content", ["", "[1, 2]", '{"val_top1": ', '{"val_top1": "x"}', "null"])
def test_a_broken_result_or_evaluation_does_not_break_the_report(open_run, content):
    for name in ("result.json", "eval.json"):
        (open_run / name).write_text(content)
    (open_run / "config.yaml").write_text("a: [1\nb: {")
    assert _headline(open_run, "Validation top-1")[0] == "\u2013"
    assert "not valid YAML" in _page(open_run).text


def test_hostile_strings_stay_text(full_run):
    (full_run / "config.yaml").write_text(json.dumps({"run": {"name": HOSTILE}}))
    table = {HOSTILE: 0.5, "48": 0.6}
    scores = {"top1": 0.5, "by_resolution": table, "per_class": {HOSTILE: {"top1": 0.5}}}
    (full_run / "eval.json").write_text(json.dumps(scores))
    start = {"step": 0, "time": HOSTILE, "hosts": [HOSTILE], "devices": {HOSTILE: HOSTILE}}
    (full_run / "starts.jsonl").write_text(json.dumps(start) + "\n")
    (full_run / "quarantine.jsonl").write_text(
        json.dumps({"key": HOSTILE, "shard": HOSTILE, "reason": HOSTILE}) + "\n"
    )
    (full_run / "pack.svg").write_text(HOSTILE)
    page = _page(full_run)
    assert page.text.count(HOSTILE) >= 8
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [{}]
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert tag != "img" or attributes["src"].startswith("data:image/")


def test_a_long_quarantine_is_cut_and_counted(full_run):
    rows = [{"key": f"k{i}", "shard": "a.tar", "reason": "bad"} for i in range(200)]
    (full_run / "quarantine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = _page(full_run).text
    assert "200 images could not be used" in text
    assert "150 more in quarantine.jsonl" in text


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda path: path / "missing", "is not a folder"),
        (lambda path: path, "holds no metrics.jsonl"),
        (lambda path: (path / "metrics.jsonl").write_text('{"st') and path, "no metrics yet"),
    ],
)
def test_a_wrong_folder_is_one_clear_error(tmp_path, prepare, words):
    with pytest.raises(ValueError, match=words):
        write_report(prepare(tmp_path))
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--axis", "hours"], "the axis is 'hours'; choose one of step"),
        (["--axis", "tokens"], "did not log data/tokens_seen"),
        (["--compare", "{run}"], "is given twice"),
        (["--compare", "nowhere"], "nowhere is not a folder"),
        (["--out", "{run}"], "is a folder; give the file to write"),
        (["--out", "{run}/metrics.jsonl/a.html"], "metrics.jsonl is a file; give another --out"),
    ],
)
def test_options_are_checked_before_anything_is_prepared(
    open_run, monkeypatch, capsys, options, words
):
    def prepare(run_dir: RunDir) -> None:
        raise AssertionError(f"{run_dir.path} was prepared")

    write_metrics(open_run, [{"step": 1, "train/loss": 1.0}])
    (open_run / "config.yaml").touch()
    monkeypatch.setattr("launch.report.derived_files.write_derived_files", prepare)
    before = sorted(open_run.iterdir())
    words_given = [option.replace("{run}", str(open_run)) for option in options]
    assert entry_point(["report", str(open_run), *words_given]) == 1
    assert words in capsys.readouterr().err
    assert sorted(open_run.iterdir()) == before


def test_a_page_in_a_folder_that_may_not_be_written_is_refused(open_run, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # as for anybody but root
    with pytest.raises(ValueError, match=r"page.html cannot be written: nothing may be written"):
        check_report(open_run, open_run / "page.html")


@pytest.mark.slow
def test_the_command_writes_where_it_is_told_and_prints_the_path(full_run, tmp_path):
    out = tmp_path / "elsewhere" / "page.html"
    command = [sys.executable, "-m", "launch", "report", str(full_run), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, str(out)), done.stderr
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]
    wrong = subprocess.run(
        [*command[:4], str(tmp_path / "no")], capture_output=True, text=True, timeout=120
    )
    assert wrong.returncode != 0
    assert "is not a folder" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_restarts_and_checkpoints_are_marked_where_they_were(open_run):
    write_starts(open_run, (0, 4))
    assert "Started" not in _page(open_run).text
    write_starts(open_run, (0, 4), (100, 2), (200, 3))
    rows = [row(step) for step in range(10, 310, 10)]
    saves = [{"step": step, names.CHECKPOINT_SAVE_S: 0.5} for step in (100, 200)]
    write_metrics(open_run, rows + saves)
    run = read_run(open_run)
    assert run.restarts.tolist() == [100, 200]
    assert run.checkpoints.tolist() == [100, 200]
    page = _page(open_run)
    for words in ("Started 3 times", "at 200"):
        assert words in page.text, words
    raw = (open_run / "report.html").read_text()
    for mark in ("</i>restart<", "</i>checkpoint<"):
        assert mark in raw


def test_an_evaluation_by_tokens_is_drawn_from_the_export_s_or_else_the_run_s_own_scores(open_run):
    before = [tag for tag, _ in _page(open_run).tags].count("svg")
    scores = {"val/top1": 0.9, "val/top1_at_16_tokens": 0.5, "val/top1_at_64_tokens": 0.8}
    write_metrics(open_run, [row(10), {"step": 10, **scores, "val/best_top1": 0.9}])
    assert score_by_tokens(read_run(open_run), "top1") == [("16", 0.5), ("64", 0.8)]
    page = _page(open_run)
    assert "Top-1 by tokens" in page.text
    assert "best 80%" in page.text
    assert [tag for tag, _ in page.tags].count("svg") == before + 2  # and validation top-1
    table = {"16": {"top1": 0.6}, "36": {"top1": 0.85}}
    (open_run / "eval.json").write_text(json.dumps({"by_tokens": table}))
    assert "best 85%" in _page(open_run).text
