"""Config of where metrics go besides metrics.jsonl (`tracker.*`)."""

from __future__ import annotations

from dataclasses import dataclass, field

from zeta.config_field import check_choice, check_range, free

_LONGEST_TAG = 64
"""Characters that W&B takes."""


@dataclass
class WandbConfig:
    """Weights & Biases."""

    mode: str = free("auto")
    """auto: online when an API key is configured, else offline; online, offline, disabled."""
    project: str = free("zeta")
    entity: str | None = free(None)
    """User or team that the run belongs to; null: the default of the account."""
    group: str | None = free(None)
    """Runs of one group are shown together."""
    job_type: str | None = free(None)
    """What the run is among those of its group, such as pretrain or finetune."""
    tags: list[str] = free(factory=list)
    finish_s: float = free(30.0)
    """Longest that training waits, at its end, for what W&B has not uploaded yet; `zeta wandb-sync`
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
                    f"tracker.wandb.tags holds {tag!r}; a tag has 1 to {_LONGEST_TAG} characters"
                )


@dataclass
class TrackerConfig:
    """Where metrics go besides metrics.jsonl."""

    wandb: WandbConfig = field(default_factory=WandbConfig)
