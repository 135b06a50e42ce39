"""Train one rank of a run: compose model, data and trainer from a resolved config."""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
import yaml

from data_pipeline.loading.loader import PackLoader
from data_pipeline.loading.tokenizer import BYTES
from data_pipeline.shards.manifest import Manifest, Share
from launch.config.destinations import run_directory
from launch.config.load import ZetaConfig, to_yaml
from launch.errors import USER_ERRORS, message
from launch.report.first_pack import draw_first_packs
from launch.run.checks import CheckedRun, abstract_model, check_shared, check_start
from launch.run.consensus import RefusedError, check_together
from launch.run.execution import settle
from launch.run.lock import RunLock, this_owner
from launch.run.pace import forecast, pace_rows
from launch.run.start_warnings import start_warnings
from launch.run.starts import note_start, places
from launch.tables import mix_warning
from zeta.distributed import (
    RankInfo,
    Store,
    World,
    choose_device,
    rank_from_environment,
)
from zeta.exit_codes import ExitCode, RunError, UnsavedError
from zeta.files import write_whole_text
from zeta.objectives import build_for_objective, build_objective
from zeta.run.code_version import note_code
from zeta.run.console import Console, log_line
from zeta.run.directory import RunDir
from zeta.run.meeting import LeavingError, meet
from zeta.run.watchdog import Watchdog
from zeta.train.attention_check import check_attention
from zeta.train.config import TrainConfig
from zeta.train.execution import Execution
from zeta.train.hardware import find_accelerator
from zeta.zero.start import close_distributed, init_distributed

_PACK_PICTURES = 3
"""Number of packs to draw for W&B."""
_CLAIM = "zeta/start/claim"


def train(config: ZetaConfig) -> int:
    """Train one rank until the run is finished or is asked to stop.

    The same run directory continues the run from its newest checkpoint. All output of this process
    and its libraries goes to the rank's log; rank 0 also writes to the terminal.

    Returns:
        The exit status, see `zeta.exit_codes`.
    """
    info = rank_from_environment(os.environ)
    start_s = config.train.watchdog.limit("start")
    try:
        store = meet(info, start_s)
    except LeavingError as leaving:
        return _left(leaving, info)
    run_dir = run_directory(config)
    lock = RunLock(run_dir, this_owner(os.environ, config.train.watchdog.heartbeat_s))
    with closing(lock):
        try:
            check = partial(_check, config, info, store, lock)
            checked = check_together(check, store, info, start_s)
        except RefusedError as refused:
            return refused.status
        except LeavingError as leaving:
            return _left(leaving, info)
        return _train_checked(checked, info, store)


def _left(leaving: LeavingError, info: RankInfo) -> int:
    """Report a start that was asked to stop while the ranks met; return its exit status."""
    if info.rank == 0:
        what = "stopped as asked, before any step"
        print(f"zeta: {what}; the same command starts the run", file=sys.stderr, flush=True)
    return leaving.status


def _train_checked(checked: CheckedRun, info: RankInfo, store: Store) -> int:
    """Train a run whose checks passed, in a directory that this run has claimed."""
    if checked.already_finished is not None:
        if info.rank == 0:
            print(checked.already_finished)
        return ExitCode.FINISHED
    with closing(Console(checked.run_dir.rank_log(info.rank), info.rank)) as console:
        console.message(f"run directory: {checked.run_dir.path}")
        for warning in start_warnings(checked):
            console.message(f"WARNING: {warning}")
        data = checked.config.data
        if (unmixed := mix_warning(data, data.max_images_per_pack)) is not None:
            console.message(f"WARNING: {unmixed}")
        return _run_and_report(checked, info, store, console)


