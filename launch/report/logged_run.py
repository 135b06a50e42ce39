"""Reads the files that a run has written so far, for the report.

Files of a run that is running, or that died, may be missing or cut off in the middle of a line.
What can be read is used; what cannot is named in `notes`, so that nothing is left out silently.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from launch.config.yaml_text import parse_yaml
from zeta import metric_names as names
from zeta.files import parse_json, read_json
from zeta.run.directory import RunDir

Floats = npt.NDArray[np.float64]
_MOST_BYTES = 2**28
"""Most bytes of a file of one JSON object."""


@dataclass(frozen=True)
class Series:
    """One metric over the steps at which it was logged; NaN and infinity are kept."""

    steps: Floats
    values: Floats

    @property
    def finite(self) -> Series:
        """The points that can be drawn."""
        good = np.isfinite(self.values)
        return Series(self.steps[good], self.values[good])

    @property
    def last(self) -> float | None:
        """The last finite value; None: there are only others."""
        values = self.finite.values
        return float(values[-1]) if len(values) else None


@dataclass(frozen=True)
class LoggedRun:
    """Everything that a report shows of a run."""

    path: Path
    series: Mapping[str, Series]
    """Logged metrics by name (`zeta.metric_names`)."""
    steps: int
    """Last step in metrics.jsonl."""
    finished: bool
    config_text: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] = field(default_factory=dict)
    """Content of result.json, which `zeta demo` writes."""
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    """Content of eval.json, the output of `zeta eval --json`."""
    quarantine: tuple[Mapping[str, Any], ...] = ()
    starts: tuple[Mapping[str, Any], ...] = ()
    """Lines of starts.jsonl: `step`, `ranks`, `time` of each start, and on what it ran."""
    code_line: str = ""
    """Last line of code.diff that names a version of the code."""
    sizes: Mapping[str, Any] = field(default_factory=dict)
    """Content of sizes.json: see `launch.report.shown_sizes`."""
    pack: tuple[str, bytes] | None = None
    """Media type and content of the picture of a pack."""
    notes: tuple[str, ...] = ()
    """Sentences about what is missing or could not be read."""

    def setting(self, key: str) -> Any:
        """Return a value of the config by its dotted key; None: not set."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    @property
    def label(self) -> str:
        """Name of the run, or else of its directory."""
        return str(self.setting("run.name") or self.path.resolve().name)

    @property
    def restarts(self) -> Floats:
        """Steps at which the run was resumed."""
        steps = (finite_number(start.get("step")) for start in self.starts[1:])
        return np.array([step for step in steps if step is not None])

    @property
    def checkpoints(self) -> Floats:
        """Steps at which a checkpoint was published."""
        saves = self.series.get(names.CHECKPOINT_SAVE_S)
        return np.zeros(0) if saves is None else saves.steps

    def accuracy_by(self, what: str) -> list[tuple[str, float]]:
        """Return (size, top-1) pairs from eval.json, whose values are numbers or hold `top1`.

        Args:
            what: `by_resolution` or `by_tokens`.
        """
        table = self.evaluation.get(what)
        rows = []
        for name, value in table.items() if isinstance(table, Mapping) else ():
            top1 = finite_number(value.get("top1") if isinstance(value, Mapping) else value)
            if top1 is not None:
                rows.append((str(name), top1))
        return rows


def read_run(run_dir: Path) -> LoggedRun:
    """Read a run directory.

    Raises:
        ValueError: `run_dir` is not a folder or not a run directory, or nothing is logged yet.
    """
    if not run_dir.is_dir():
        raise ValueError(
            f"{run_dir} is not a folder: give the directory of a run (its run.dir), such as "
            "runs/demo"
        )
    files, notes = RunDir(run_dir), list[str]()
    if not files.metrics.is_file():
        raise ValueError(
            f"{run_dir} holds no {files.metrics.name}: it is not the directory of a run, or the "
            "run has logged nothing yet; give the run's run.dir (runs/NAME by default)"
        )
    rows = [
        row
        for row in _read_lines(files.metrics, notes)
        if finite_number(row.get("step")) is not None
    ]
    if not rows:
        raise ValueError(
            f"{files.metrics} holds no metrics yet: try again after train.log_every steps, when "
            "the first line is written"
        )
    config_text = _read_text(files.config, notes)
    return LoggedRun(
        path=run_dir,
        series=_series(rows),
        steps=int(max(row["step"] for row in rows)),
        finished=files.finished.exists(),
        config_text=config_text,
        config=_parse_config(config_text, notes),
        result=_read_object(files.result, notes),
        evaluation=_read_object(files.evaluation, notes),
        quarantine=tuple(_read_lines(files.quarantine, notes)),
        starts=tuple(_read_lines(files.starts, notes)),
        code_line=_last_version(files.code_diff),
        sizes=_read_object(files.sizes, notes),
        pack=_read_pack(run_dir, notes),
        notes=tuple(notes),
    )


def _series(rows: list[dict[str, Any]]) -> dict[str, Series]:
    """Turn lines into columns; if two lines have the same step and metric, the later one counts."""
    points: dict[str, dict[float, float]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("step", names.STEP) and isinstance(value, int | float):
                points.setdefault(name, {})[float(row["step"])] = float(value)
    columns = {}
    for name, values in points.items():
        steps = np.array(sorted(values))
        columns[name] = Series(steps, np.array([values[step] for step in steps]))
    return columns


def _read_lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a JSON-lines file; add a note about unreadable lines."""
    if not path.is_file():
        return
    torn = 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = parse_json(line, place=str(path), what="")
            except ValueError:
                torn += bool(line.strip())
                continue
            if isinstance(row, dict):
                yield row
            else:
                torn += 1
    if torn:
        number = "One line" if torn == 1 else f"{torn} lines"
        notes.append(f"{number} of {path.name} could not be read (an interrupted write?).")


def _read_object(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = read_json(path, limit=_MOST_BYTES, what="")
    except ValueError:
        content = None
    if not isinstance(content, dict):
        notes.append(f"{path.name} is not a JSON object and is left out.")
        return {}
    return content


def _read_text(path: Path, notes: list[str]) -> str:
    if not path.is_file():
        notes.append(f"{path.name} is missing.")
        return ""
    return path.read_text(encoding="utf-8", errors="replace")


def _last_version(path: Path) -> str:
    """Return the last line of code.diff with a version; a diff's own lines begin otherwise."""
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8", errors="replace") as lines:
        found = [line.strip() for line in lines if line.startswith("zeta ")]
    return found[-1] if found else ""


def _parse_config(text: str, notes: list[str]) -> dict[str, Any]:
    try:
        return parse_yaml(text, "config.yaml")
    except ValueError:
        notes.append("config.yaml is not valid YAML; it is shown as text only.")
        return {}


def _read_pack(run_dir: Path, notes: list[str]) -> tuple[str, bytes] | None:
    picture = RunDir(run_dir).pack_picture
    for path, media_type in (
        (picture, "image/svg+xml"),
        (picture.with_suffix(".png"), "image/png"),
    ):
        if path.is_file():
            return media_type, path.read_bytes()
    notes.append("The picture of a pack (pack.svg or pack.png) is missing.")
    return None


def finite_number(value: object) -> float | None:
    """Return a finite int or float as float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
