"""Reports in a real browser: no script errors, every figure drawn, readable on a phone, values at
the pointer, and zoom."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launch.report.page import write_report
from tests.launch.report.reported_runs import (
    CHARTS_IN_PAGE,
    row,
    write_full_run,
    write_metrics,
    write_second_run,
    write_starts,
)
from zeta import metric_names as names

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)

# The page runs no script but its own, so it is measured from outside: from a page that frames it.
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


# Drags over the middle half of the loss twice, and points at its middle before, between and after.
POINT = """<!doctype html><title>measure</title><body><script>
const frame = document.createElement("iframe");
frame.style.cssText = "width:1200px;height:900px;border:0";
frame.srcdoc = %s;
frame.onload = () => {
  const inner = frame.contentDocument, found = {};
  const chart = inner.querySelector("svg[data-chart]");
  const [left, top, right] = JSON.parse(chart.dataset.chart).box;
  const send = (kind, share) => {
    const at = new DOMPoint(left + share * (right - left), top + 20);
    const {x, y} = at.matrixTransform(chart.getScreenCTM());
    chart.dispatchEvent(new frame.contentWindow.PointerEvent(kind, {clientX: x, clientY: y}));
  };
  const look = name => {
    send("pointermove", 0.5);
    const note = chart.parentElement.querySelector(".values");
    const lines = [...note.children].map(line => line.textContent);
    const labels = [...chart.querySelectorAll('[id*="-xtick_"] text')].map(t => t.textContent);
    const d = chart.querySelector('[id*="-curve_0"] path').getAttribute("d");
    found[name] = {hidden: note.hidden, lines, labels, d: d.match(/-?[\\d.]+/g).map(Number)};
    send("pointerleave", 0.5);
    found[name].left = note.hidden;
  };
  const drag = () => { send("pointerdown", 0.25); send("pointermove", 0.75);
                       send("pointerup", 0.75); };
  chart.setPointerCapture = () => {};
  look("before"); drag(); look("zoomed"); drag(); look("again");
  chart.dispatchEvent(new frame.contentWindow.MouseEvent("dblclick"));
  look("after");
  document.title = JSON.stringify(found);
};
document.body.append(frame);
</script>"""


def _browse(page: str, folder: Path, scheme: str) -> Any:
    """Return what a page that frames the report wrote into its title; nothing may be logged."""
    outside = folder / "measure.html"
    outside.write_text(page)
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={folder / 'profile'}", "--window-size=1300,1000",
         f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
         "--virtual-time-budget=5000", "--dump-dom", outside.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not console, console
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title is not None
    assert title[1] != "measure", done.stderr[-2000:]
    return json.loads(html.unescape(title[1]))


needs_chromium = pytest.mark.skipif(
    not CHROMIUM, reason="chromium is not installed (apt-get install chromium)"
)


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize(
    ("scheme", "several"), [("dark", False), ("light", False), ("light", True)]
)
def test_a_browser_draws_every_figure_on_a_phone_and_a_desk(tmp_path, scheme, several):
    full_run = write_full_run(tmp_path / "first")
    write_starts(full_run, (0, 2), (100, 1))
    others = [write_second_run(full_run, tmp_path / "other", "second try")] if several else []
    report = write_report(full_run, tmp_path / "page.html", others)
    page = json.dumps(report.read_text()).replace("</", "<\\/")
    found = _browse(MEASURE % (page, [360, 390, 768, 1280]), tmp_path, scheme)
    assert len(found) == 4
    for at in found:
        assert at["scroll"] <= at["width"], f"scrolls sideways at {at['width']} px"
        assert len(at["charts"]) == CHARTS_IN_PAGE
        assert all(w >= 200 and h >= 100 for w, h in at["charts"]), at
        assert len(at["lines"]) >= CHARTS_IN_PAGE
        assert sum(length > 10 for length in at["lines"]) >= CHARTS_IN_PAGE
        drawn = [complete and natural > 0 and w > 200 for complete, natural, w, _ in at["pack"]]
        assert drawn == [True] * (1 + len(others))
        assert all(at["tiles"]), f"a headline is cut off at {at['width']} px"
        assert at["stroke"] == ("rgb(120, 173, 255)" if scheme == "dark" else "rgb(36, 99, 196)")


@pytest.mark.slow
@needs_chromium
def test_the_pointer_tells_values_and_dragging_zooms_until_a_double_click(tmp_path):
    full_run = write_full_run(tmp_path / "first")
    rows = [{**row(step), names.TRAIN_LOSS: 3.0 - step / 200} for step in range(10, 310, 10)]
    write_metrics(full_run, rows)
    write_starts(full_run, (0, 2), (100, 1))
    report = write_report(full_run, tmp_path / "page.html")
    found = _browse(POINT % json.dumps(report.read_text()).replace("</", "<\\/"), tmp_path, "light")
    before, zoomed, again, after = (found[at] for at in ("before", "zoomed", "again", "after"))
    for at in found.values():
        assert not at["hidden"]
        assert at["left"], "the values stay when the pointer leaves"
    step, loss = (line.split()[-1] for line in before["lines"])
    assert before["lines"] == [f"step {step}", f"loss {loss}"]
    assert int(step) in (150, 160)
    # the moving average of a straight line is that line
    assert float(loss) == pytest.approx(3.0 - int(step) / 200, abs=2e-3)
    assert zoomed["lines"][0].startswith("step 1")

    def width(at):
        return max(at["d"][::2]) - min(at["d"][::2])

    assert width(zoomed) == pytest.approx(2 * width(before), rel=0.02)
    assert width(again) == pytest.approx(4 * width(before), rel=0.02)
    numbers = [float(label) for label in zoomed["labels"]]
    assert 70 < min(numbers) < max(numbers) < 240
    assert (after["labels"], after["lines"]) == (before["labels"], before["lines"])
    assert after["d"] == pytest.approx(before["d"], abs=1e-3)
