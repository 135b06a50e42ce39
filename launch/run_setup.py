"""From a resolved config to the pieces of a run: what the model and the shards say of each other.

Token counts depend on the model's patch size, and the width of its head on the shards' classes;
this module is where the two meet.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from data_pipeline.config import DataConfig
from data_pipeline.manifest import Manifest
from data_pipeline.plan import Plan
from launch.config import ZetaConfig
from zeta.models.config import prefix_tokens


def resolve_with_shards(config: ZetaConfig, manifest: Manifest) -> ZetaConfig:
    """Fill in what a config leaves to the shards and the model, and check that they agree.

    Raises:
        ValueError: no classes are known, or the shards have more than the model's head.
    """
    names = manifest.class_names
    num_classes = config.model.num_classes
    if num_classes is None:
        if names is None:
            raise ValueError(
                "the shards have no class map (classes.json), so model.num_classes must be set"
            )
        num_classes = len(names)
    elif names is not None and len(names) > num_classes:
        raise ValueError(
            f"model.num_classes is {num_classes}, but the class map of the shards has {len(names)}"
        )
    model = replace(config.model, num_classes=num_classes)
    return replace(config, model=model, data=data_for_model(config.data, model.resolve()))


def data_for_model(data: DataConfig, model_arguments: dict[str, Any]) -> DataConfig:
    """Return the data config with what the model decides: patch size, prefix tokens, cost."""
    return replace(
        data,
        patch_size=model_arguments["patch_size"],
        prefix_tokens=prefix_tokens(model_arguments),
        cost_dim=model_arguments["dim"],
        require_labels=True,
    )


def training_plan(config: ZetaConfig, manifest: Manifest) -> Plan:
    """Return the plan of a run from its resolved config."""
    return Plan(
        manifest, config.data, config.train.packs_per_step, max_epochs=config.train.max_epochs
    )
