"""The configuration of a run: typed defaults < YAML recipe < `key=value` on the command line.

Each section is a dataclass beside what it builds; this module composes them. A recipe is a YAML
file, or the bare name of a shipped one. Its top-level `include:` lists files that are merged, in
order, before the file's own keys (looked up beside the file, then in the shipped configs/):

    include: [model/navit_b16, train/gpu]
    train:
      max_steps: 920000

`cluster=NAME` on the command line replaces the file of configs/cluster/ that the recipe includes
with another one, or with your own file.

Unknown keys and wrong types are errors that name the key. World size is never in a config: it is
the number of ranks that were started.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_pipeline.config import DataConfig
from launch.config.cluster import ClusterConfig
from launch.config.keys import (
    check_numbers,
    expected_type,
    leaves,
    parse_override,
    shown,
    whole_number,
)
from launch.config.moved_keys import with_moved_keys
from launch.config.references import check_references
from launch.config.yaml_text import parse_yaml
from launch.shipped import configs_root, recipe_names
from zeta.config_field import free, free_fields
from zeta.models.config import ModelConfig
from zeta.objectives import OBJECTIVES, objective_class
from zeta.objectives.config import ObjectiveConfig
from zeta.objectives.distill import Distillation
from zeta.tracking.config import TrackerConfig
from zeta.train.config import UNITS, OptimConfig, TrainConfig
from zeta.train.schedule import RAMPS, build_schedule, ramp_length

FREE_SECTIONS = ("run.", "tracker.", "cluster.")
_CLUSTER = "cluster="
_UNKNOWN_END = 1 << 60
"""Stand-in for the length of a run by epochs, above any number of steps, images or tokens."""
_RAMP_KEYS = {f"optim.{ramp}_{unit}" for ramp in RAMPS for unit in (*UNITS, "share")}
Setting: TypeAlias = tuple[str, str, Any]
"""Triple of source (for messages), dotted key and value."""
DEFAULT = "default"
"""Source of a setting that zeta made itself."""


@dataclass
class RunConfig:
    """Name and directory of a run."""

    name: str = free("zeta")
    """Name of the run in W&B and reports; if unset, the last part of run.dir, or the name of the
    recipe if that is unset as well."""
    dir: str = free("runs/${run.name}")
    """Run directory, shared by all ranks and restarts. The same directory continues the run."""

    def __post_init__(self) -> None:
        if not self.name.strip() or "/" in self.name or self.name in (".", ".."):
            raise ValueError(
                f"run.name is {self.name!r}; it must be a name without slashes "
                "(set run.dir to choose another folder)"
            )
        if not self.dir.strip():
            raise ValueError("run.dir is empty; give a folder, as in run.dir=runs/first")


@dataclass
class ZetaConfig:
    """The complete config of `zeta train`, by section."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


def load_config(name_or_path: str, overrides: Sequence[str] = ()) -> ZetaConfig:
    """Compose and check the configuration of a run.

    Args:
        name_or_path: a YAML file, or the bare name of a shipped recipe.
        overrides: `key=value` settings, which override the file.

    Raises:
        ValueError: no such recipe, YAML that cannot be read, an unknown key, a value of the wrong
            type or outside its range, or values that contradict each other; the message names them.
    """
    return config_from(read_settings(name_or_path, overrides))


def read_settings(name_or_path: str, overrides: Sequence[str] = ()) -> list[Setting]:
    """Return the settings of a recipe and of the command line; later ones override earlier ones.

    Raises:
        ValueError: see `load_config`, except for errors that need the complete config.
    """
    path = find_config(name_or_path)
    pieces = [text.partition("=")[2] for text in overrides if text.startswith(_CLUSTER)]
    cluster = _find_cluster(pieces[-1]) if pieces else None
    trees = _read_with_includes(path, (), cluster)
    if cluster is not None and f"in {cluster}" not in dict(trees):
        trees = [*_read_with_includes(cluster, ()), *trees]
    settings: list[Setting] = [(DEFAULT, "run.name", path.stem)]
    for source, tree in trees:
        settings += [(source, key, value) for key, value in leaves(tree, ZetaConfig, source)]
    typed = [parse_override(t, ZetaConfig) for t in overrides if not t.startswith(_CLUSTER)]
    settings += [("on the command line", key, value) for key, value in typed]
    return [_named_after_directory(settings), *settings[1:]]


