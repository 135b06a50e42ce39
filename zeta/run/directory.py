"""Names of the files of a run directory."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

TRAINER_STATE = "trainer.json"
_STEP_NAME = re.compile(r"step_(\d{8})")


@dataclass(frozen=True)
class RunDir:
    """The directory of one run (`run.dir`), shared by all its ranks and restarts.

    Layout: ``config.yaml`` (resolved), ``code.diff``, ``classes.json``, ``metrics.jsonl``,
    ``ledger/``, ``quarantine.jsonl``, ``quarantine_val.jsonl``, ``wandb_run_id``,
    ``wandb_state.json``, ``wandb/``, ``logs/rank_*.log``, ``heartbeat/``,
    ``starts.jsonl``,
    ``owners/`` (who trained here, see `launch.run.lock`), ``checkpoints/{step_XXXXXXXX/, latest}``
    and ``FINISHED``. A person may add ``SAVE_NOW`` and ``STOP``. Beside what training writes:
    ``report.html``, ``pack.svg`` and ``sizes.json`` (`zeta report`), ``result.json``,
    ``eval.json`` and ``demo.json`` (`zeta demo`), ``finetune.yaml`` and ``finetune.json``
    (`zeta finetune`, with ``shards/`` and ``export/``), and ``slurm_restarts``
    (slurm/pretrain.sbatch).
    """

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config, as YAML that `zeta train` accepts."""
        return self.path / "config.yaml"

    @property
    def code_diff(self) -> Path:
        """Version, commit and changed lines of the code that each part of the run ran with."""
        return self.path / "code.diff"

    @property
    def classes(self) -> Path:
        """JSON list of the class names, where the shards have a class map."""
        return self.path / "classes.json"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer.json of captions, unless they are read as bytes."""
        return self.path / "tokenizer.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line: `step` and the metrics logged at it."""
        return self.path / "metrics.jsonl"

    @property
    def ledger(self) -> Path:
        """Per-rank account of which samples each step trained on."""
        return self.path / "ledger"

    @property
    def quarantine(self) -> Path:
        """One JSON object a line for every sample that could not be used, with the reason."""
        return self.path / "quarantine.jsonl"

    @property
    def val_quarantine(self) -> Path:
        """The same for held-out images; their ids are those of `data.val_shards`."""
        return self.path / "quarantine_val.jsonl"

    @property
    def wandb_run_id(self) -> Path:
        """The W&B run id, made once for the life of the directory."""
        return self.path / "wandb_run_id"

    @property
    def wandb_state(self) -> Path:
        """What W&B has of the run."""
        return self.path / "wandb_state.json"

    @property
    def wandb_files(self) -> Path:
        """W&B's own folder: one folder a session, the pack pictures, and a lock."""
        return self.path / "wandb"

    @property
    def wandb_pictures(self) -> Path:
        """Pictures of packs, which W&B shows."""
        return self.wandb_files / "packs"

    @property
    def logs(self) -> Path:
        """Folder of the per-rank logs."""
        return self.path / "logs"

    def rank_log(self, rank: int) -> Path:
        """Everything that one rank and its libraries print."""
        return self.logs / f"rank_{rank:05d}.log"

    def rank_heartbeat(self, rank: int) -> Path:
        """JSON object of what one rank is doing, a few seconds old at most while it lives."""
        return self.path / "heartbeat" / f"rank_{rank:05d}.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of `step_XXXXXXXX/` directories and the `latest` pointer."""
        return self.path / "checkpoints"

    @property
    def owners(self) -> Path:
        """Folder of the claims of all starts of the run; the newest has the directory."""
        return self.path / "owners"

    @property
    def save_request(self) -> Path:
        """Made by a person who wants a checkpoint; gone once it is written."""
        return self.path / "SAVE_NOW"

    @property
    def stop_request(self) -> Path:
        """Made by a person who wants the run to save and end; while it is there, none trains."""
        return self.path / "STOP"

    @property
    def finished(self) -> Path:
        """Exists once the run reached its last step."""
        return self.path / "FINISHED"

    @property
    def slurm_restarts(self) -> Path:
        """Count of starts without a new checkpoint, and the checkpoint of the last one."""
        return self.path / "slurm_restarts"

    @property
    def starts(self) -> Path:
        """One JSON object a line for each start of the run: `step`, `ranks`, `time`."""
        return self.path / "starts.jsonl"

    @property
    def excluded_nodes(self) -> Path:
        """Nodes that preflight found bad: name, time and reason, one a line."""
        return self.path / "excluded_nodes"

    @property
    def report(self) -> Path:
        """The page about the run."""
        return self.path / "report.html"

    @property
    def pack_picture(self) -> Path:
        """Picture of the first pack, which the report shows."""
        return self.path / "pack.svg"

    @property
    def sizes(self) -> Path:
        """JSON object of the sizes and drop rates at which images were shown, for the report."""
        return self.path / "sizes.json"

    @property
    def result(self) -> Path:
        """JSON object of the figures that `zeta demo` ends with."""
        return self.path / "result.json"

    @property
    def fine_tuning(self) -> Path:
        """JSON object of the scores before and after `zeta finetune`, and what it began at."""
        return self.path / "finetune.json"

    @property
    def fine_tuning_config(self) -> Path:
        """The recipe that `zeta finetune` made, as YAML that `zeta train` accepts."""
        return self.path / "finetune.yaml"

    @property
    def shards(self) -> Path:
        """Shards of the images that `zeta finetune` was given."""
        return self.path / "shards"

    @property
    def exported(self) -> Path:
        """The model that `zeta finetune` made, as `zeta export` writes it."""
        return self.path / "export"

    @property
    def evaluation(self) -> Path:
        """JSON object as `zeta eval --json` prints it."""
        return self.path / "eval.json"


def step_name(step: int) -> str:
    """Return the name of the directory of a checkpoint after `step` committed steps."""
    return f"step_{step:08d}"


def step_of(name: str) -> int:
    """Return the committed steps that the name of a step directory tells."""
    return int(name.removeprefix("step_"))


def step_names(folder: Path) -> list[str]:
    """Return the names of all step directories in `folder`, oldest first, verified or not."""
    return sorted(item.name for item in folder.iterdir() if _STEP_NAME.fullmatch(item.name))
