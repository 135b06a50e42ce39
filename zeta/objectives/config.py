"""Config of the objective (`objective.*`)."""

from __future__ import annotations

from dataclasses import dataclass, field

from zeta.config_field import check_range


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
        for name in ("slices", "dim", "hidden"):
            check_range(f"objective.lejepa.{name}", getattr(self, name), 1)


@dataclass
class ObjectiveConfig:
    """The training objective."""

    kind: str = "softmax"
    """softmax: one class an image; sigmoid: an independent yes or no for each class; siglip, clip:
    images and captions, each compared with all others of the optimizer step; lejepa: several views
    of each image, without labels; or your own objective, as package.module:Class (see
    `zeta.objectives.base`)."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes (softmax, sigmoid)."""
    embed_dim: int = 768
    """Channels of the space in which images and texts are compared (siglip, clip)."""
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    """The text encoder (siglip, clip)."""
    lejepa: LejepaConfig = field(default_factory=LejepaConfig)
    """Settings of lejepa."""

    def __post_init__(self) -> None:
        check_range("objective.embed_dim", self.embed_dim, 1)
        check_range("objective.label_smoothing", self.label_smoothing, 0, 1, open_high=True)
