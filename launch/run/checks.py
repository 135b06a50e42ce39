"""Check a run before it starts, and report once every fault that a restart would meet again.

The checks take seconds and need torch but neither DeepSpeed nor a device. `zeta train` runs them on
rank 0 while the other ranks wait for the answer, `zeta launch local` before it starts a rank, and
`zeta train --dry-run` without starting a run.
"""

from __future__ import annotations

import errno
import os
import socket
import tempfile
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_pipeline.loading.loader import check_state
from data_pipeline.plan.length import planned_length
from data_pipeline.plan.plan import Plan
from data_pipeline.shards.manifest import ALL_SHARDS, Manifest, Share
from data_pipeline.shards.weighted import open_shards
from launch.config.destinations import check_destinations, run_directory
from launch.config.load import ZetaConfig, fixed_changes, load_config
from launch.config.resolve import DECIDED_BY, completed, resolve_with_shards, training_plan
from launch.filesystems import existing_parent
from launch.run.lock import sees_claim
from launch.run.probe_images import ProbePlans, open_probe
from launch.run.shared_memory import check_shared_memory
from launch.run.validation_data import HeldOutImages, open_held_out
from launch.run.workers import loader_workers, with_workers
from zeta.checkpoint.directory import check_same_model, read_trainer_state
from zeta.config_field import AUTO
from zeta.exit_codes import RunError
from zeta.models.config import prefix_tokens, takes_one_size
from zeta.models.parameters import parameter_shapes
from zeta.models.trainable import freeze
from zeta.objectives import build_for_objective
from zeta.packed import check_world_size
from zeta.run.directory import RunDir, step_names
from zeta.run.requirements import DEEPSPEED, check_installed
from zeta.train.execution import packs_per_forward
from zeta.train.init_sources import check_initial_weights
from zeta.train.optim import check_optimizer
from zeta.train.probing.encoder import encoder_of
from zeta.train.schedule import build_schedule, ends_by_epochs

_ENDS = ("max_steps", "max_images", "max_tokens", "max_epochs")


@dataclass(frozen=True)
class CheckedRun:
    """A run whose config, shards and newest checkpoint were checked: it can be started."""

    config: ZetaConfig
    """Config of the run, completed with values from the shards and the model."""
    run_dir: RunDir
    manifest: Manifest
    plan: Plan
    held_out: HeldOutImages | None
    """Held-out images to evaluate on; None: no evaluation."""
    probe: ProbePlans | None
    """Labelled images to probe the encoder on; None: no probe."""
    saved: dict[str, Any] | None
    """trainer.json of the newest checkpoint, not verified yet; None: no checkpoint."""
    planned_end: int | None = None
    """Length of a run that ends with its data, in units of `optim.schedule_by`; None: another limit
    says where the schedule ends."""

    @property
    def already_finished(self) -> str | None:
        """Return a message if the run has already reached the end set in the config, else None."""
        if not self.run_dir.finished.exists() or not self.run_dir.config.exists():
            return None
        before = load_config(str(self.run_dir.config)).train
        if any(getattr(before, name) != getattr(self.config.train, name) for name in _ENDS):
            return None
        at = self.run_dir.finished.read_text().strip()
        ends = [f"train.{name}" for name in _ENDS if getattr(before, name) is not None]
        return (
            f"{self.run_dir.path} is already finished, at {at}: raise {' or '.join(ends)} to train "
            "on, or choose another run.dir"
        )


def check_start(config: ZetaConfig, world_size: int, share: Share = ALL_SHARDS) -> CheckedRun:
    """Check everything about a run that can be known before it starts; of its shards, a share.

    Raises:
        ValueError, RunError: the run cannot work; the message names the field, its value and the
            remedy.
        OSError: the shards or the run directory are not reachable at the moment.
    """
    check_installed(DEEPSPEED)
    check_destinations(config)
    check_world_size(world_size, config.train.packs_per_step)
    run_dir = run_directory(config)
    manifest = open_shards(config.data.shards, share)
    config = resolve_with_shards(completed(config), manifest)
    check_resume(run_dir, config)
    check_writable(run_dir)
    if config.train.tokens_per_forward != AUTO:
        packs_per_forward(config.train.tokens_per_forward, config.data.token_budget)
    workers = loader_workers(config, os.environ)
    check_shared_memory(workers)
    # The plan's config alone has the number: another machine that continues the run has its own.
    here = with_workers(config, workers)
    plan = training_plan(here, manifest)
    check_images_fit(plan, config)
    held_out = open_held_out(here, manifest)
    probe = open_probe(here, manifest)
    if probe is not None:
        encoder_of(abstract_model(config), probe.encoder)
    saved = _check_checkpoint(run_dir, config, plan)
    planned_end = None
    if ends_by_epochs(config.train):
        planned_end = planned_length(plan, config.optim.schedule_by)
        build_schedule(config.optim, config.train, planned_end)  # raises if the ramps are too long
    # Last, as it builds an optimizer, for which torch imports its compiler, a third of the time.
    check_optimizer(config.optim, config.train)
    checked = CheckedRun(config, run_dir, manifest, plan, held_out, probe, saved, planned_end)
    if checked.already_finished is None and run_dir.stop_request.exists():
        raise RunError(f"{run_dir.stop_request} asks this run not to train: delete it to continue")
    return checked


