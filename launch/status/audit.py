"""Reads the files of a run for `data_pipeline.audit`, and prints its result (`zeta data audit`)."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from data_pipeline.audit import Audit, EpochAccount, LedgerStep, audit_ledger
from data_pipeline.shards.weighted import open_shards
from launch.config.load import load_config
from launch.config.resolve import resolve_with_shards, training_plan
from zeta.checkpoint.directory import read_trainer_state
from zeta.files import parse_json
from zeta.run.directory import RunDir


def audit_run(path: str | Path) -> Audit:
    """Audit the run in the directory `path`, while it runs or at any time after.

    Raises:
        ValueError: `path` holds no run, or its shards are gone or have changed.
    """
    run_dir = RunDir(Path(path))
    if not run_dir.config.is_file() or not run_dir.ledger.is_dir():
        raise ValueError(
            f"{path} is not the directory of a run with a ledger: give the run's run.dir "
            "(runs/NAME by default)"
        )
    config = load_config(str(run_dir.config))
    manifest = open_shards(config.data.shards)
    plan = training_plan(resolve_with_shards(config, manifest), manifest)
    committed, fingerprint = _checkpointed(run_dir)
    if fingerprint not in (None, manifest.fingerprint, manifest.older_fingerprint):
        raise ValueError(
            f"the shards {config.data.shards} are not those that {path} was trained on (their "
            "fingerprint differs): restore the old shards to audit the run"
        )
    steps = _ledger_steps(run_dir, config.train.max_epochs)
    return audit_ledger(plan, steps, _reasons(run_dir), committed=committed)


def to_json(audit: Audit) -> dict[str, Any]:
    """Return the audit as JSON-able values."""
    return {
        "exact": audit.exact,
        "steps": audit.steps,
        "uncommitted_steps": audit.uncommitted,
        "epochs": [
            vars(account) | {"open": account.open, "remainder": account.remainder}
            for account in audit.epochs
        ],
        "problems": audit.problems,
    }


def audit_table(audit: Audit) -> list[str]:
    """Return the lines that `zeta data audit` prints."""
    lines = [f"{audit.steps:,} steps were planned again and compared with the ledger"]
    if audit.uncommitted:
        lines.append(f"{audit.uncommitted:,} steps after the last checkpoint are left out")
    many = len({account.epoch for account in audit.epochs}) < len(audit.epochs)
    for account in audit.epochs:
        name = f"{account.source}, epoch {account.epoch}" if many else f"epoch {account.epoch}"
        lines += [f"{name}: {_in_words(account)}"]
        lines += [f"  rejected, {why}: {count:,}" for why, count in account.rejected.most_common()]
        lines += [f"  never planned, {why}: {n:,}" for why, n in account.not_planned.items()]
    lines += [f"PROBLEM: {problem}" for problem in audit.problems]
    lines.append(
        "exact: every planned sample was trained on or rejected, once"
        if audit.exact
        else "NOT exact"
    )
    return lines


def _in_words(account: EpochAccount) -> str:
    state = f"open, {account.open:,} to come" if account.open else "closed"
    views = "" if account.views == account.trained else f" ({account.views:,} views)"
    return (
        f"{state}; planned {account.planned:,} = trained {account.trained:,}{views} + rejected "
        f"{sum(account.rejected.values()):,}, remainder {account.remainder:,}"
    )


def _ledger_steps(run_dir: RunDir, max_epochs: int | None) -> Iterator[LedgerStep]:
    """Yield each step with what all ranks noted of it, in the order of steps.

    `max_epochs` is that of the config, for runs whose ledger does not hold it.
    """
    files = [_lines(path, _is_of_ledger) for path in sorted(run_dir.ledger.glob("rank_*.jsonl"))]
    merged = heapq.merge(*files, key=_step)
    for step, lines in groupby(merged, key=_step):
        result = LedgerStep(step, {}, set(), False, [], max_epochs)
        for line in lines:
            result.max_epochs = line.get("max_epochs", max_epochs)
            noted = {int(lane): (int(n), str(ids)) for lane, (n, ids) in line["lanes"].items()}
            result.repeated += sorted(result.lanes.keys() & noted.keys())
            result.lanes |= noted
            result.rejected |= set(line["rejected"])
            result.skipped |= bool(line.get("skipped", False))
        yield result


def _step(line: dict[str, Any]) -> int:
    return int(line["step"])


def _lines(path: Path, is_right: Callable[[dict[str, Any]], bool]) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file of lines; only its last line can be torn by a kill.

    Raises:
        ValueError: a line is no JSON object, or `is_right` says no to it; names file and line.
    """
    what = "restore the file from a copy: the account of a run cannot be proved without it"
    with path.open("rb") as file:
        for number, text in enumerate(file, start=1):
            if not text.endswith(b"\n"):
                return
            place = f"{path} line {number}"
            line = parse_json(text, place=place, what=what)
            if not isinstance(line, dict) or not is_right(line):
                raise ValueError(f"{place} is damaged (no line of such a file); {what}")
            yield line


def _is_of_ledger(line: dict[str, Any]) -> bool:
    lanes, rejected = line.get("lanes"), line.get("rejected")
    return (
        _is_number(line.get("step"))
        and isinstance(lanes, dict)
        and all(
            lane.isdecimal() and isinstance(of, list) and len(of) == 2 and _is_number(of[0])
            for lane, of in lanes.items()
        )
        and isinstance(rejected, list)
        and all(map(_is_number, rejected))
        and (line.get("max_epochs") is None or _is_number(line["max_epochs"]))
    )


def _is_of_quarantine(line: dict[str, Any]) -> bool:
    return _is_number(line.get("sample_id")) and "reason" in line


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _quarantined(run_dir: RunDir) -> Iterator[dict[str, Any]]:
    return _lines(run_dir.quarantine, _is_of_quarantine)


def _reasons(run_dir: RunDir) -> dict[int, str]:
    if not run_dir.quarantine.exists():
        return {}
    return {int(line["sample_id"]): str(line["reason"]) for line in _quarantined(run_dir)}


def _checkpointed(run_dir: RunDir) -> tuple[int, str | None]:
    """Return the step of the newest checkpoint and the fingerprint of its shards."""
    latest = run_dir.checkpoints / "latest"
    if not latest.exists():
        return 0, None
    progress = read_trainer_state(run_dir.checkpoints / latest.read_text().strip())["progress"]
    state = progress.get("data")
    fingerprint = state.get("fingerprint") if isinstance(state, dict) else None
    return int(progress.get("step") or 0), fingerprint
