"""The config of the data pipeline (`data.*`)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

from data_pipeline.augmentation import AugmentConfig as AugmentConfig
from data_pipeline.augmentation import ColourConfig as ColourConfig
from data_pipeline.augmentation import LocalAugmentConfig as LocalAugmentConfig
from data_pipeline.augmentation import LocalColourConfig as LocalColourConfig
from data_pipeline.augmentation import MixConfig as MixConfig
from data_pipeline.augmentation import RandAugmentConfig as RandAugmentConfig
from zeta.config_field import AUTO, check_auto_or_whole, check_choice, check_range, free


@dataclass
class ResolutionConfig:
    """The size that each image is resized to, in pixels; see `data_pipeline.plan.sampling`.

    A side s means the area s * s; the aspect ratio of the image is kept.
    """

    place: ClassVar[str] = "data.resolution"
    kind: str = "native"
    """fixed (side = max), area (s * s uniform), side (s uniform), side_normal (s from a normal
    truncated towards small sides) or native (the image's own size, its side capped at max)."""
    min: int = 1
    """Smallest side drawn, in pixels."""
    max: int = 256
    """Largest side, in pixels."""
    fit: str = "keep"
    """keep (the aspect ratio), or make a square: crop (the middle) or squash."""
    max_upscale: float = 1.0
    """Largest factor by which an image is enlarged, apart from rounding to whole patches. Kind
    fixed with crop or squash ignores it: models of one size need max x max for every image."""

    def __post_init__(self) -> None:
        kinds = ("fixed", "area", "side", "side_normal", "native")
        check_choice(f"{self.place}.kind", self.kind, kinds)
        check_choice(f"{self.place}.fit", self.fit, ("keep", "crop", "squash"))
        check_range(f"{self.place}.min", self.min, 1)
        check_range(f"{self.place}.max", self.max, 1)
        if self.max < self.min:
            raise ValueError(
                f"{self.place}.max is {self.max}, below {self.place}.min, which is "
                f"{self.min}: set both"
            )
        check_range(f"{self.place}.max_upscale", self.max_upscale, 1)


@dataclass
class DropScheduleConfig:
    """The schedule of the drop rate over the run (NaViT, section 3.3; see `plan.sampling`).

    At the n-th image of the run the mean rate is `low` + (`high` - `low`) sigmoid((n - `middle`) /
    `width`).
    """

    place: ClassVar[str] = "data.drop.schedule"
    kind: str = "none"
    """none (the rate is constant) or sigmoid."""
    low: float = 0.2
    """Lowest mean rate, in [0, 1)."""
    high: float = 0.8
    """Highest mean rate, in [0, 1)."""
    middle: float = 0
    """Number of images seen when the rate is half-way."""
    width: float = -1e6
    """Number of images over which the rate changes. Below 0 the rate falls, which trained best in
    the paper."""

    def __post_init__(self) -> None:
        check_choice(f"{self.place}.kind", self.kind, ("none", "sigmoid"))
        check_range(f"{self.place}.low", self.low, 0, 1, open_high=True)
        check_range(f"{self.place}.high", self.high, self.low, 1, open_high=True)
        if self.width == 0:
            raise ValueError(f"{self.place}.width is 0; give a number of images, not 0")


@dataclass
class DropConfig:
    """The share of patches dropped before packing; see `data_pipeline.plan.sampling`."""

    place: ClassVar[str] = "data.drop"
    kind: str = "none"
    """none, constant (rate), beta (mean rate, at most max) or resolution (rate from min at few
    tokens to max at many)."""
    rate: float = 0.5
    """Rate of kind constant, and mean rate of kind beta."""
    min: float = 0.1
    """Lowest mean rate of kind resolution."""
    max: float = 0.9
    """Highest mean rate of kind resolution, and highest rate of kind beta."""
    keep: bool = False
    """Let the dropped patches leave the worker too, beside the pack, for objectives that look at
    whole images (distill). They are no tokens and count in no budget; each takes the bytes of its
    pixels (3 p * p) in the host memory of the packs that wait and on the device."""
    schedule: DropScheduleConfig = field(default_factory=DropScheduleConfig)
    """Schedule that moves `rate` over the run; for kind resolution it moves the middle of min and
    max, at a constant distance."""

    def __post_init__(self) -> None:
        check_choice(f"{self.place}.kind", self.kind, ("none", "constant", "beta", "resolution"))
        for name in ("rate", "min", "max"):
            check_range(f"{self.place}.{name}", getattr(self, name), 0, 1, open_high=True)
        if self.kind == "beta" and not 0 < self.rate < self.max:
            raise ValueError(
                f"{self.place}.rate is {self.rate:g}; for kind beta it is the mean rate and must "
                f"lie between 0 and {self.place}.max = {self.max:g}"
            )
        if self.min > self.max:
            raise ValueError(
                f"{self.place}.min is {self.min:g}, above {self.place}.max = {self.max:g}"
            )
        schedule = self.schedule
        if schedule.kind != "none" and self.kind == "none":
            raise ValueError(
                f"{schedule.place}.kind is {schedule.kind!r}, but {self.place}.kind is none: there "
                f"is no rate to schedule; set {self.place}.kind"
            )
        if schedule.kind != "none" and self.kind == "beta" and schedule.high >= self.max:
            raise ValueError(
                f"{schedule.place}.high is {schedule.high:g}; for kind beta it is a mean rate "
                f"and must be below {self.place}.max = {self.max:g}"
            )


class LocalResolutionConfig(ResolutionConfig):
    """The sizes of local views."""

    place: ClassVar[str] = "data.local.resolution"


class LocalDropScheduleConfig(DropScheduleConfig):
    """The schedule of the drop rate of local views."""

    place: ClassVar[str] = "data.local.drop.schedule"


@dataclass
class LocalDropConfig(DropConfig):
    """The dropped patches of local views."""

    place: ClassVar[str] = "data.local.drop"
    schedule: LocalDropScheduleConfig = field(default_factory=LocalDropScheduleConfig)
    """Schedule that moves `rate` over the run."""


@dataclass
class LocalViewsConfig:
    """Local views of each image besides its `data.views` global ones, for objectives that compare
    views: each has its own size, crop and dropped patches by rules of their own."""

    views: int = 0
    """Number of local views of each image."""
    resolution: LocalResolutionConfig = field(default_factory=LocalResolutionConfig)
    """Sizes of local views. Their fit is that of data.resolution."""
    drop: LocalDropConfig = field(default_factory=LocalDropConfig)
    """Dropping of patches of local views."""
    augment: LocalAugmentConfig = field(default_factory=LocalAugmentConfig)
    """Crops, mirroring and colours of local views."""

    def __post_init__(self) -> None:
        check_range("data.local.views", self.views, 0)


@dataclass
class DecodeConfig:
    """The decoding of images."""

    scaled: bool = True
    """Decode large JPEGs at 1/2, 1/4 or 1/8 of their size if the target allows (training only)."""


@dataclass
class TextConfig:
    """The tokens of captions; see `data_pipeline.loading.targets`."""

    tokenizer: str = "bytes"
    """bytes (the 256 bytes of UTF-8), or the path of a tokenizer.json of the tokenizers library."""
    max_tokens: int = 64
    """Most tokens of a caption."""
    truncate: bool = False
    """Cut longer captions to max_tokens, counted as train/truncated; if false, their pairs are
    rejected with the reason."""
    budget: int | None = None
    """Tokens of all captions of a pack; unset, it is max_images_per_pack * max_tokens, which always
    suffices. A pair whose caption has no room is rejected with the reason."""

    def __post_init__(self) -> None:
        if not self.tokenizer.strip():
            raise ValueError("data.text.tokenizer is empty; give bytes, or a tokenizer.json")
        check_range("data.text.max_tokens", self.max_tokens, 1)
        if self.budget is not None:
            check_range("data.text.budget", self.budget, self.max_tokens)


@dataclass
class DataConfig:
    """The shards to read, and the rules by which they become packs."""

    shards: Any = None
    """Training shards: a folder, tar file, glob, brace expansion, or a list of these. A list of
    {path, weight} mixes sources at their own rates, each with its own epochs. A run may be
    resumed with the same shards at another place."""
    val_shards: Any = free(None)
    """Held-out shards to evaluate on while training (`train.evaluate`), given like `shards` but
    without weights. Every image is scored once."""
    probe_shards: Any = free(None)
    """Labelled shards that `train.evaluate.knn` and `train.evaluate.probe` learn from, given like
    `val_shards`; they need not be trained on. Null: `shards`, if these have labels."""
    probe_val_shards: Any = free(None)
    """Labelled shards that they classify; all their classes occur in the part that is learned
    from. Null: `val_shards`."""
    token_budget: int = 4096
    """Number of tokens of a pack (C)."""
    max_images_per_pack: int = 128
    """Most images in a pack; it sets the shapes of labels and pooled features."""
    resolution: ResolutionConfig = field(default_factory=ResolutionConfig)
    """Sizes of images."""
    drop: DropConfig = field(default_factory=DropConfig)
    """Dropping of patches."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Crops, mirroring and other changes."""
    mix: MixConfig = field(default_factory=MixConfig)
    """Mixing of images with others."""
    views: int = 1
    """Number of views of each image, all in one pack: it is read and decoded once, and each view
    has its own size, crop, flip and dropped patches. Evaluation uses one."""
    local: LocalViewsConfig = field(default_factory=LocalViewsConfig)
    """Further views of each image, usually smaller, in the same pack."""
    mix_by: str = "images"
    """Unit of the weights of sources: images or tokens."""
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    """Decoding of images."""
    seed: int = 0
    """Seed of order, sizes and dropped patches."""
    window_shards: int = 1
    """Number of shards whose samples a lane shuffles together (K)."""
    pack_window: int = 2048
    """Number of samples that a lane packs together; at most 4096, so that its saved state stays
    small."""
    workers: Any = free(AUTO)
    """Number of decoding processes of a rank; 0 decodes in the training process. auto takes the
    cores of the rank but one where it trains on a GPU, and an eighth of them on a CPU."""
    cache_dir: str | None = free(None)
    """Folder on a local disk where each rank keeps the remote shards that it reads next; unset, it
    is zeta-cache in the folder for temporary files ($TMPDIR)."""
    cache_gb: float = free(100.0)
    """Most gigabytes (1e9 bytes) that one rank keeps there."""
    read_deadline_s: float = free(120.0)
    """Seconds for which a failing or hanging read of a shard is retried before the run fails."""
    require_labels: bool = False
    """Leave samples without a class out of the plan; set by `zeta train` from the objective."""
    max_labels: int | None = free(None)
    """Most labels of an image, if images have lists of labels; set by `zeta train`."""
    text: TextConfig = field(default_factory=TextConfig)
    """Tokens of captions (siglip, clip)."""
    require_captions: bool = False
    """Leave samples without a caption out of the plan; set by `zeta train` from the objective."""
    prefix_tokens: int = 0
    """Number of tokens that the model puts before the patches of each image; set by `zeta train`
    from the model."""
    patch_size: int | None = None
    """Side of a patch in pixels; set by `zeta train` from the model."""
    cost_dim: int | None = None
    """Width d of the model in the cost l (1 + l / 6d) of an image; set by `zeta train`."""

    def __post_init__(self) -> None:
        check_range("data.token_budget", self.token_budget, 1)
        check_range("data.max_images_per_pack", self.max_images_per_pack, 1)
        check_range("data.views", self.views, 1)
        if self.views_of_sample > self.max_images_per_pack:
            local = f" and data.local.views {self.local.views}" if self.local.views else ""
            raise ValueError(
                f"data.views is {self.views}{local}, above data.max_images_per_pack, which is "
                f"{self.max_images_per_pack}: all views of an image lie in one pack, each an image "
                f"of it; set data.max_images_per_pack to at least {self.views_of_sample}"
            )
        if self.local.views and self.local.resolution.fit != self.resolution.fit:
            raise ValueError(
                f"data.local.resolution.fit is {self.local.resolution.fit} and data.resolution.fit "
                f"{self.resolution.fit}: all views of an image have one; set both"
            )
        check_range("data.window_shards", self.window_shards, 1)
        check_range("data.pack_window", self.pack_window, 1, 4096)
        check_choice("data.mix_by", self.mix_by, ("images", "tokens"))
        check_auto_or_whole("data.workers", self.workers, 0)
        check_range("data.cache_gb", self.cache_gb, 0)
        check_range("data.read_deadline_s", self.read_deadline_s, 0)
        check_range("data.prefix_tokens", self.prefix_tokens, 0)

    @property
    def views_of_sample(self) -> int:
        """Number of views of each image, global and local ones."""
        return self.views + self.local.views


class DataWarning(UserWarning):
    """A fault in the data that no rule can mend; the command line shows it as one line."""


def warn(text: str) -> None:
    """Warn about data that can be used, but perhaps not as it is meant."""
    warnings.warn(text, DataWarning, stacklevel=3)
