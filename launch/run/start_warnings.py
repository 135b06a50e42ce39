"""What a run is warned of at its start and in a dry run: it can train, but not as one may think."""

from __future__ import annotations

from collections.abc import Iterator

from data_pipeline.plan.plan import Plan
from launch.config.load import ZetaConfig
from launch.run.checks import CheckedRun
from zeta.export.formats import obstacles
from zeta.objectives import objective_class
from zeta.objectives.embedding_spread import FEWEST
from zeta.objectives.lejepa import LejepaObjective
from zeta.train.probing.scores import CLASSIFIER_WORDS


def start_warnings(checked: CheckedRun) -> Iterator[str]:
    """Yield what a run that was checked is warned of, each in a sentence without a stop."""
    yield from _trained_on(checked)
    yield from _unused_shards(checked.config)
    if issubclass(objective_class(checked.config.objective.kind), LejepaObjective):
        yield from _few_held_out(checked)
        yield from _few_images(checked.plan, checked.config)
    for name, obstacle in obstacles(checked.config.model.resolve()).items():
        yield f"`zeta export --format {name}` will refuse this model: {obstacle}"


def _trained_on(checked: CheckedRun) -> Iterator[str]:
    """Yield held-out shards that are learned from as well."""
    held_out, probe = checked.held_out, checked.probe
    if held_out is not None and held_out.trained_on:
        yield (
            f"{_are_in(held_out.trained_on, 'data.val_shards', 'data.shards')}: val/ is not "
            "measured on images never seen; `zeta shards build --val-share` makes shards that "
            "share no image"
        )
    if probe is not None and probe.shared:
        train_key, test_key = probe.names
        words = " and ".join(CLASSIFIER_WORDS[name] for name in probe.classifiers)
        yield (
            f"{_are_in(probe.shared, test_key, train_key)}: {words} (train.evaluate) "
            f"find{'' if ' and ' in words else 's'} the images themselves there; give other shards "
            "as data.probe_shards or data.probe_val_shards"
        )


def _are_in(count: int, of: str, other: str) -> str:
    if count == 1:
        return f"1 shard of {of} is in {other} too"
    return f"{count:,} shards of {of} are in {other} too"


def _unused_shards(config: ZetaConfig) -> Iterator[str]:
    """Yield settings of probes that are not asked for."""
    if config.train.evaluate.knn or config.train.evaluate.probe:
        return
    keys = ("probe_shards", "probe_val_shards")
    given = [f"data.{key}" for key in keys if getattr(config.data, key) is not None]
    if given:
        yield (
            f"{' and '.join(given)} {'are' if len(given) > 1 else 'is'} set, but nothing reads "
            f"{'them' if len(given) > 1 else 'it'}: set train.evaluate.knn=true or "
            "train.evaluate.probe=true"
        )


def _few_held_out(checked: CheckedRun) -> Iterator[str]:
    """Yield that the embeddings of the held-out images are too few to show a collapse."""
    images = dict[str, int]()
    if checked.held_out is not None:
        images["data.val_shards"] = checked.held_out.plans[0][1].num_images
    if checked.probe is not None:
        images[checked.probe.names[1]] = checked.probe.test.num_images
    if images and max(images.values()) < FEWEST:
        key = max(images, key=images.__getitem__)
        yield (
            f"embedding rank and deviation, which show a collapse, need {FEWEST} held-out images, "
            f"and {key} has {images[key]:,}: there are no such scores; hold out more"
        )


def _few_images(plan: Plan, config: ZetaConfig) -> Iterator[str]:
    """Yield that a step has too few images for their spread to say anything."""
    if plan.num_images < FEWEST:
        yield (
            f"data.shards holds {plan.num_images:,} image{'' if plan.num_images == 1 else 's'}, "
            f"and objective.kind {config.objective.kind} keeps those of a step apart, which says "
            f"little of fewer than {FEWEST}: give more images"
        )
        return
    images = _first_images(plan)
    if images < FEWEST:
        data, train = config.data, config.train
        yield (
            f"the first step has {images:,} image{'' if images == 1 else 's'}, and objective.kind "
            f"{config.objective.kind} keeps those of a step apart, which says little of fewer than "
            f"{FEWEST}: raise data.token_budget = {data.token_budget}, data.max_images_per_pack = "
            f"{data.max_images_per_pack} or train.packs_per_step = {train.packs_per_step}"
        )


def _first_images(plan: Plan) -> int:
    """Return the number of samples of the first step, counted no further than is needed."""
    found = set[int]()
    for lane in range(plan.num_lanes):
        pack = plan.lane(lane).next_pack()
        if pack is not None:
            found.update(pack.sample_ids.tolist())
        if len(found) >= FEWEST:
            break
    return len(found)