def check_resume(run_dir: RunDir, config: ZetaConfig) -> None:
    """Refuse to continue a run under a config that changes what it computes.

    Raises:
        ValueError: the message names every fixed field that differs from the run's config.yaml, or
            a foreign file if the folder is not a run directory.
    """
    if not run_dir.config.exists():
        if foreign := run_dir.foreign_names():
            raise ValueError(
                f"run.dir is {run_dir.path}, which contains {foreign[0]!r} and is not a run "
                "directory; choose a new or empty folder"
            )
        return
    changes = fixed_changes(run_dir.config.read_text(), config)
    if changes:
        listed = "; ".join(_described(config, *change) for change in changes)
        raise ValueError(
            f"{run_dir.path} holds a run with another config: {listed}. Change it back, or choose "
            "another run.dir"
        )
    tokenizer = Path(config.data.text.tokenizer).expanduser()
    if run_dir.tokenizer.exists() and run_dir.tokenizer.read_bytes() != tokenizer.read_bytes():
        raise ValueError(
            f"data.text.tokenizer {tokenizer} is not the one that the run in {run_dir.path} began "
            f"with; that is {run_dir.tokenizer}"
        )


def _described(config: ZetaConfig, key: str, old: Any, new: Any) -> str:
    """Describe a changed field; if a file decides it, by the field that names the file."""
    if (source := DECIDED_BY.get(key)) is None:
        return f"{key} was {old!r} and is now {new!r}"
    return f"{source} is {attrgetter(source)(config)}, with {key} {new}; it was {old}"


def check_writable(run_dir: RunDir) -> None:
    """Raise ValueError if the run directory cannot be created or written; leave nothing behind.

    A full disk raises OSError, because there may be room again at the next start.
    """
    folder = existing_parent(run_dir.path)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, error.strerror, str(folder)) from None
        raise ValueError(
            f"run.dir is {run_dir.path}, but nothing can be written in {folder} "
            f"({error.strerror}): choose another run.dir"
        ) from None


def check_shared(run_dir: RunDir, proof: str) -> None:
    """Raise ValueError if this rank's run directory is not the same folder as rank 0's.

    Args:
        run_dir: the run directory as this machine sees it.
        proof: `RunLock.proof` of rank 0's claim; empty: rank 0 claimed no directory.
    """
    if proof and not sees_claim(run_dir, proof):
        raise ValueError(
            f"run.dir is {run_dir.path}, but what rank 0 writes there cannot be seen on "
            f"{socket.gethostname()}: it lies on a disk of one machine; choose a run.dir on "
            "storage that every node sees"
        )


def check_images_fit(plan: Plan, config: ZetaConfig) -> None:
    """Raise ValueError if the images do not fit into a pack at the size that the config requests.

    A single image with more tokens than a pack is shrunk, and counted. If that would happen to all
    images, or if the model accepts only one size, the budget is a mistake.
    """
    model = config.model.resolve()
    budget, prefix = config.data.token_budget, prefix_tokens(model)
    views = config.data.views_of_sample
    shared = "" if views == 1 else f" for {views} views of each image in one pack"
    if takes_one_size(model):
        pixels = config.data.resolution.max
        tokens = (pixels // model["patch_size"]) ** 2 + prefix
        if views * tokens > budget:
            raise ValueError(
                f"data.token_budget is {budget}{shared}, but an image of {pixels} x {pixels} "
                f"pixels has {tokens} tokens, and model.arch megavit takes no smaller one: set it "
                f"to at least {views * tokens}"
            )
    elif plan.masses.shrunk.sum() >= plan.masses.usable.sum():
        side = int((budget // views - prefix) ** 0.5) * model["patch_size"]
        raise ValueError(
            f"data.token_budget is {budget}{shared}, but every image has more tokens at the size "
            f"that data.resolution gives it (up to {config.data.resolution.max} pixels a side): "
            f"raise data.token_budget, or lower data.resolution.max to {side}"
        )


def _check_checkpoint(run_dir: RunDir, config: ZetaConfig, plan: Plan) -> dict[str, Any] | None:
    """Check that the newest checkpoint fits this model and these shards; return its state.

    Without a checkpoint, check the weights of `train.init_from` instead.
    """
    model = abstract_model(config)
    names = step_names(run_dir.checkpoints) if run_dir.checkpoints.is_dir() else []
    if not names:
        if (init_from := config.train.init_from) is not None:
            check_initial_weights(model, init_from)
        return None
    newest = run_dir.checkpoints / names[-1]
    try:
        saved = read_trainer_state(newest)
        parameters, data = saved["parameters"], saved["progress"]["data"]
    except (OSError, ValueError, KeyError):
        return None  # a damaged checkpoint is set aside when the run starts
    check_same_model(parameters, parameter_shapes(model), str(newest))
    check_state(plan, data)
    return dict(saved)


def abstract_model(config: ZetaConfig) -> nn.Module:
    """Build the model of a run without weights."""
    with torch.device("meta"):
        model = build_for_objective(config.model, config.objective, config.train.seed)
    freeze(model, config.train.trainable)
    return model
