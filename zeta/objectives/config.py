"""Config of the objective (`objective.*`)."""

from __future__ import annotations

from dataclasses import dataclass

from zeta.config_field import check_choice, check_range


@dataclass
class ObjectiveConfig:
    """What the model learns to predict."""

    kind: str = "softmax"
    """softmax: one class an image; sigmoid: an independent yes or no for each class."""
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_choice("objective.kind", self.kind, ("softmax", "sigmoid"))
        check_range("objective.label_smoothing", self.label_smoothing, 0, 1, open_high=True)
