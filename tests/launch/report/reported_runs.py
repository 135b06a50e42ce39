"""Run directories made by hand, and pages read as a browser would."""

from __future__ import annotations

import html.parser
import json
import math
import shutil
from pathlib import Path

import numpy as np

from launch.report.chart_specs import CHARTS
from launch.report.pack_picture import PackedImage, PackPicture, draw_pack
from zeta import metric_names as names

VOID = {"meta", "br", "img", "link", "input", "hr"}
CHARTS_IN_PAGE = len(CHARTS) + 4  # and loss, accuracy by resolution, sizes, dropped patches
IN_AN_OPEN_RUN = CHARTS_IN_PAGE - 3  # neither eval.json nor sizes.json


def row(step: int) -> dict[str, float]:
    return {
        "step": step,
        names.TRAIN_LOSS: 2.3 * math.exp(-step / 100),
        names.LEARNING_RATE: 1e-3,
        names.GRAD_NORM: 1.0 + math.sin(step),
        names.IMAGES_PER_S: 500.0 + step % 7,
        names.TOKENS_PER_S: 20_000.0,
        names.STEP_S: 0.1,
        names.DATA_WAIT_S: 0.01,
        names.MFU: 0.41,
        names.STRAGGLER_RATIO: 1.05,
        names.PEAK_GIB: 12.5,
        names.FILL: 0.98,
        names.IMAGES_SEEN: step * 50,
        names.TOKENS_SEEN: step * 2000,
    }


def write_metrics(run_dir: Path, rows: list[dict], tail: str = "") -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (run_dir / "metrics.jsonl").write_text(lines + tail)


def write_open_run(path: Path) -> Path:
    """Write a run that is still going: metrics and nothing else."""
    path.mkdir(parents=True, exist_ok=True)
    write_metrics(path, [row(step) for step in range(10, 310, 10)])
    return path


def write_full_run(path: Path) -> Path:
    """Write a run with everything a report can show."""
    write_open_run(path)
    result = {"val_top1": 0.9712, "train_seconds": 151.4, "fill": 0.9853, "images_per_s": 612.0}
    resolutions = {"native": {"top1": 0.9712}, "48": {"top1": 0.98}, "96": {"top1": 0.975}}
    evaluation = {"top1": 0.9712, "top5": 0.999, "by_resolution": resolutions}
    sizes = {"images": 4, "sides_px": {"32": 3, "96": 1}, "dropped_percent": {"10": 4}}
    (path / "sizes.json").write_text(json.dumps(sizes))
    (path / "result.json").write_text(json.dumps(result))
    (path / "eval.json").write_text(json.dumps(evaluation))
    (path / "config.yaml").write_text(
        "run: {name: first try}\n"
        "data: {token_budget: 1024, resolution: {kind: side, min: 32, max: 96}}\n"
        "train: {packs_per_step: 4, max_steps: 300}\n"
    )
    (path / "quarantine.jsonl").write_text(
        json.dumps({"key": "cat_7", "shard": "a.tar", "reason": "truncated JPEG"}) + "\n"
    )
    rng = np.random.default_rng(0)
    kept = rng.random((5, 6)) < 0.7
    pixels = rng.integers(0, 256, (40, 48, 3)).astype(np.uint8)
    (path / "pack.svg").write_bytes(
        draw_pack(PackPicture((PackedImage(pixels, kept, "7"),), 8, token_budget=64))
    )
    (path / "FINISHED").touch()
    return path


def write_starts(run_dir: Path, *starts: tuple[int, int]) -> None:
    lines = [{"step": step, "ranks": ranks, "time": f"at {step}"} for step, ranks in starts]
    (run_dir / "starts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_second_run(first: Path, folder: Path, name: str, tokens_a_step: int = 4000) -> Path:
    """Copy a run under another name, with other token counts and settings."""
    shutil.copytree(first, folder)
    config = (folder / "config.yaml").read_text().replace("first try", name)
    (folder / "config.yaml").write_text(config.replace("max: 96", "max: 64") + "optim: {lr: 0.1}\n")
    rows = [{**row(step), names.TOKENS_SEEN: step * tokens_a_step} for step in range(10, 310, 10)]
    write_metrics(folder, rows)
    return folder


class Page(html.parser.HTMLParser):
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
        if not self.stack or self.stack[-1] not in ("style", "script"):
            self.text += data
