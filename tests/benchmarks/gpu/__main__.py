"""Measure zeta on one GPU without network: what the goals name in four minutes, all in twelve.

    python -m tests.benchmarks.gpu [--sections train,model,...] [--minutes 4] [--out DIR]

Sections run by importance, each in a process of its own that has the time that is left; what was
not reached is printed as not measured. `--toy --device cpu` runs the same path in seconds.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.benchmarks.gpu import report
from tests.benchmarks.gpu.common import Options, Row

SECTIONS = ("train", "engine", "peers", "sizes", "model", "attention")
"""By importance: what the goals name first. Four minutes reach the first three."""
SHARES = {"train": 0.7, "engine": 0.5, "peers": 0.8, "sizes": 0.7, "model": 0.6, "attention": 1.0}
"""Largest share of the time that is left for each section, so that one cannot take it all."""


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--toy", action="store_true", help="toy sizes, for a test of the path")
    parser.add_argument("--out", help="folder of gpu.json and gpu.txt; default: a new one")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parsed = parser.parse_args(words)
    if parsed.alone:
        run_alone(parsed.alone, Options.of(parsed))
        return
    unknown = set(names := parsed.sections.split(",")) - set(SECTIONS)
    if unknown:
        parser.error(f"--sections has {sorted(unknown)}; choose from {', '.join(SECTIONS)}")
    if parsed.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device was found; --device cpu --toy runs the path without one")
    parsed.out = parsed.out or tempfile.mkdtemp(prefix="zeta-gpu-")
    options = Options.of(parsed)
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * parsed.minutes
    found = {name: section(name, options, deadline) for name in SECTIONS if name in names}
    print(report.write(options.out, report.machine(options.device), found))
    print(f"\n{options.out}/gpu.json")


def section(name: str, options: Options, deadline: float) -> list[Row]:
    """Run one section in a process of its own; keep what it measured before it was stopped."""
    left = deadline - time.monotonic()
    if left <= 0:
        return [{"case": name, "not measured": "the time was up before it began"}]
    rows, log = options.out / f"{name}.jsonl", options.out / f"{name}.log"
    rows.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.benchmarks.gpu", "--alone", name]
    command += ["--device", options.device, "--out", str(options.out)]
    command += ["--toy"] if options.toy else []
    ended = None
    with log.open("w") as stream:
        # A session of its own: what it started ends with it.
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, start_new_session=True, env=environment()
        )
        try:
            if process.wait(left * SHARES[name]):
                ended = {"case": name, "failed": f"it ended with {process.returncode}, see {log}"}
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            ended = {"case": "the rest", "not measured": "its share of the time was up"}
    lines = rows.read_text().splitlines() if rows.exists() else []
    return [json.loads(line) for line in lines] + ([ended] if ended else [])


def environment() -> dict[str, str]:
    """The variables of a section: the project is found from a bare PYTHONPATH too."""
    root = str(Path(__file__).parents[3])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


def run_alone(name: str, options: Options) -> None:
    module = importlib.import_module(f"tests.benchmarks.gpu.{name}")
    with (options.out / f"{name}.jsonl").open("w") as stream:
        for row in module.rows(options):
            stream.write(json.dumps(row) + "\n")
            stream.flush()


if __name__ == "__main__":
    main()
