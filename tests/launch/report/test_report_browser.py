"""Reports in a real browser: no script errors, every figure drawn, readable on a phone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest

from launch.report.page import write_report
from tests.launch.report.reported_runs import (
    CHARTS_IN_PAGE,
    write_full_run,
    write_second_run,
    write_starts,
)

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
@pytest.mark.parametrize(
    ("scheme", "several"), [("dark", False), ("light", False), ("light", True)]
)
def test_a_browser_draws_every_figure_on_a_phone_and_a_desk(tmp_path, scheme, several):
    full_run = write_full_run(tmp_path / "first")
    write_starts(full_run, (0, 2), (100, 1))
    others = [write_second_run(full_run, tmp_path / "other", "second try")] if several else []
    report = write_report(full_run, tmp_path / "page.html", others)
    page = json.dumps(report.read_text()).replace("</", "<\\/")
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
        drawn = [complete and natural > 0 and w > 200 for complete, natural, w, _ in at["pack"]]
        assert drawn == [True] * (1 + len(others))
        assert all(at["tiles"]), f"a headline is cut off at {at['width']} px"
        assert at["stroke"] == ("rgb(120, 173, 255)" if scheme == "dark" else "rgb(36, 99, 196)")
