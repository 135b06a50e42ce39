from __future__ import annotations

import html.parser
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from launch.charts import CHARTS, LOSS, validation_charts
from launch.headlines import headlines
from launch.pack_picture import PackedImage, PackPicture, draw_pack
from launch.report import write_report
from launch.run_record import read_run
from zeta import metric_names as names

VOID = {"meta", "br", "img", "link", "input", "hr"}
CHARTS_IN_PAGE = len(CHARTS) + 2  # and loss, and accuracy by resolution
HOSTILE = "</pre></script><script>alert(1)</script><img src=x onerror=alert(2)>&\"'$\\frac{$"


def _row(step: int) -> dict[str, float]:
    return {
        "step": step,
        names.TRAIN_LOSS: 2.3 * math.exp(-step / 100),
        names.LEARNING_RATE: 1e-3,
        names.GRAD_NORM: 1.0 + math.sin(step),
        names.IMAGES_PER_S: 500.0 + step % 7,
        names.TOKENS_PER_S: 20_000.0,
        names.STEP_S: 0.1,
        names.DATA_WAIT_S: 0.01,
        names.FILL: 0.98,
        names.IMAGES_SEEN: step * 50,
        names.TOKENS_SEEN: step * 2000,
    }


def _write_metrics(run_dir: Path, rows: list[dict], tail: str = "") -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (run_dir / "metrics.jsonl").write_text(lines + tail)


@pytest.fixture
def open_run(tmp_path):
    """A run that is still going: metrics and nothing else."""
    _write_metrics(tmp_path, [_row(step) for step in range(10, 310, 10)])
    return tmp_path


@pytest.fixture
def full_run(open_run):
    """A run with everything a report can show."""
    result = {"val_top1": 0.9712, "train_seconds": 151.4, "fill": 0.9853, "images_per_s": 612.0}
    resolutions = {"native": {"top1": 0.9712}, "48": {"top1": 0.98}, "96": {"top1": 0.975}}
    evaluation = {"top1": 0.9712, "top5": 0.999, "by_resolution": resolutions}
    (open_run / "result.json").write_text(json.dumps(result))
    (open_run / "eval.json").write_text(json.dumps(evaluation))
    (open_run / "config.yaml").write_text(
        "run: {name: first try}\n"
        "data: {token_budget: 1024, resolution: {kind: side, min: 32, max: 96}}\n"
        "train: {packs_per_step: 4, max_steps: 300}\n"
    )
    (open_run / "quarantine.jsonl").write_text(
        json.dumps({"key": "cat_7", "shard": "a.tar", "reason": "truncated JPEG"}) + "\n"
    )
    rng = np.random.default_rng(0)
    kept = rng.random((5, 6)) < 0.7
    pixels = rng.integers(0, 256, (40, 48, 3)).astype(np.uint8)
    (open_run / "pack.svg").write_bytes(
        draw_pack(PackPicture((PackedImage(pixels, kept, "7"),), 8, token_budget=64))
    )
    (open_run / "FINISHED").touch()
    return open_run


class _Page(html.parser.HTMLParser):
    """Checks the nesting of tags and collects what a browser would act on."""

    def __init__(self, page: str):
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.stack, f"never closed: {self.stack}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        assert self.stack, f"</{tag}> closes nothing"
        opened = self.stack.pop()
        assert opened == tag, f"</{tag}> closes <{opened}>"

    def handle_data(self, data):
        if not self.stack or self.stack[-1] != "style":
            self.text += data


def _page(run_dir: Path) -> _Page:
    return _Page(write_report(run_dir).read_text(encoding="utf-8"))


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
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form")
        for name in ("src", "href", "xlink:href", "action", "srcset"):
            assert attributes.get(name, "data:").startswith(("data:", "#")), (tag, attributes)
    raw = (full_run / "report.html").read_text()
    assert "http:" not in raw
    assert "https:" not in raw
    assert "@import" not in raw
    assert "default-src 'none'" in raw


def test_every_figure_and_number_is_there(full_run):
    page = _page(full_run)
    assert [tag for tag, _ in page.tags].count("svg") == CHARTS_IN_PAGE
    assert not [attributes for _, attributes in page.tags if attributes.get("class") == "absent"]
    shown = ["first try", "Finished", "97.1%", "99.9%", "2 min 31 s", "612", "98.5%", "15,000"]
    for words in [*shown, "truncated JPEG", "cat_7", "native 97.1%", "trained at 32 to 96"]:
        assert words in page.text, words


def test_a_run_that_is_still_going_says_what_is_missing(open_run):
    page = _page(open_run)
    assert "Not finished" in page.text
    assert "last metrics at step 300" in page.text
    for missing in ("There is no config.yaml", "There is no picture of a pack", "eval.json"):
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
    _write_metrics(open_run, [_row(10), _row(20), _evaluated(20), _row(40), _evaluated(40)])
    loss, top1 = validation_charts(read_run(open_run))
    assert [label for label, _ in loss.curves] == [
        "size of training", "64 tokens", "256 tokens", "average of the weights",
    ]  # fmt: skip
    assert top1.curves == (
        ("size of training", "val/top1"), ("64 tokens", "val/top1_at_64_tokens"),
    )  # fmt: skip
    page = _page(open_run)
    assert [tag for tag, _ in page.tags].count("svg") == before + 2
    for words in ("Validation loss", "Validation top-1", "256 tokens", "last 54%"):
        assert words in page.text, words
    assert _headline(open_run, "Validation top-1") == ("54%", "while it trained")