def _run_and_report(checked: CheckedRun, info: RankInfo, store: Store, console: Console) -> int:
    """Run under the watchdog; if it fails, report why in one message."""
    run_dir = checked.run_dir
    heartbeat, limits = run_dir.rank_heartbeat(info.rank), checked.config.train.watchdog
    report_hang = partial(_report_hang, console, info, run_dir)
    try:
        with closing(Watchdog(heartbeat, info.rank, limits, report_hang)) as watchdog:
            return _run(checked, info, store, console, watchdog)
    except RunError as error:
        _report(console, info, str(error), on_every_rank=True)
        return ExitCode.NEVER_RESTART
    except ValueError as error:
        _report(console, info, str(error))
        return ExitCode.NEVER_RESTART
    except UnsavedError as error:
        _report(console, info, str(error), on_every_rank=True)
        return 1
    except Exception as error:  # one line on the terminal, the traceback in the log; a crash
        log = run_dir.rank_log(info.rank)
        what = message(error) if isinstance(error, USER_ERRORS) else repr(error)
        _report(console, info, f"{what}; the traceback is in {log}")
        return 1


def _check(config: ZetaConfig, info: RankInfo, store: Store, lock: RunLock) -> CheckedRun:
    """Check the run from this rank, since each rank has its own view of the disks.

    Rank 0 checks first, and claims the run directory for all ranks.
    """
    try:
        _check_device(config, info)
        checked = check_start(config, info.world_size, Share(info.rank, info.world_size))
        if info.rank != 0:
            check_shared(checked.run_dir, store.get(_CLAIM).decode())
        else:
            if checked.already_finished is None:
                lock.acquire()
            store.set(_CLAIM, lock.proof)
        return checked
    except ValueError as error:
        if info.rank == 0:
            raise
        raise ValueError(f"on rank {info.rank}, though not on rank 0: {error}") from error


def _check_device(config: ZetaConfig, info: RankInfo) -> None:
    """Check that this rank's device supports what the config requests, without using the device."""
    train = config.train
    device = choose_device(info, train.device, torch.cuda.device_count())
    check_attention(train, device)


def _run(
    checked: CheckedRun, info: RankInfo, store: Store, console: Console, watchdog: Watchdog
) -> int:
    config, run_dir = checked.config, checked.run_dir
    loader = PackLoader(checked.plan, rank=info.rank, world_size=info.world_size)
    world = init_distributed(info, config.train.watchdog.limit("start"), config.train.device, store)
    # DeepSpeed chooses its accelerator and logs it when it is imported: not before
    # `init_distributed` has set the environment and the log is in place.
    from zeta.train.trainer import Trainer
    from zeta.zero.build import build_for_training

    try:
        torch.manual_seed(config.train.seed)
        num_classes = config.model.resolve()["num_classes"]
        objective = build_objective(config.objective, num_classes)
        train, execution = settle(checked, objective, world)
        _say_size(checked, world, console)
        _say_execution(execution, train, world, console)
        _say_pace(checked, world, console)
        trainer = Trainer(
            model=build_for_training(
                partial(build_for_objective, config.model, config.objective, config.train.seed),
                train.zero,
                world,
                trainable=train.trainable,
                seed=train.seed,
            ),
            objective=objective,
            source=loader,
            run_dir=run_dir,
            world=world,
            console=console,
            train=train,
            optim=config.optim,
            tracker=config.tracker,
            config=yaml.safe_load(to_yaml(config)),
            name=config.run.name,
            watchdog=watchdog,
            held_out=[] if checked.held_out is None else checked.held_out.of_rank(info),
            probe=None if checked.probe is None else checked.probe.of_rank(info),
            epoch_images=checked.plan.num_images * config.data.views_of_sample,
            planned_end=checked.planned_end,
        )
        if world.device.type == "cuda":
            graphs = trainer.engine.graphs
            said = "are recorded" if graphs.use else f"are not recorded: {graphs.reason}"
            console.message(f"CUDA graphs of the forward and backward passes {said}")
        where = places(world)
        # Write the config only now: a run that cannot be built must not fix it.
        if world.is_main:
            _write_run_files(run_dir, config, checked.manifest)
            weights = sum(weight.numel() for weight in abstract_model(config).parameters())
            facts = {**where, "parameters": weights, "code": trainer.checkpoints.code}
            note_start(run_dir.starts, trainer.progress.step, world.size, facts)
            if trainer.tracker is not None and trainer.tracker.mode != "disabled":
                _draw_packs(checked, console)
        world.barrier()  # NOTE: no rank trains before the directory has its config
        code = trainer.fit()
        if code is ExitCode.FINISHED:
            console.message(f"zeta: finished at step {trainer.progress.step:,}")
        else:
            at = f"saved at step {step}" if (step := trainer.progress.step) else "before any step"
            first = f"delete {run_dir.stop_request}: " if run_dir.stop_request.exists() else ""
            console.message(
                f"zeta: stopped as asked, {at}; {first}the same command continues from there"
            )
        if count := trainer.quarantine.count:
            images = f"{count:,} image{'s' if count > 1 else ''}"
            console.message(f"{images} could not be used so far: see {run_dir.quarantine}")
        return code
    finally:
        close_distributed()