def _named_after_directory(settings: Sequence[Setting]) -> Setting:
    """Return the default of run.name: the last part of run.dir if that is set, else as it is.

    So runs of one recipe are told apart, and the same command gives the same name.
    """
    chosen = next((value for _, key, value in reversed(settings) if key == "run.dir"), None)
    name = Path(chosen).name if isinstance(chosen, str) and "${" not in chosen else ""
    source, key, recipe = settings[0]
    return source, key, name if name.strip() and name != ".." else recipe


def config_from(settings: Iterable[Setting]) -> ZetaConfig:
    """Apply settings in order to the typed defaults, and check the whole.

    Raises:
        ValueError: a value of the wrong type or outside its range, or values that contradict each
            other.
    """
    config = compose(settings)
    _check_sections_together(config)
    return config


def find_config(name_or_path: str) -> Path:
    """Return the path of a config file given by path or by the name of a shipped recipe.

    Raises:
        ValueError: there is no such file; the message lists the shipped recipes.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    shipped = configs_root() / f"{name_or_path}.yaml"
    if path.name == name_or_path and shipped.is_file():
        return shipped
    hint = f" ({path} is a folder; give the YAML file in it)" if path.is_dir() else ""
    if near := difflib.get_close_matches(name_or_path, recipe_names(), n=1):
        hint = f" (did you mean {near[0]}?)"
    raise ValueError(
        f"no config {name_or_path!r}{hint}: give the path of a YAML file or the name of a shipped "
        f"recipe: {', '.join(recipe_names())}"
    )


def to_yaml(config: ZetaConfig) -> str:
    """Return the resolved config as YAML that `load_config` reads back unchanged."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def fixed_changes(old_yaml: str, new: ZetaConfig) -> list[tuple[str, Any, Any]]:
    """Return (key, old value, new value) of every changed field that a resume must not change.

    Args:
        old_yaml: config of the run so far, written by `to_yaml`.
        new: config of the resumed run.
    """
    # A run older than a field has used the field's default.
    before = dict(leaves(parse_yaml(to_yaml(ZetaConfig()), "the defaults"), ZetaConfig, ""))
    source = "the saved config"
    saved = leaves(parse_yaml(old_yaml, source), ZetaConfig, source)
    before |= {key: value for _, key, value in with_moved_keys((source, *each) for each in saved)}
    after = dict(leaves(parse_yaml(to_yaml(new), "the config"), ZetaConfig, "the config"))
    free_keys = free_fields(ZetaConfig)
    if _same_ramps(before, new):
        free_keys |= _RAMP_KEYS
    return [
        (key, before[key], value)
        for key, value in after.items()
        if key not in free_keys
        and not key.startswith(FREE_SECTIONS)
        and _without_place(key, before[key]) != _without_place(key, value)
    ]


def _same_ramps(before: dict[str, Any], new: ZetaConfig) -> bool:
    """Return whether warm-up and cooldown have the lengths of before, however they are given."""
    prefix, optim = "optim.", new.optim
    old = SimpleNamespace(
        **{key.removeprefix(prefix): v for key, v in before.items() if key.startswith(prefix)}
    )
    end = getattr(new.train, f"max_{optim.schedule_by}") or _UNKNOWN_END
    return old.schedule_by == optim.schedule_by and all(
        ramp_length(old, ramp, end) == ramp_length(optim, ramp, end) for ramp in RAMPS
    )


def _without_place(key: str, value: Any) -> Any:
    """Return the part of a value that a resume must not change: of `data.shards`, the weights.

    Shards may have moved; whether they are those of the run is known by their fingerprint, which is
    compared with that of the checkpoint.
    """
    if key != "data.shards":
        return value
    weighted = isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value)
    if not weighted:
        return None
    return [entry.get("weight", 1.0) if isinstance(entry, Mapping) else None for entry in value]


def compose(settings: Iterable[Setting]) -> ZetaConfig:
    """Apply settings in order to the typed defaults; the sections are not checked together.

    Raises:
        ValueError: a value of the wrong type or outside its range.
    """
    composed = OmegaConf.structured(ZetaConfig)
    settings = list(with_moved_keys(settings))
    check_references(settings, ZetaConfig)
    for source, key, value in settings:
        try:
            value = whole_number(value, ZetaConfig, key)
            check_numbers(key, value, source)
            OmegaConf.update(composed, key, value, merge=False)
        except OmegaConfBaseException as error:
            raise ValueError(
                f"{key} is {shown(value)} ({source}); it must be {expected_type(ZetaConfig, key)}"
            ) from error
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "the config"
        raise ValueError(f"{key} cannot be resolved: {str(error).splitlines()[0]}") from error
    assert isinstance(config, ZetaConfig)
    return config


