"""Name every file of a run directory, each in one place."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import overload

TRAINER_STATE = "trainer.json"
_STEP_NAME = re.compile(r"step_(\d{8})")
_UNFINISHED = re.compile(r"\..+\.\d+(-[0-9a-f]{8})?\.tmp")
"""Temporary name of `zeta.files.write_whole`; such a file is left behind by a killed writer."""


@dataclass(frozen=True)
class Entry:
    """A file or folder of a run directory; `run_dir.entry` is its path."""

    name: str
    before_config: bool = False
    """Whether it may exist before the run has written config.yaml: launchers, recipes, a person or
    a run that failed early create it."""
    marks_run: bool = False
    """Whether a run or its launcher creates it early: a folder without any of these entries is not
    a run directory."""

    @overload
    def __get__(self, run_dir: None, owner: type[RunDir]) -> Entry: ...

    @overload
    def __get__(self, run_dir: RunDir, owner: type[RunDir]) -> Path: ...

    def __get__(self, run_dir: RunDir | None, owner: type[RunDir]) -> Entry | Path:
        return self if run_dir is None else run_dir.path / self.name


@dataclass(frozen=True)
class RunDir:
    """The directory of one run (`run.dir`), shared by all its ranks and restarts.

    Each file that zeta writes or reads at the top of the directory is one `Entry` below.
    """

    path: Path

    # Written by training.
    config = Entry("config.yaml", marks_run=True)
    """The resolved config, as YAML that `zeta train` accepts."""
    code_diff = Entry("code.diff")
    """Version, commit and uncommitted changes of the code of each part of the run."""
    classes = Entry("classes.json")
    """JSON list of the class names, where the shards have a class map."""
    tokenizer = Entry("tokenizer.json")
    """The tokenizer.json of captions, unless they are read as bytes."""
    metrics = Entry("metrics.jsonl", before_config=True, marks_run=True)
    """One JSON object a line: `step` and the metrics logged at it."""
    metrics_table = Entry("metrics.csv", before_config=True)
    """The same as a table, a column a metric (`tracker.kind: csv`)."""
    tensorboard = Entry("tensorboard", before_config=True)
    """Folder of TensorBoard's event files (`tracker.kind: tensorboard`)."""
    ledger = Entry("ledger", before_config=True)
    """Folder of the ranks' records of the samples that each step trained on."""
    quarantine = Entry("quarantine.jsonl", before_config=True)
    """One JSON object a line for every sample that could not be used, with the reason."""
    val_quarantine = Entry("quarantine_val.jsonl", before_config=True)
    """Quarantine of the validation images; their ids are those of `data.val_shards`."""
    wandb_run_id = Entry("wandb_run_id", before_config=True)
    """The W&B run id, made once for the life of the directory."""
    wandb_state = Entry("wandb_state.json", before_config=True)
    """JSON object of the part of the run that W&B has received."""
    wandb_files = Entry("wandb", before_config=True)
    """W&B's own folder: one folder a session, the pack pictures, and a lock."""
    logs = Entry("logs", before_config=True, marks_run=True)
    """Folder of the per-rank logs and of Slurm's."""
    heartbeats = Entry("heartbeat", before_config=True, marks_run=True)
    """Folder of the ranks' heartbeats."""
    checkpoints = Entry("checkpoints", before_config=True, marks_run=True)
    """Folder of `step_XXXXXXXX/` directories and the `latest` pointer."""
    owners = Entry("owners", before_config=True, marks_run=True)
    """Folder of the claims of all starts of the run; the newest claim owns the directory."""
    starts = Entry("starts.jsonl")
    """One JSON object a line for each start of the run: `step`, `ranks`, `time`, `hosts`, `devices`
    (ranks by device), `parameters` and `code` (package version, commit, dirty)."""
    finished = Entry("FINISHED")
    """Exists once the run reached its last step."""

    # Made by a person.
    save_request = Entry("SAVE_NOW", before_config=True)
    """Request for a checkpoint; deleted once the checkpoint is written."""
    stop_request = Entry("STOP", before_config=True)
    """Request to save and end; while it exists, no start of the run trains."""

    # Written by launchers.
    slurm_restarts = Entry("slurm_restarts", before_config=True)
    """Number of starts in a row without a new checkpoint, and the checkpoint of the last start."""
    excluded_nodes = Entry("excluded_nodes", before_config=True)
    """Nodes that preflight found bad: name, time and reason, one a line."""

    # Written by reports and recipes.
    report = Entry("report.html")
    """Report page of the run."""
    pack_picture = Entry("pack.svg")
    """Picture of the first pack, for the report."""
    sizes = Entry("sizes.json")
    """JSON object of the sizes and drop rates of the training images, for the report."""
    evaluation = Entry("eval.json")
    """JSON object that `zeta eval --json` prints."""
    result = Entry("result.json")
    """JSON object of the results of `zeta demo`."""
    demo_settings = Entry("demo.json", before_config=True)
    """JSON object of the settings of `zeta demo`."""
    fine_tuning = Entry("finetune.json", before_config=True)
    """JSON object of the scores before and after `zeta finetune`, and its initial model."""
    fine_tuning_config = Entry("finetune.yaml", before_config=True)
    """The config of `zeta finetune`, as YAML that `zeta train` accepts."""
    shards = Entry("shards", before_config=True)
    """Shards of the images that `zeta demo` or `zeta finetune` trains on."""
    exported = Entry("export")
    """The model that `zeta finetune` made, as `zeta export` writes it."""

    @property
    def wandb_pictures(self) -> Path:
        """Folder of the pack pictures that W&B displays."""
        return self.wandb_files / "packs"

    def rank_log(self, rank: int) -> Path:
        """Return the log of everything that one rank and its libraries print."""
        return self.logs / f"rank_{rank:05d}.log"

    def rank_heartbeat(self, rank: int) -> Path:
        """Return the heartbeat file of one rank (JSON), rewritten every few seconds."""
        return self.heartbeats / f"rank_{rank:05d}.json"

    def is_marked(self) -> bool:
        """Return whether the folder contains an entry that marks a run directory."""
        return any((self.path / entry.name).exists() for entry in _ENTRIES if entry.marks_run)

    def foreign_names(self) -> list[str]:
        """Return the names in the folder that cannot come from a run without a config yet."""
        if not self.path.is_dir():
            return []
        ours = {entry.name for entry in _ENTRIES if entry.before_config}
        names = sorted(path.name for path in self.path.iterdir())
        return [name for name in names if name not in ours and not _UNFINISHED.fullmatch(name)]


_ENTRIES = tuple(entry for entry in vars(RunDir).values() if isinstance(entry, Entry))


def step_name(step: int) -> str:
    """Return the name of the directory of a checkpoint after `step` committed steps."""
    return f"step_{step:08d}"


def step_of(name: str) -> int:
    """Return the number of committed steps in the name of a step directory."""
    return int(name.removeprefix("step_"))


def step_names(folder: Path) -> list[str]:
    """Return the names of all step directories in `folder`, oldest first, verified or not."""
    return sorted(item.name for item in folder.iterdir() if _STEP_NAME.fullmatch(item.name))
