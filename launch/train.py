"""One rank of a training run: composes model, data and trainer from a resolved config."""

from __future__ import annotations

import json
import os
import traceback
from functools import partial
from pathlib import Path

import torch
import yaml

from data_pipeline.loader import PackLoader
from data_pipeline.manifest import Manifest
from data_pipeline.weighted import open_shards
from launch.config import ZetaConfig, fixed_changes, to_yaml
from launch.errors import USER_ERRORS, message
from launch.run_setup import resolve_with_shards, training_plan
from zeta.console import Console
from zeta.distributed import RankInfo, close_distributed, init_distributed, rank_from_environment
from zeta.exit_codes import ExitCode, RunError, UnsavedError
from zeta.models.config import build_model
from zeta.objectives import build_objective
from zeta.run_dir import RunDir
from zeta.watchdog import Watchdog

_BEFORE_CONFIG = {
    "logs", "wandb", "wandb_run_id", "metrics.jsonl", "ledger", "quarantine.jsonl", "checkpoints",
    "heartbeat", "slurm_restarts", "demo.json", "shards",
}  # fmt: skip
"""What a run directory may hold before its first step: launchers, the demo and a start that failed
leave these."""


def train(config: ZetaConfig) -> int:
    """Train one rank to the end of the run, or to where it was asked to stop.

    The same run directory continues the run from its newest checkpoint. What this process and its
    libraries print goes to the rank's log; rank 0 keeps the terminal.

    Returns:
        The exit status, see `zeta.exit_codes`.
    """
    info = rank_from_environment(os.environ)
    run_dir = RunDir(Path(config.run.dir))
    manifest = open_shards(config.data.shards)
    config = resolve_with_shards(config, manifest)
    loader = PackLoader(training_plan(config, manifest), rank=info.rank, world_size=info.world_size)
    check_resume(run_dir, config)
    console = Console(run_dir.rank_log(info.rank), info.rank)
    watchdog = Watchdog(
        run_dir.rank_heartbeat(info.rank),
        info.rank,
        config.train.watchdog,
        partial(_report_hang, console, info, run_dir),
    )
    try:
        return _run(config, info, run_dir, manifest, loader, console, watchdog)
    except RunError as error:
        _report(console, info, str(error), on_every_rank=True)
        return ExitCode.NEVER_RESTART
    except ValueError as error:
        _report(console, info, str(error))
        return ExitCode.NEVER_RESTART
    except UnsavedError as error:
        _report(console, info, str(error), on_every_rank=True)
        return 1
    except Exception as error:  # shown in one line, kept whole in the log, counted as a crash
        log = run_dir.rank_log(info.rank)
        what = message(error) if isinstance(error, USER_ERRORS) else repr(error)
        _report(console, info, f"{what}; the traceback is in {log}")
        return 1
    finally:
        watchdog.close()
        console.close()


def check_resume(run_dir: RunDir, config: ZetaConfig) -> None:
    """Refuse to continue a run under a config that changes what it computes.

    Raises:
        ValueError: names every fixed field that differs from the run's config.yaml, or what else
            the folder holds if it is no run.
    """
    if not run_dir.config.exists():
        inside = run_dir.path.iterdir() if run_dir.path.exists() else iter(())
        foreign = sorted(path.name for path in inside if path.name not in _BEFORE_CONFIG)
        if foreign:
            raise ValueError(
                f"run.dir is {run_dir.path}, which holds {foreign[0]!r} and no run; choose a new "
                "or empty folder"
            )
        return
    changes = fixed_changes(run_dir.config.read_text(), config)
    if changes:
        listed = "; ".join(f"{key} was {old!r} and is now {new!r}" for key, old, new in changes)
        raise ValueError(
            f"{run_dir.path} holds a run with another config: {listed}. Change it back, or choose "
            "another run.dir"
        )


def _run(
    config: ZetaConfig,
    info: RankInfo,
    run_dir: RunDir,
    manifest: Manifest,
    loader: PackLoader,
    console: Console,
    watchdog: Watchdog,
) -> int:
    world = init_distributed(
        info, config.train.watchdog.limit("start"), device_kind=config.train.device
    )
    # DeepSpeed chooses its accelerator, and says so, when it is imported: not before
    # `init_distributed` has set the environment and the log is in place.
    from zeta.sharded_model import build_for_training
    from zeta.trainer import Trainer

    try:
        torch.manual_seed(config.train.seed)
        num_classes = config.model.resolve()["num_classes"]
        trainer = Trainer(
            model=build_for_training(
                partial(build_model, config.model, config.train.seed), config.train, world
            ),
            objective=build_objective(config.objective, num_classes),
            source=loader,
            run_dir=run_dir,
            world=world,
            console=console,
            train=config.train,
            optim=config.optim,
            tracker=config.tracker,
            config=yaml.safe_load(to_yaml(config)),
            name=config.run.name,
            watchdog=watchdog,
        )
        # Only a run that could be built fixes the config of its directory.
        if world.is_main:
            _write_run_files(run_dir, config, manifest)
        world.barrier()  # NOTE: nobody trains in a directory that is not described yet
        return trainer.fit()
    finally:
        close_distributed()


def _write_run_files(run_dir: RunDir, config: ZetaConfig, manifest: Manifest) -> None:
    run_dir.finished.unlink(missing_ok=True)  # a run that is continued is not finished
    text = to_yaml(config)
    print(text, flush=True)  # into the log of rank 0
    building = run_dir.config.with_suffix(".tmp")
    building.write_text(text)
    building.replace(run_dir.config)
    if manifest.class_names is not None:
        run_dir.classes.write_text(json.dumps(manifest.class_names) + "\n")


def _report_hang(console: Console, info: RankInfo, run_dir: RunDir, text: str) -> None:
    log = run_dir.rank_log(info.rank)
    console.fatal(f"zeta: error on rank {info.rank}: {text}; the stacks are in {log}")


def _report(console: Console, info: RankInfo, text: str, *, on_every_rank: bool = False) -> None:
    """Put the traceback into the log and the message on the terminal, once."""
    traceback.print_exc()
    if info.rank == 0:
        console.fatal(f"zeta: error: {text}")
    elif not on_every_rank:
        console.fatal(f"zeta: error on rank {info.rank}: {text}")
