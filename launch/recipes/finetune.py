"""`zeta finetune`: train an export on labelled images, into a model of their classes.

It is a run like any other, in a run directory of its own: the same trainer, resume and signals. It
adds the recipe (`launch.recipes.finetune_recipe`), shards made of a folder of images, and the
scores on held-out images before and after. A head alone is no run: `launch.recipes.finetune_probe`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_pipeline.shards.weighted import open_shards
from launch.config.destinations import run_directory
from launch.config.load import DEFAULT, Setting, ZetaConfig, read_settings, to_yaml
from launch.config.resolve import resolve_with_shards
from launch.evaluate.scores import evaluate_plan
from launch.evaluate.small_images import small_images
from launch.export import export_run
from launch.recipes.finetune_images import find_images, shard_settings, shards_go_if_refused
from launch.recipes.finetune_probe import check_probe, fit_head
from launch.recipes.finetune_recipe import (
    SHIPPED,
    Export,
    compose,
    open_export,
    recipe_settings,
    settings_of_export,
    settings_of_images,
)
from launch.run.checks import check_resume, check_start, check_writable
from launch.run.local import launch_local
from launch.run.ranks import starter
from launch.run.train import train
from launch.run.validation_data import open_held_out
from launch.run.workers import loader_workers, with_workers
from zeta import metric_names as names
from zeta.distributed import rank_from_environment
from zeta.exit_codes import ExitCode
from zeta.files import read_json, write_whole_text
from zeta.models.config import build_model, load_pretrained
from zeta.objectives import build_objective
from zeta.probes.image_scores import RowObjective
from zeta.run.directory import RunDir
from zeta.run.step_scores import read_scores


def finetune(
    export_path: Path,
    source: str,
    overrides: Sequence[str],
    *,
    mode: str | None = None,
    nproc: int | None = None,
    val_share: float = 0.1,
) -> int:
    """Fine-tune an export; return the exit status, as `zeta train` does.

    Args:
        export_path: folder written by `zeta export`.
        source: a folder of images (its subfolders are the classes), a table of paths, shards, or a
            CONFIG as `zeta train` takes it.
        overrides: `key=value` settings.
        mode: full, probe or last-K; None: as `train.trainable` says, or full.
        nproc: ranks to start on this machine; None: this process is the only one, or a rank of
            torchrun or srun.
        val_share: share of a folder's images that is held out.

    Raises:
        ValueError: the export, the images or the settings cannot be used; nothing was begun.
    """
    export = open_export(export_path)
    info = rank_from_environment(os.environ) if nproc is None else starter(os.environ)
    images = find_images(source)
    user = read_settings(source if images is None else SHIPPED, overrides)
    user = [setting for setting in user if setting[0] != f"in {SHIPPED}"]
    of_head = mode is None and _last(user, "train.trainable") == "head"
    base = [*settings_of_export(export), *recipe_settings("probe" if of_head else mode)]
    draft = _draft(export, base, user, mode)
    run_dir = run_directory(draft)
    if mode == "probe":
        check_probe(user, nproc or info.world_size, run_dir)
    if images is not None and not images.are_shards:
        check_writable(run_dir)
        if not run_dir.config.exists():
            check_resume(run_dir, draft)  # a folder that holds something else gets no shards
    with shards_go_if_refused(run_dir):
        if images is not None:
            base += shard_settings(images, run_dir, val_share, launched=info.world_size > 1)
        shards = _last([*base, *user], "data.shards")
        if shards is None:
            raise ValueError("data.shards is not set; set it, as in data.shards=my/shards")
        base += [*settings_of_images(shards, user), *_head_settings(export, shards)]
        config = compose(export, base, user, mode)
        checked = check_start(config, nproc or info.world_size)
        if info.rank == 0:
            warning = small_images(checked.manifest, export.arguments["patch_size"])
            if warning is not None:
                print(warning, file=sys.stderr)
            if mode == "probe":
                record = _about(export, config) | fit_head(export, config, run_dir)
                write_whole_text(run_dir.fine_tuning, json.dumps(record) + "\n")
                _say(record, run_dir.exported)
                return ExitCode.FINISHED
            _begin(run_dir, export, config)
    if nproc is None:
        code = train(config)
    else:
        code = launch_local(str(run_dir.fine_tuning_config), [], nproc)
    if code == ExitCode.FINISHED and info.rank == 0:
        _finish(run_dir)
    return code


def _draft(
    export: Export, base: Sequence[Setting], user: Sequence[Setting], mode: str | None
) -> ZetaConfig:
    """Check the settings before anything is written, with images and length of the run unknown."""
    unknown = {"data.shards": "images", "train.max_images": 10**9}
    if not any(key == "train.max_steps" and value for _, key, value in user):
        unknown["optim.schedule_by"] = "images"
    draft = [*base, *((DEFAULT, key, value) for key, value in unknown.items())]
    return compose(export, draft, user, mode)


def _last(settings: Sequence[Setting], key: str) -> Any:
    return next((value for _, name, value in reversed(settings) if name == key), None)


def _head_settings(export: Export, shards: Any) -> list[Setting]:
    """Keep the head of the export if its classes are those of the images, in the same order."""
    trained, wanted = export.info.get("class_names"), open_shards(shards).class_names
    same = trained is not None and wanted is not None and list(trained) == list(wanted)
    return [(DEFAULT, "train.new_head", not same)]


def _begin(run_dir: RunDir, export: Export, config: ZetaConfig) -> None:
    """Write the recipe, and score the initial weights unless that was done before."""
    about, path = _about(export, config), run_dir.fine_tuning
    record = read_json(path, limit=2**20, what="delete it") if path.exists() else {}
    if (
        not isinstance(record, dict)
        or not record
        or any(record.get(key, value) != value for key, value in about.items())
    ):
        record = about | {"before": score_beginning(config)}
    run_dir.path.mkdir(parents=True, exist_ok=True)
    write_whole_text(run_dir.fine_tuning_config, to_yaml(config))
    write_whole_text(run_dir.fine_tuning, json.dumps(record) + "\n")


def _about(export: Export, config: ZetaConfig) -> dict[str, Any]:
    data = {"shards": str(config.data.shards), "val_shards": str(config.data.val_shards)}
    return {"export": str(export.path), "new_head": config.train.new_head, "data": data}


def score_beginning(config: ZetaConfig) -> dict[str, Any] | None:
    """Return the scores of a run's initial weights on its held-out images; None if it has none.

    Args:
        config: config of the run; `train.init_from` is an export.
    """
    manifest = open_shards(config.data.shards)
    resolved = resolve_with_shards(config, manifest)
    workers = loader_workers(resolved, os.environ)
    held_out = open_held_out(with_workers(resolved, workers), manifest)
    if held_out is None or held_out.classes is None:
        return None
    arguments = resolved.model.resolve()
    model = build_model(resolved.model, resolved.train.seed)
    assert config.train.init_from is not None
    _begin_at(model, load_pretrained(config.train.init_from), new_head=config.train.new_head)
    use_cuda = config.train.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if use_cuda else "cpu")
    objective = build_objective(resolved.objective, arguments["num_classes"])
    assert isinstance(objective, RowObjective), "image-text runs have no classes"
    _, plan = held_out.plans[0]
    found = evaluate_plan(model.to(device).eval(), objective, plan, device, held_out.classes)
    return vars(found)


def _begin_at(model: nn.Module, trained: nn.Module, *, new_head: bool) -> None:
    """Give `model` the weights of `trained`, as `zeta.train.init_from` does in the run."""
    weights, own = trained.state_dict(), model.state_dict()
    head = {name for name in own if name.startswith("head.")}
    if new_head:
        weights |= {name: torch.zeros_like(own[name]) for name in head}
    elif any(weights[name].shape != own[name].shape for name in head):
        weights |= {name: own[name] for name in head}
    model.load_state_dict(weights)


def _finish(run_dir: RunDir) -> None:
    """Export the model, and print its scores before and after, and what to type next."""
    record = read_json(run_dir.fine_tuning, limit=2**20, what="delete it")
    lines = [values for _, values in sorted(read_scores(run_dir.metrics).items())]
    scores = [values for values in lines if names.val_score("top1") in values]
    out = export_run(run_dir.path, run_dir.exported, overwrite=True).folder
    record["after"] = None
    if record["before"] is not None and scores:
        last = scores[-1]
        score_names = ("top1", "top5", "loss")
        record["after"] = {name: last[names.val_score(name)] for name in score_names}
        record["after"]["images"] = last[names.VAL_IMAGES]
        write_whole_text(run_dir.fine_tuning, json.dumps(record) + "\n")
    _say(record, out)


def _say(record: dict[str, Any], out: Path) -> None:
    """Print the scores before and after, and what to type next."""
    before, after = record["before"], record["after"]
    if before is None or after is None:
        print("no images were held out: give data.val_shards to have the model scored")
    else:
        untrained = " (its head is new: chance)" if record["new_head"] else ""
        print(
            f"held-out top-1: {before['top1']:.2%} before{untrained}, {after['top1']:.2%} after, "
            f"on {after['images']:,} images"
        )
    print(f"the model is in {out}; try: zeta predict {out} IMAGES")
    sys.stdout.flush()
