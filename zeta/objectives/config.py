"""Config of the objective (`objective.*`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from zeta.config_field import check_choice, check_range, free


@dataclass
class TextTowerConfig:
    """Sizes of the small transformer over packed captions; see `zeta.models.text_tower`."""

    dim: int = 512
    """Channels of a token."""
    depth: int = 8
    """Number of transformer blocks."""
    heads: int = 8
    """Attention heads of a block."""
    mlp_dim: int = 2048
    """Hidden channels of a block's MLP."""
    dropout: float = 0.0
    """Dropout rate after the attention projection and in the MLPs."""
    vocab_size: int | None = None
    """Number of different tokens; set by `zeta train` from `data.text.tokenizer`."""
    max_tokens: int | None = None
    """Tokens of the longest caption; set by `zeta train` from `data.text.max_tokens`."""

    def __post_init__(self) -> None:
        for name in ("dim", "depth", "heads", "mlp_dim", "vocab_size", "max_tokens"):
            value = getattr(self, name)
            if value is not None:
                check_range(f"objective.text.{name}", value, 1)
        check_range("objective.text.dropout", self.dropout, 0, 1, open_high=True)
        if self.dim % self.heads:
            raise ValueError(
                f"objective.text.dim is {self.dim}, not a multiple of objective.text.heads = "
                f"{self.heads}"
            )


@dataclass
class LejepaConfig:
    """Self-supervised pretraining by views of images; see `zeta.objectives.lejepa`."""

    trade_off: float = 0.05
    """Share of the loss that keeps embeddings spread like a standard normal; the rest makes the
    views of an image agree."""
    slices: int = 256
    """Number of random directions in which the spread is tested, drawn anew for each step."""
    dim: int = 64
    """Channels in which views are compared."""
    hidden: int = 2048
    """Channels of the hidden layers of the projector, which is left out of the export."""

    def __post_init__(self) -> None:
        check_range("objective.lejepa.trade_off", self.trade_off, 0, 1)
        if self.trade_off in (0, 1):
            why = (
                "nothing would keep embeddings apart, and all images would become one"
                if self.trade_off == 0
                else "nothing would make the views of an image agree"
            )
            raise ValueError(
                f"objective.lejepa.trade_off is {self.trade_off:g}, so {why}: set it above 0 and "
                f"below 1, as {type(self).trade_off:g}"
            )
        for name in ("slices", "dim", "hidden"):
            check_range(f"objective.lejepa.{name}", getattr(self, name), 1)


@dataclass
class DistillConfig:
    """Learning from a frozen teacher; see `zeta.objectives.distill`."""

    teacher: Any = free(None)
    """Folder of the teacher: one that `zeta export` or `zeta import` wrote, or of an encoder of
    transformers or timm (docs/export.md). Kinds that do not distill have none. It may have any
    size and patch, and may move: a resume asks that its weights are those that the run began
    with."""
    dim: int | None = None
    """Channels of the teacher; set by `zeta train` from its folder."""
    loss: str = "cosine"
    """cosine (1 less the cosine) or smooth_l1 (of the teacher's values, normalised over channels),
    of a linear map of the student's values."""
    pooled: float = 1.0
    """Weight of the pooled embeddings."""
    tokens: float = 1.0
    """Weight of the features of the kept patches; their mean counts once an image."""
    weight: float = 1.0
    """Factor on both where another objective is learned too, as in softmax+distill."""

    def __post_init__(self) -> None:
        check_choice("objective.distill.loss", self.loss, ("cosine", "smooth_l1"))
        for name in ("pooled", "tokens", "weight"):
            value = getattr(self, name)
            check_range(f"objective.distill.{name}", value, 0, open_high=True)
        if self.dim is not None:
            check_range("objective.distill.dim", self.dim, 1)
        if not (self.teacher is None or isinstance(self.teacher, str)):
            raise ValueError(f"objective.distill.teacher is {self.teacher!r}; give a folder")


@dataclass
class ObjectiveConfig:
    """The training objective."""

    kind: str = "softmax"
    """softmax: one class an image; sigmoid: an independent yes or no for each class; siglip, clip:
    images and captions, each compared with all others of the optimizer step; lejepa: several views
    of each image, without labels; distill: what a frozen teacher says of whole images, alone or
    added to one of the others, as in softmax+distill; or your own objective, as
    package.module:Class (see `zeta.objectives.base`)."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes (softmax, sigmoid)."""
    embed_dim: int = 768
    """Channels of the space in which images and texts are compared (siglip, clip)."""
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    """The text encoder (siglip, clip)."""
    lejepa: LejepaConfig = field(default_factory=LejepaConfig)
    """Settings of lejepa."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """Settings of distill."""

    def __post_init__(self) -> None:
        check_range("objective.embed_dim", self.embed_dim, 1)
        check_range("objective.label_smoothing", self.label_smoothing, 0, 1, open_high=True)
