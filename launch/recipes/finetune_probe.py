"""`zeta finetune --mode probe`: a linear head, fitted to features that are computed once.

The encoder stays as it is, so each image goes through it once, at the size of evaluation, and the
head is the optimum that `zeta eval --probe` finds. It takes no steps and no checkpoints.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.shards.manifest import Manifest
from launch.config.load import Setting, ZetaConfig
from launch.evaluate.features import evaluation_data, labelled_features
from launch.recipes.finetune_recipe import Export
from launch.run.class_map import class_map
from launch.run.evaluation_plan import view_of_training
from launch.run.validation_data import UNKNOWN_CLASSES, check_unweighted
from launch.run.workers import loader_workers
from zeta.distributed import RankInfo, World
from zeta.export.folder import whole_directory
from zeta.export.formats import open_formats
from zeta.export.protocol import ModelToExport
from zeta.export.saving import write_formats
from zeta.models.config import load_pretrained
from zeta.models.exported import CARD_FILE
from zeta.models.packed_vit import PackedViT
from zeta.probes.classifiers import fit_linear_probe, hit_rates
from zeta.run.directory import RunDir
from zeta.stored_tensors import in_memory

_APPLY = (
    *("run.", "tracker.", "data.shards", "data.val_shards", "data.workers", "data.cache_"),
    *("data.resolution.max", "data.resolution.fit", "data.read_deadline_s"),
    *("train.device", "train.trainable"),
)
"""Beginnings of the settings that a head without steps has a use for."""
_BY_STEPS = (
    "for a head that is trained by steps, on any number of ranks and with augmentation, give "
    "train.trainable=head in the place of --mode probe"
)


def check_probe(user: Sequence[Setting], ranks: int, run_dir: RunDir) -> None:
    """Check what is asked of a head without steps, before anything is written.

    Args:
        user: settings of CONFIG and the command line.
        ranks: number of ranks of the command.
        run_dir: its run directory.

    Raises:
        ValueError: a setting without use, several ranks, or a run or model that is there already.
    """
    useless = [key for _, key, _ in user if not key.startswith(_APPLY)]
    if useless:
        raise ValueError(
            f"--mode probe fits the head to features that are computed once, so {useless[0]} has "
            f"no use: leave it out, or {_BY_STEPS}"
        )
    if ranks > 1:
        raise ValueError(
            f"--mode probe runs in one process, and {ranks} ranks are asked for: start it alone, "
            f"or {_BY_STEPS}"
        )
    if run_dir.config.exists() or run_dir.exported.exists():
        there = "a run that was trained by steps" if run_dir.config.exists() else "a model already"
        raise ValueError(
            f"{run_dir.path} holds {there}: choose another directory, as in run.dir=runs/probe, or "
            "delete that one"
        )


def fit_head(export: Export, config: ZetaConfig, run_dir: RunDir) -> dict[str, Any]:
    """Fit a head for the classes of the images, and write the model with it.

    Returns:
        The scores on held-out images `before` and `after`; None without such images.

    Raises:
        ValueError: images with lists of classes, or held-out classes that are not trained on.
        RunError: no image can be used, or an embedding is not finite.
    """
    check_unweighted("data.shards", config.data.shards)
    manifest = Manifest.open(config.data.shards)
    if manifest.label_lists:
        raise ValueError(
            f"--mode probe needs one class an image, and these have lists of classes: {_BY_STEPS}"
        )
    use_cuda = config.train.device != "cpu" and torch.cuda.is_available()
    world = World(RankInfo(), torch.device("cuda" if use_cuda else "cpu"))
    model = load_pretrained(export.path).to(world.device).eval()
    names = manifest.class_names
    classes = len(names) if names is not None else manifest.highest_label + 1
    features_ND, labels_N = _features(model, manifest, config, export, world)
    head = fit_linear_probe(features_ND, labels_N, classes).head()
    weight_KD, bias_K = (each.float().cpu() for each in head)
    found: dict[str, Any] = {"before": None, "after": None}
    if config.data.val_shards is not None:
        held_out = Manifest.open(config.data.val_shards)
        index_of = class_map(
            names,
            classes,
            held_out,
            whose="the model's",
            shards="data.val_shards",
            remedy=UNKNOWN_CLASSES,
        )
        tests_MD, tests_M = _features(model, held_out, config, export, world)
        tests_MD, tests_M = tests_MD.cpu(), torch.tensor(index_of)[tests_M.cpu()]
        own = (model.head.weight.cpu(), model.head.bias.cpu())
        if config.train.new_head or len(own[0]) != classes:
            own = (torch.zeros_like(weight_KD), torch.zeros_like(bias_K))
        heads = {"before": own, "after": (weight_KD, bias_K)}
        found = {when: _scores(F.linear(tests_MD, *each), tests_M) for when, each in heads.items()}
    state = {name: value.cpu() for name, value in model.state_dict().items()}
    state |= {"head.weight": weight_KD, "head.bias": bias_K}
    _write(run_dir.exported, export, config, state, names, len(features_ND), found["after"])
    return found


def _features(
    model: PackedViT, manifest: Manifest, config: ZetaConfig, export: Export, world: World
) -> tuple[Tensor, Tensor]:
    data = evaluation_data(manifest, dict(export.arguments), loader_workers(config, os.environ))
    reading = ("cache_dir", "cache_gb", "read_deadline_s")
    data = replace(data, **{name: getattr(config.data, name) for name in reading})
    view = view_of_training(export.arguments, _shown(config))
    features_ND, labels_N = labelled_features(model, manifest, data, view, world)
    return features_ND.to(world.device), labels_N.to(world.device)


def _shown(config: ZetaConfig) -> dict[str, Any]:
    return {name: getattr(config.data.resolution, name) for name in ("max", "fit", "max_upscale")}


@torch.no_grad()
def _scores(logits_MK: Tensor, labels_M: Tensor) -> dict[str, float]:
    loss = F.cross_entropy(logits_MK.double(), labels_M).item()
    return hit_rates(logits_MK, labels_M) | {"loss": loss, "images": len(labels_M)}


def _write(
    out: Path,
    export: Export,
    config: ZetaConfig,
    state: Mapping[str, Tensor],
    names: Sequence[str] | None,
    images: int,
    scores: Mapping[str, float] | None,
) -> None:
    arguments = {**export.arguments, "num_classes": len(state["head.weight"])}
    facts = {
        "run": config.run.name,
        "weights": "a linear head, fitted to the features of a frozen encoder",
        "init_from": str(export.path),
        "images_seen": images,
        "objective": "softmax",
        "targets": "label",
        "resolution": _shown(config),
        "class_names": None if names is None else list(names),
        "evaluation": {} if scores is None else {f"val/{name}": v for name, v in scores.items()},
        "dtype": "fp32",
    }
    formats = open_formats("zeta")
    model = ModelToExport(arguments, in_memory(state), facts, _shown(config))
    with whole_directory(out) as partial:
        write_formats(partial, formats, model)
        (partial / CARD_FILE).write_text(_card(out, model, formats[0].card(arguments)))


def _card(out: Path, model: ModelToExport, use: str) -> str:
    facts, scores = model.facts, model.facts["evaluation"]
    rows = "".join(f"\n- {name}: {value:.6g}" for name, value in scores.items())
    return (
        f"# {out.absolute().parent.name}\n\nThe encoder of {facts['init_from']}, and a linear head "
        f"that was fitted to its features of {facts['images_seen']:,} images.\n\n## Use\n\n{use}"
        f"\n\n## Evaluation\n\nOn held-out images:\n{rows or '- none'}\n"
    )