def _read_with_includes(
    path: Path, parents: tuple[Path, ...], cluster: Path | None = None
) -> list[tuple[str, dict[str, Any]]]:
    """Return (source, tree) of a file's includes, depth first, and then of the file itself.

    `cluster` replaces every included file of a folder cluster/.
    """
    if path in parents:
        chain = " -> ".join(str(item) for item in (*parents, path))
        raise ValueError(f"config files include each other in a circle: {chain}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the config {path}: {error}") from error
    tree = parse_yaml(text, str(path))
    includes = tree.pop("include", None) or []
    if not isinstance(includes, list) or not all(isinstance(item, str) for item in includes):
        raise ValueError(f"include in {path} must be a list of file names, not {includes!r}")
    result = []
    for name in includes:
        found = _find_include(name, path)
        if cluster is not None and found.parent.name == "cluster":
            result += _read_with_includes(cluster, (*parents, path))
        else:
            result += _read_with_includes(found, (*parents, path), cluster)
    return [*result, (f"in {path}", tree)]


def _find_include(name: str, included_by: Path) -> Path:
    for folder in (included_by.parent, configs_root()):
        for candidate in (folder / name, folder / f"{name}.yaml"):
            with suppress(OSError):  # a name that is too long for a file
                if candidate.is_file():
                    return candidate
    pieces = sorted(
        str(path.relative_to(configs_root()).with_suffix(""))
        for path in configs_root().glob("*/*.yaml")
    )
    raise ValueError(
        f"{included_by} includes {shown(name)}, which is neither beside it nor shipped; "
        f"shipped pieces: {', '.join(pieces)}"
    )


def _find_cluster(name: str) -> Path:
    folder = configs_root() / "cluster"
    for candidate in (Path(name).expanduser(), folder / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    shipped = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    raise ValueError(
        f"no cluster {name!r}: give the path of a YAML file, or one of those shipped: {shipped}"
    )


def _check_sections_together(config: ZetaConfig) -> None:
    """Raise ValueError if values of several sections or fields contradict each other."""
    if config.data.shards is None:
        raise ValueError("data.shards is not set; give the shards, as in data.shards=my/shards")
    # Raises if they do not fit. The steps of a run by epochs are known with its shards.
    build_schedule(config.optim, config.train, _UNKNOWN_END)
    watchdog = config.train.watchdog
    if config.data.read_deadline_s >= watchdog.limit("data"):
        raise ValueError(
            f"data.read_deadline_s is {config.data.read_deadline_s:g}; it must be below "
            f"train.watchdog.data_s = {watchdog.data_s:g}, after which a rank that waits for data "
            "is taken to hang: raise train.watchdog.data_s and train.watchdog.train_s"
        )
    _check_objective(config)
    if config.model.channels not in (None, 3):
        raise ValueError(
            f"model.channels is {config.model.channels}, but images are read as RGB: leave it out"
        )


def _check_taught(objective: ObjectiveConfig) -> None:
    """Raise ValueError for a teacher that no shipped objective would learn from."""
    kind, teacher = objective.kind, objective.distill.teacher
    if teacher is None or kind not in OBJECTIVES or issubclass(OBJECTIVES[kind], Distillation):
        return
    both = f"{kind}+distill"
    choices = f"{both} (or distill)" if both in OBJECTIVES else "distill"
    raise ValueError(
        f"objective.distill.teacher is {teacher}, but objective.kind {kind} learns from no "
        f"teacher: set objective.kind={choices}, or leave the teacher out"
    )


def _check_objective(config: ZetaConfig) -> None:
    """Raise ValueError if the objective and its model contradict each other."""
    objective, outputs = config.objective, config.model.num_classes
    declared = objective_class(objective.kind)
    declared.check_config(objective)
    _check_taught(objective)
    wanted = declared.head_outputs(objective)
    if wanted is not None and outputs not in (None, wanted):
        raise ValueError(
            f"model.num_classes is {outputs}, but objective.kind {objective.kind} has no classes: "
            f"leave it out (the head has {wanted} outputs)"
        )
    if declared.encoder and config.train.trainable != "all":
        raise ValueError(
            f"train.trainable is {config.train.trainable}, which is for classification: with "
            f"objective.kind {objective.kind} set it to all"
        )