def _say_size(checked: CheckedRun, world: World, console: Console) -> None:
    """Say what is about to be trained: the first step may take a while."""
    train = checked.config.train
    weights = sum(weight.numel() for weight in abstract_model(checked.config).parameters())
    limits = {
        kind: getattr(train, f"max_{kind}") for kind in ("steps", "images", "tokens", "epochs")
    }
    length = " or ".join(f"{limit:,} {kind}" for kind, limit in limits.items() if limit)
    device = world.device.type
    if device == "cuda":
        device = torch.cuda.get_device_name(world.device)
    console.message(
        f"{weights / 1e6:,.1f} M weights, {checked.plan.num_images:,} images an epoch; to train: "
        f"{length or 'until stopped'}, {train.packs_per_step:,} packs a step; ranks: "
        f"{world.size:,} ({device})"
    )


def _say_execution(
    execution: Execution, train: TrainConfig, world: World, console: Console
) -> None:
    """Write how steps are executed into the log, and on a GPU to the terminal too."""
    text = (
        f"ZeRO stage {execution.stage}; {train.tokens_per_forward:,} tokens in a forward pass "
        f"(packs: {execution.packs}); memory of a rank as predicted: "
        f"{execution.needed / 2**30:.1f} GiB"
    )
    if world.device.type == "cuda":
        console.message(text)
    elif world.is_main:
        log_line(f"{text} without activations", sys.stdout)


def _say_pace(checked: CheckedRun, world: World, console: Console) -> None:
    """Say what this GPU takes and what the loader gives; on a CPU the GPU's part is not known."""
    if not world.is_main or world.device.type != "cuda":
        return
    found = forecast(checked, find_accelerator(torch.cuda.get_device_name(world.device)))
    for subject, finding in pace_rows(found, world.size, None):
        console.message(f"{subject}: {finding}")


def _write_run_files(run_dir: RunDir, config: ZetaConfig, manifest: Manifest) -> None:
    run_dir.finished.unlink(missing_ok=True)  # a run that is continued is not finished
    text = to_yaml(config)
    print(text, flush=True)  # into the log of rank 0
    write_whole_text(run_dir.config, text)
    note_code(run_dir.code_diff)
    if manifest.class_names is not None:
        write_whole_text(run_dir.classes, json.dumps(manifest.class_names) + "\n")
    if config.data.require_captions and config.data.text.tokenizer != BYTES:
        shutil.copyfile(Path(config.data.text.tokenizer).expanduser(), run_dir.tokenizer)


def _draw_packs(checked: CheckedRun, console: Console) -> None:
    """Draw some packs for W&B, once for each run."""
    folder = checked.run_dir.wandb_pictures
    if folder.exists():
        return
    try:
        draw_first_packs(folder, checked.plan, _PACK_PICTURES)
    except (OSError, ValueError) as error:  # not essential; the run itself reports a bad shard
        console.message(f"no pack pictures could be drawn for W&B: {error}")


def _report_hang(console: Console, info: RankInfo, run_dir: RunDir, text: str) -> None:
    log = run_dir.rank_log(info.rank)
    console.fatal(f"zeta: error on rank {info.rank}: {text}; the stacks are in {log}")


def _report(console: Console, info: RankInfo, text: str, *, on_every_rank: bool = False) -> None:
    """Write the traceback to the log and the message to the terminal, once."""
    log_line(traceback.format_exc(), sys.stderr)
    if info.rank == 0:
        console.fatal(f"zeta: error: {text}")
    elif not on_every_rank:
        console.fatal(f"zeta: error on rank {info.rank}: {text}")
