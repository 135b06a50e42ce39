"""The config of augmentation (`data.augment`, `data.mix`), a part of that of the data pipeline."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from zeta.config_field import check_range, check_whole

_LOWEST_ALPHA, _HIGHEST_ALPHA = 0.01, 1000.0


@dataclass
class ColourConfig:
    """Changes of colour of a training image; see `data_pipeline.loading.colour`.

    Each is made with a probability of its own; 0 leaves it out.
    """

    place: ClassVar[str] = "data.augment.colour"
    jitter: float = 0.0
    """Probability that brightness, contrast, saturation and hue change."""
    brightness: float = 0.4
    """Largest change of brightness: the factor is drawn from 1 - this to 1 + this."""
    contrast: float = 0.4
    """Largest change of contrast."""
    saturation: float = 0.2
    """Largest change of saturation."""
    hue: float = 0.1
    """Largest turn of the hue, as a share of the whole circle."""
    grey: float = 0.0
    """Probability of grey instead of colours."""
    blur: float = 0.0
    """Probability of a Gaussian blur, of 0.1 to 2 pixels at a size of 224 x 224."""
    solarise: float = 0.0
    """Probability that all values from 128 on are inverted."""

    def __post_init__(self) -> None:
        for name in ("jitter", "grey", "blur", "solarise", "brightness", "contrast", "saturation"):
            check_range(f"{self.place}.{name}", getattr(self, name), 0, 1)
        check_range(f"{self.place}.hue", self.hue, 0, 0.5)

    @property
    def changes_any(self) -> bool:
        """Whether any image may change."""
        return max(self.jitter, self.grey, self.blur, self.solarise) > 0


@dataclass
class RandAugmentConfig:
    """Changes of colour and shape drawn from fourteen (Cubuk et al. 2020, "RandAugment"); see
    `data_pipeline.loading.rand_augment`."""

    place: ClassVar[str] = "data.augment.rand_augment"
    layers: int = 0
    """Number of changes made to each image, one after the other, each drawn from all (N in the
    paper). 0: none; 2 is usual."""
    magnitude: float = 9.0
    """Strength of each change, from 0 to 30 (M in the paper)."""

    def __post_init__(self) -> None:
        check_whole(f"{self.place}.layers", self.layers, 0)
        check_range(f"{self.place}.magnitude", self.magnitude, 0, 30)


@dataclass
class AugmentConfig:
    """Augmentation of training images besides their size; evaluation uses none."""

    place: ClassVar[str] = "data.augment"
    flip: bool = False
    """Mirror each image left to right with probability 1/2."""
    crop_min_area: float = 1.0
    """Smallest share of the area kept by a random crop ("random resized crop") of the image's own
    aspect ratio: the share is drawn between this and `crop_max_area`, the place at random. 1 crops
    nothing."""
    crop_max_area: float = 1.0
    """Largest share of the area kept by a random crop."""
    colour: ColourConfig = field(default_factory=ColourConfig)
    """Changes of colour."""
    rand_augment: RandAugmentConfig = field(default_factory=RandAugmentConfig)
    """Changes of colour and shape drawn at random."""

    def __post_init__(self) -> None:
        if not 0 < self.crop_min_area <= 1:
            raise ValueError(
                f"{self.place}.crop_min_area is {self.crop_min_area:g}; it must be above 0 and "
                "at most 1"
            )
        if not self.crop_min_area <= self.crop_max_area <= 1:
            raise ValueError(
                f"{self.place}.crop_max_area is {self.crop_max_area:g}; it must be at least "
                f"{self.place}.crop_min_area = {self.crop_min_area:g} and at most 1"
            )


class LocalColourConfig(ColourConfig):
    """The changes of colour of local views."""

    place: ClassVar[str] = "data.local.augment.colour"


class LocalRandAugmentConfig(RandAugmentConfig):
    """The changes of local views that are drawn from fourteen."""

    place: ClassVar[str] = "data.local.augment.rand_augment"


@dataclass
class LocalAugmentConfig(AugmentConfig):
    """The augmentation of local views."""

    place: ClassVar[str] = "data.local.augment"
    colour: LocalColourConfig = field(default_factory=LocalColourConfig)
    """Changes of colour."""
    rand_augment: LocalRandAugmentConfig = field(default_factory=LocalRandAugmentConfig)
    """Changes of colour and shape drawn at random."""


@dataclass
class MixConfig:
    """Mixing of each training image with the next one of its pack, and of their classes (softmax,
    sigmoid); see `data_pipeline.loading.mix`.

    Evaluation mixes nothing.
    """

    place: ClassVar[str] = "data.mix"
    mixup_alpha: float = 0.0
    """Mixup: blend two images; their shares are drawn from Beta(alpha, alpha). 0: none; 0.2 to 0.8
    are usual."""
    cutmix_alpha: float = 0.0
    """CutMix: paste a box of the other image; the share of its area is drawn from Beta(alpha,
    alpha). 0: none; 1 is usual. The classes have the shares of their pixels in the kept patches."""
    probability: float = 1.0
    """Probability that an image is mixed."""
    switch_probability: float = 0.5
    """Probability of CutMix in the place of mixup where both have an alpha."""

    def __post_init__(self) -> None:
        for name in ("mixup_alpha", "cutmix_alpha"):
            alpha = getattr(self, name)
            check_range(f"{self.place}.{name}", alpha, 0, _HIGHEST_ALPHA)
            if 0 < alpha < _LOWEST_ALPHA:
                raise ValueError(
                    f"{self.place}.{name} is {alpha:g}, by which an image is shown alone or not at "
                    f"all, and never mixed: set at least {_LOWEST_ALPHA:g}, or 0 for no mixing"
                )
        for name in ("probability", "switch_probability"):
            check_range(f"{self.place}.{name}", getattr(self, name), 0, 1)

    @property
    def mixes_any(self) -> bool:
        """Whether any image may be mixed."""
        return max(self.mixup_alpha, self.cutmix_alpha) > 0 and self.probability > 0