def test_another_objective_is_drawn_by_its_own_headline_score(open_run):
    recall = "image_to_text_recall1"
    scores = {"val/loss": 1.0, f"val/{recall}": 0.25, f"val/best_{recall}": 0.25}
    _write_metrics(open_run, [_row(10), {"step": 10, **scores, "val/best_step": 10}])
    titles = [chart.title for chart in validation_charts(read_run(open_run))]
    assert titles == ["Validation loss", "Validation image to text recall1"]


def test_a_line_cut_short_is_left_out_and_named(open_run):
    rows = [_row(10), _row(20)]
    _write_metrics(open_run, rows, tail='{"step": 30, "train/loss": 1.')
    run = read_run(open_run)
    assert run.steps == 20
    assert any("One line of metrics.jsonl could not be read" in note for note in run.notes)
    assert "One line of metrics.jsonl" in _page(open_run).text


def test_a_loss_that_is_not_finite_is_said_and_the_rest_drawn(open_run):
    rows = [_row(step) for step in range(10, 200, 10)]
    rows[5][names.TRAIN_LOSS] = rows[6][names.TRAIN_LOSS] = float("nan")
    rows[7][names.TRAIN_LOSS] = float("inf")
    _write_metrics(open_run, rows)
    page = _page(open_run)
    assert "The loss is not finite at 3 logged steps" in page.text
    assert [tag for tag, _ in page.tags].count("svg") == CHARTS_IN_PAGE - 1  # no eval.json


@pytest.mark.parametrize(
    "metric", [metric for chart in (LOSS, *CHARTS) for _, metric in chart.curves]
)
def test_a_metric_without_a_finite_value_costs_only_its_chart(open_run, metric):
    rows = [{**_row(step), metric: float("nan")} for step in (10, 20)]
    _write_metrics(open_run, rows)
    nan_only = _page(open_run)
    _write_metrics(open_run, [{k: v for k, v in row.items() if k != metric} for row in rows])
    absent = _page(open_run)
    for page in (nan_only, absent):
        assert [tag for tag, _ in page.tags].count("svg") >= CHARTS_IN_PAGE - 2


def test_a_step_logged_twice_counts_once_and_the_later_line_wins(open_run):
    _write_metrics(
        open_run, [_row(10), {**_row(20), names.FILL: 0.1}, {**_row(20), names.FILL: 0.9}]
    )
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
    (full_run / "eval.json").write_text(json.dumps({"top1": 0.5, "by_resolution": table}))
    (full_run / "quarantine.jsonl").write_text(
        json.dumps({"key": HOSTILE, "shard": HOSTILE, "reason": HOSTILE}) + "\n"
    )
    (full_run / "pack.svg").write_text(HOSTILE)
    page = _page(full_run)
    assert page.text.count(HOSTILE) >= 4
    for tag, attributes in page.tags:
        assert tag != "script"
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


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)

# The page forbids scripts, so it is measured from outside: from a page that frames it.
MEASURE = """<!doctype html><title>measure</title><body><script>
const page = %s, widths = %s, found = [];
let left = widths.length;
for (const width of widths) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${width}px;height:900px;border:0`;
  frame.srcdoc = page;
  frame.onload = () => {
    const inner = frame.contentDocument;
    const size = item => { const box = item.getBoundingClientRect();
                           return [Math.round(box.width), Math.round(box.height)]; };
    found.push({
      width, scroll: inner.documentElement.scrollWidth,
      charts: [...inner.querySelectorAll(".card svg")].map(size),
      lines: [...inner.querySelectorAll(".card svg path")]
        .filter(p => p.style.stroke.includes("--series")).map(p => p.getTotalLength()),
      stroke: getComputedStyle(inner.querySelector(".card svg path[style*='--series-1']")).stroke,
      pack: [...inner.querySelectorAll("img")].map(i => [i.complete, i.naturalWidth, ...size(i)]),
      tiles: [...inner.querySelectorAll(".tile .value")].map(t => t.scrollWidth <= t.clientWidth),
    });
    if (--left === 0) document.title = JSON.stringify(found);
  };
  document.body.append(frame);
}
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed (apt-get install chromium)")
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_a_browser_draws_every_figure_on_a_phone_and_a_desk(full_run, tmp_path, scheme):
    page = json.dumps(write_report(full_run).read_text()).replace("</", "<\\/")
    outside = tmp_path / "measure.html"
    outside.write_text(MEASURE % (page, [360, 390, 768, 1280]))
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1300,1000",
         f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
         "--virtual-time-budget=5000", "--dump-dom", outside.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not console, console
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title is not None
    assert title[1] != "measure", done.stderr[-2000:]
    found = json.loads(html.unescape(title[1]))
    assert len(found) == 4
    for at in found:
        assert at["scroll"] <= at["width"], f"scrolls sideways at {at['width']} px"
        assert len(at["charts"]) == CHARTS_IN_PAGE
        assert all(w >= 200 and h >= 100 for w, h in at["charts"]), at
        assert len(at["lines"]) >= CHARTS_IN_PAGE
        assert sum(length > 10 for length in at["lines"]) >= CHARTS_IN_PAGE
        assert [complete and natural > 0 and w > 200 for complete, natural, w, _ in at["pack"]] == [
            True
        ]
        assert all(at["tiles"]), f"a headline is cut off at {at['width']} px"
        assert at["stroke"] == ("rgb(120, 173, 255)" if scheme == "dark" else "rgb(36, 99, 196)")
