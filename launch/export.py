"""Write a checkpoint of a run as a model that loads elsewhere."""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from launch.config.load import ZetaConfig, load_config
from launch.filesystems import check_place
from zeta.checkpoint.directory import (
    CONFIG,
    find_fault,
    newest_whole,
    read_trainer_state,
    stored_weights,
)
from zeta.export.card import card_arguments, model_card
from zeta.export.folder import check_free, remove_leftovers, whole_directory
from zeta.export.formats import open_formats
from zeta.export.protocol import MAX_FILE_BYTES, ExportFormat, ModelToExport, TextExport
from zeta.export.saving import check_formats, write_formats
from zeta.export.text_encoder import split_weights
from zeta.files import read_json
from zeta.models.exported import CARD_FILE, CONFIG_FILE
from zeta.objectives import objective_class
from zeta.objectives.distill import Distillation
from zeta.run.directory import TRAINER_STATE, RunDir, step_name, step_names, step_of
from zeta.run.places import find_run
from zeta.run.step_scores import best_first, read_scores
from zeta.stored_tensors import StoredTensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CONSTANTS = ("mean", "std")
"""Buffers that stay fp32: rounded, they would shift every pixel."""
_SIZES = ("kind", "min", "max", "fit", "max_upscale")
"""Fields of `data.resolution` that an export keeps."""


@dataclass(frozen=True)
class Exported:
    """An export that was written."""

    folder: Path
    checkpoint: Path
    why: str
    """Reason for the choice of the checkpoint, in words."""


def export_run(
    run_path: Path,
    out: Path,
    *,
    step: int | Literal["latest", "best"] = "latest",
    form: str = "zeta",
    average: bool = False,
    dtype: str = "fp32",
    max_file_bytes: int = MAX_FILE_BYTES,
    overwrite: bool = False,
) -> Exported:
    """Write the weights of one whole checkpoint of a run to the folder `out`.

    Needs neither a device nor the training data, and the memory of about one parameter.

    Args:
        run_path: run directory.
        out: folder to write.
        step: checkpoint to export; latest: the newest that passes its hashes; best: the one with
            the best score on held-out images.
        form: name of a format, or of a combination of formats written side by side to the one
            folder, in `zeta.export.formats`. zeta is for `zeta eval` and `NaViT.from_pretrained`,
            with the text encoder and the tokenizer, if there are any; timm is for
            ``timm.create_model("local-dir:OUT", pretrained=True)``, and of an image-text model it
            is the image encoder alone.
        average: export the moving average of the weights (`train.ema_decay`) instead of the
            weights.
        dtype: type of the weights in the files: fp32, bf16 or fp16.
        max_file_bytes: weights for zeta beyond this are written as several files.
        overwrite: replace a former export in `out`, once the new one is whole.

    Raises:
        ValueError: `out` is not empty; no run or no whole checkpoint there, no moving average in
            it, or an option that the format cannot express.
        OSError: the files cannot be written, for want of space for example.
    """
    # Only files are read: DeepSpeed, whose types they hold, need not look for devices and log it.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    formats = open_formats(form)
    run_dir = _open_run(run_path)
    check_free(out)
    if not overwrite and out.is_dir() and any(out.iterdir()):
        raise ValueError(
            f"{out} holds an export already: give --overwrite to replace it, or name another folder"
        )
    check_place(out, "OUT")
    checkpoint, why = _choose(run_dir, step, average)
    config = load_config(str(checkpoint / CONFIG))
    check_formats(formats, config.model.resolve())
    facts = _facts(run_dir, checkpoint, config, average) | {"dtype": dtype}
    tensors = _of_type(stored_weights(checkpoint, average=average), DTYPES[dtype])
    model = _model(run_dir, config, tensors, facts, max_file_bytes)
    remove_leftovers(out)  # may take up the space that is needed
    _check_space(out, sum(each.nbytes(model) for each in formats))
    with whole_directory(out) as partial:
        write_formats(partial, formats, model)
        card = _card(out, formats, model, config_yaml=(checkpoint / CONFIG).read_text())
        (partial / CARD_FILE).write_text(card)
    return Exported(out, checkpoint, why)


def _model(
    run_dir: RunDir,
    config: ZetaConfig,
    tensors: dict[str, StoredTensor],
    facts: Mapping[str, Any],
    max_file_bytes: int,
) -> ModelToExport:
    """Return the part of a run's model that its objective declares to be exported."""
    objective, text = config.objective, None
    declared, others = objective_class(objective.kind), dict[str, StoredTensor]()
    if declared.encoder:
        tensors, others = split_weights(tensors, declared.encoder)
    if (text_arguments := declared.text_arguments(objective)) is not None:
        tokenizer = run_dir.tokenizer if run_dir.tokenizer.exists() else None
        kind = objective.kind.partition("+")[0]  # of siglip+distill, what compares captions
        parts = {n: w for n, w in others.items() if n.startswith(("text.", "logits."))}
        text = TextExport(text_arguments | {"kind": kind}, parts, tokenizer)
    resolution = {name: getattr(config.data.resolution, name) for name in _SIZES}
    return ModelToExport(config.model.resolve(), tensors, facts, resolution, text, max_file_bytes)


def _card(
    out: Path, formats: Sequence[ExportFormat], model: ModelToExport, *, config_yaml: str
) -> str:
    arguments = card_arguments(model.arguments, model.facts)
    return model_card(
        out.absolute().name,
        model.facts,
        arguments,
        config_yaml=config_yaml,
        weights=sum(math.prod(tensor.shape) for tensor in model.tensors.values()),
        uses=[each.card(arguments) for each in formats],
    )


