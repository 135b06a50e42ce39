"""One JSON file and one readable table of all sections."""

from __future__ import annotations

import json
import platform
from datetime import date
from pathlib import Path

import torch

from tests.benchmarks.gpu import goals
from tests.benchmarks.gpu.common import Row

COLUMNS = {
    "ms": "{:.2f}",
    "host_ms": "{:.2f}",
    "step_s": "{:.3f}",
    "data_wait_s": "{:.3f}",
    "host_s": "{:.3f}",
    "device_s": "{:.3f}",
    "images_per_s": "{:,.0f}",
    "tflops": "{:.1f}",
    "mfu": "{:.3f}",
    "peak_gib": "{:.2f}",
    "dry_run_gib": "{:.2f}",
}


def machine(device: str) -> Row:
    card = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return {"card": card, "date": date.today().isoformat(), **versions}


def table(about: Row, sections: dict[str, list[Row]]) -> str:
    lines = ["  ".join(f"{name} {value}" for name, value in about.items())]
    for name, rows in sections.items():
        used = [column for column in COLUMNS if any(column in row for row in rows)]
        width = max((len(row["case"]) for row in rows), default=0)
        lines += ["", f"{name:<{width}}" + "".join(f"{column:>14}" for column in used)]
        for row in rows:
            line = f"{row['case']:<{width}}"
            for column in used:
                line += f"{COLUMNS[column].format(row[column]) if column in row else '':>14}"
            for word in ("failed", "not measured"):
                line += f"  {word}: {row[word]}" if word in row else ""
            lines.append(line.rstrip())
    if sections:
        lines += ["", *goals.lines(sections)]
    return "\n".join(lines)


def write(out: Path, about: Row, sections: dict[str, list[Row]]) -> str:
    (out / "gpu.json").write_text(json.dumps({"machine": about, **sections}, indent=1) + "\n")
    text = table(about, sections)
    (out / "gpu.txt").write_text(text + "\n")
    return text
