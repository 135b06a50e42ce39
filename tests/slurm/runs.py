"""Runs of the real `zeta` under the real batch script, and what their files say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from data_pipeline.audit import Audit
from data_pipeline.shards.build import build_shards
from launch.shipped import slurm_root
from launch.status.audit import audit_run
from tests.data_pipeline.shard_fixtures import jpeg
from tests.slurm.cluster import ENDED, Cluster
from zeta.run.directory import RunDir

_SLOW_STORAGE = """#!{python}
# zeta, as installed; but every step of data takes a moment, as from storage far away.
import os, sys, time
from launch.cli import entry_point

if sys.argv[1] == "train":
    from data_pipeline.loading.loader import PackLoader
    steps = PackLoader.steps

    def slow_steps(*arguments):
        for step in steps(*arguments):
            time.sleep(float(os.environ["TEST_SECONDS_PER_STEP"]))
            yield step

    PackLoader.steps = slow_steps
sys.exit(entry_point())
"""


def make_shards(folder: Path, images: int = 80) -> Path:
    """Write shards of small photos of many sizes, in two classes."""
    samples = [
        (f"s{i}", {"jpg": jpeg(24 + i * 7 % 48, 24 + i * 13 % 60, i), "cls": str(i % 2).encode()})
        for i in range(images)
    ]
    build_shards(samples, folder, class_names=["a", "b"])
    return folder


class Run:
    """One run directory and the job that fills it. All that it waits for has an end."""

    def __init__(self, cluster: Cluster, folder: Path, shards: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.cluster = cluster
        self.folder = folder
        self.shards = shards
        self.files = RunDir(folder / "a run")
        self.job = 0

    def submit(
        self,
        *settings: str,
        flags: tuple[str, ...] = (),
        seconds_per_step: float = 0.0,
        exported: str = "",
    ) -> None:
        """Submit the script for two ranks on two nodes, unless `flags` ask for something else."""
        programs = Path(sys.executable).parent
        if seconds_per_step:
            programs = self.folder / "bin"
            programs.mkdir()
            (programs / "zeta").write_text(_SLOW_STORAGE.format(python=sys.executable))
            (programs / "zeta").chmod(0o755)
        variables = f"ALL,PATH={programs}:{self.cluster.environment['PATH']}"
        variables += f",TEST_SECONDS_PER_STEP={seconds_per_step},{exported}"
        self.job = self.cluster.submit(
            "--nodes=2",
            f"--export={variables.rstrip(',')}",
            *flags,
            slurm_root() / "pretrain.sbatch",
            "demo",
            f"data.shards={self.shards}",
            f"run.dir={self.files.path}",
            *settings,
            cwd=self.folder,
        )

    @property
    def log(self) -> str:
        """What the job and its ranks said."""
        path = self.folder / f"slurm-{self.job}.log"
        return path.read_text() if path.exists() else ""

    def wait_for_step(self, step: int, timeout: float = 240) -> None:
        """Wait until the step is in metrics.jsonl; fail with the log if the job ends before."""

        def there() -> bool:
            reached = self.step() >= step
            assert reached or self.record()["JobState"] not in ENDED, self.log
            return reached

        self.cluster.wait_until(there, timeout, every=0.5)

    def wait_for_restart(self, timeout: float = 240) -> None:
        """Wait until the job was requeued."""
        self.cluster.wait_until(lambda: self.record()["Restarts"] != "0", timeout, every=0.5)

    def wait_for_end(self, timeout: float = 400) -> dict[str, str]:
        """Wait until the job is over and return Slurm's record of it."""
        return self.cluster.wait_for_job(self.job, timeout=timeout, every=1.0)

    def record(self) -> dict[str, str]:
        """Return Slurm's record of the job."""
        return self.cluster.job(self.job)

    def ends(self) -> list[tuple[str, str]]:
        """Return state and exit code of each time that the job ended, from Slurm's own file."""
        records = self.cluster.completed(self.job)
        return [(record["JobState"], record["ExitCode"]) for record in records]

    def step(self) -> int:
        """Return the last step in metrics.jsonl."""
        return max(self.losses(), default=0)

    def losses(self) -> dict[int, float]:
        """Return the loss of each logged step; fails if a step is there twice."""
        if not self.files.metrics.exists():
            return {}
        whole = [line for line in self.files.metrics.read_text().split("\n")[:-1] if line]
        lines = [json.loads(line) for line in whole]
        losses = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
        assert len(losses) == sum("train/loss" in line for line in lines), "a step is there twice"
        return losses

    def rank_pid(self, rank: int) -> int:
        """Return the process of a rank."""
        return int(json.loads(self.files.rank_heartbeat(rank).read_text())["pid"])

    def checkpoint(self) -> str:
        """Return the name of the newest checkpoint."""
        return (self.files.checkpoints / "latest").read_text().strip()

    def audit(self) -> Audit:
        """Return the account of every sample, from the ledger."""
        return audit_run(str(self.files.path))
