"""Config of the trackers that metrics are sent to besides metrics.jsonl (`tracker.*`)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from zeta.config_field import check_choice, check_range, free

KINDS = ("wandb", "tensorboard", "csv")
"""Trackers that metrics can be sent to."""
_LONGEST_TAG = 64
"""Most characters that W&B accepts in a tag."""
_LONGEST_NAMES = {"project": 128, "entity": 128, "group": 128, "job_type": 64}
"""Most characters that W&B's client or server accepts in a name."""
_NOT_IN_URLS = "/\\#?%:"
"""Characters that W&B's client refuses in the name of a project (`Settings.validate_project`)."""


@dataclass
class WandbConfig:
    """Settings of Weights & Biases."""

    mode: str = free("auto")
    """auto (online if an API key is configured, else offline), online, offline or disabled."""
    project: str = free("zeta")
    """Project that the run belongs to."""
    entity: str | None = free(None)
    """User or team that owns the run; null: the default of the account."""
    group: str | None = free(None)
    """Name under which W&B shows related runs together."""
    job_type: str | None = free(None)
    """Role of the run in its group, such as pretrain or finetune."""
    tags: list[str] = free(factory=list)
    """Words to filter runs by."""
    finish_s: float = free(30.0)
    """Longest that the end of training waits for the upload of the last metrics; `zeta wandb-sync`
    sends the rest."""

    def __post_init__(self) -> None:
        check_choice("tracker.wandb.mode", self.mode, ("auto", "online", "offline", "disabled"))
        check_range("tracker.wandb.finish_s", self.finish_s, 1, 3600)
        for name in ("project", "entity", "group", "job_type"):
            text = getattr(self, name)
            if text is not None and not text.strip():
                raise ValueError(f"tracker.wandb.{name} is empty; give a name, or leave it out")
        for tag in self.tags:
            if not 1 <= len(tag) <= _LONGEST_TAG:
                raise ValueError(
                    f"tracker.wandb.tags holds {tag!r}; use tags of 1 to {_LONGEST_TAG} characters"
                )


def check_filing(config: WandbConfig) -> None:
    """Check the names that a run is filed under by W&B's own rules, before the run starts.

    W&B would refuse them at each start and each upload, so that it never had anything of the run.

    Raises:
        ValueError: a name with characters that W&B does not take, or a too long one.
    """
    if config.mode == "disabled":
        return
    for name, most in _LONGEST_NAMES.items():
        text = getattr(config, name)
        if text is None:
            continue
        if len(text) > most:
            raise ValueError(
                f"tracker.wandb.{name} has {len(text)} characters; W&B takes {most} at most: "
                "choose a shorter one"
            )
        wrong = [character for character in _NOT_IN_URLS if character in text]
        if name in ("project", "entity") and wrong:
            entity, slash, project = config.project.partition("/")
            both = name == "project" and wrong == ["/"] and "/" not in project and entity and slash
            fix = f"set tracker.wandb.entity={entity} tracker.wandb.project={project}"
            raise ValueError(
                f"tracker.wandb.{name} is {text!r}, which W&B refuses for its {' '.join(wrong)}: "
                f"{fix if both and project else 'choose a name of letters, digits, - and _'}"
            )


@dataclass
class TrackerConfig:
    """Settings of the trackers that metrics are sent to besides metrics.jsonl."""

    wandb: WandbConfig = field(default_factory=WandbConfig)
    kind: Any = free(factory=lambda: ["wandb"])
    """Trackers, one or a list: wandb, tensorboard (the folder tensorboard/ of the run) and csv
    (metrics.csv). metrics.jsonl is written in any case."""

    def __post_init__(self) -> None:
        given = [self.kind] if isinstance(self.kind, str) else self.kind or []
        if not isinstance(given, list | tuple):
            raise ValueError(
                f"tracker.kind is {given!r}; give one of {', '.join(KINDS)}, or a list of them, as "
                "in [wandb, csv]"
            )
        self.kind = list(dict.fromkeys(given))
        for kind in self.kind:
            check_choice("tracker.kind", kind, KINDS)
        if "wandb" not in self.kind:
            self.wandb = replace(self.wandb, mode="disabled")