def _open_run(path: Path) -> RunDir:
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise ValueError(f"{path} {what}; give the directory of a run (its run.dir)")
    run_dir, place = RunDir(path), find_run(path)
    command = "" if place is None else f": {place.export_command}"
    if (path / TRAINER_STATE).is_file():
        step = "N" if place is None else place.step
        raise ValueError(
            f"{path} is a checkpoint; name its run directory, and the checkpoint by --step "
            f"{step}{command}"
        )
    if (path / CONFIG_FILE).is_file():
        raise ValueError(f"{path} is an export already; name the directory of a run")
    if place is not None and place.run != path:
        raise ValueError(f"{path} is {place.what}; name the run directory{command}")
    if not run_dir.config.is_file():
        runs = sorted(run for run in path.iterdir() if RunDir(run).config.is_file())
        inside = f"; name a run in it, as in {runs[0]}" if runs else ""
        raise ValueError(f"{path} is not a run directory: it has no {run_dir.config.name}{inside}")
    return run_dir


def _choose(run_dir: RunDir, step: int | str, average: bool) -> tuple[Path, str]:
    """Return the checkpoint to export, verified, and how it was chosen."""
    folder = run_dir.checkpoints
    if isinstance(step, int):
        return newest_whole(folder, step), "as asked"
    if step == "best":
        return _best(run_dir, average)
    chosen = newest_whole(folder)
    newest = step_names(folder)[-1]
    if newest != chosen.name:
        return chosen, f"the latest that is whole: {newest} is not ({find_fault(folder / newest)})"
    return chosen, "the latest"


def _best(run_dir: RunDir, average: bool) -> tuple[Path, str]:
    folder, scores = run_dir.checkpoints, read_scores(run_dir.metrics)
    names = step_names(folder) if folder.is_dir() else []
    if not names:
        newest_whole(folder)  # raises, with the reason
    ranked = best_first(scores, map(step_of, names), average=average)
    if not ranked:
        there = ", ".join(str(step_of(name)) for name in names)
        if any(step_of(name) in scores for name in names):
            raise ValueError(
                f"the checkpoints in {run_dir.path} (steps {there}) were evaluated, but nothing "
                "says which is the best: their objective has no score. Name one by --step, or let "
                "train.evaluate.probe or train.evaluate.knn classify labelled images"
            )
        raise ValueError(
            f"none of the checkpoints in {run_dir.path} (steps {there}) was evaluated on held-out "
            f"images, so none is the best: name one by --step, or train with {_scored_by(run_dir)} "
            "and checkpoints at evaluated steps (train.checkpoint_every a multiple of "
            "train.evaluate.every)"
        )
    damaged: list[str] = []
    for candidate in ranked:
        directory = folder / step_name(candidate.step)
        fault = find_fault(directory)
        if fault is None:
            among = f"the best of {len(ranked)} with {candidate.metric} {candidate.value:.4g}"
            return directory, "; ".join([among, *damaged])
        damaged.append(f"{directory.name} is not whole ({fault})")
    raise ValueError(f"no whole checkpoint in {run_dir.path}: {'; '.join(damaged)}")


def _scored_by(run_dir: RunDir) -> str:
    """Return the settings by which evaluations of a run get a score that ranks steps."""
    config = load_config(str(run_dir.config))
    declared, evaluate = objective_class(config.objective.kind), config.train.evaluate
    if declared.headline is not None or issubclass(declared, Distillation):  # that has a loss
        return "data.val_shards"
    held_out = "labelled images held out (data.probe_val_shards or data.val_shards)"
    if evaluate.probe or evaluate.knn:
        return held_out
    return (
        f"train.evaluate.probe=true or train.evaluate.knn=true (objective.kind "
        f"{config.objective.kind} has no score of its own), {held_out}"
    )


def _of_type(tensors: Mapping[str, StoredTensor], dtype: torch.dtype) -> dict[str, StoredTensor]:
    return {
        name: tensor if name.rsplit(".", 1)[-1] in _CONSTANTS else replace(tensor, dtype=dtype)
        for name, tensor in tensors.items()
    }


def _check_space(out: Path, needed: int) -> None:
    """Raise OSError, before anything is written, if the disk has less than `needed` free bytes."""
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    if shutil.disk_usage(folder).free < needed:
        message = f"{os.strerror(errno.ENOSPC)} for weights of {needed / 1e9:.3g} GB"
        raise OSError(errno.ENOSPC, message, str(folder))


def _facts(run_dir: RunDir, checkpoint: Path, config: ZetaConfig, average: bool) -> dict[str, Any]:
    resolution = config.data.resolution
    state = read_trainer_state(checkpoint)
    progress = state["progress"]
    return {
        "run": config.run.name,
        "step": progress["step"],
        "weights": "moving average" if average else "last step",
        "images_seen": progress["images"],
        "tokens_seen": progress["tokens"],
        "epoch": progress["epoch"],
        "data_fingerprint": progress["data"]["fingerprint"],
        "objective": config.objective.kind,
        "targets": objective_class(config.objective.kind).targets,
        "resolution": {name: getattr(resolution, name) for name in ("max", "fit", "max_upscale")},
        "class_names": read_json(run_dir.classes, limit=2**30, what="restore the file")
        if run_dir.classes.exists()
        else None,
        "evaluation": dict(read_scores(run_dir.metrics).get(progress["step"], {})),
        "trained_by": {
            "code": state.get("code"),
            "versions": state.get("versions"),
            "world_size": state["world_size"],
            "zero_stage": state["zero_stage"],
        },
    }
