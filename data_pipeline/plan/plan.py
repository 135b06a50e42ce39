"""The plan: the images of each pack of each lane, with their sizes and keep counts.

Token lengths are known from the manifest before any byte of an image is read, so order, sizes,
dropping and packing are a pure function of (manifest, config, seed). Ranks and workers only
execute it: nothing here depends on them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import numpy as np
from numpy.typing import NDArray

from data_pipeline.config import DataConfig, LocalViewsConfig, ResolutionConfig
from data_pipeline.plan.arrays import Bools, Floats, Ints
from data_pipeline.plan.lane_packer import LanePacker, WindowRules
from data_pipeline.plan.lane_packer import LaneState as LaneState
from data_pipeline.plan.lane_packer import PackPlan as PackPlan
from data_pipeline.plan.lanes import LaneDeal, LaneStream
from data_pipeline.plan.mixing import Dealt, LaneMix
from data_pipeline.plan.packing import PackLimits
from data_pipeline.plan.random_draws import Draw, sample_uniforms
from data_pipeline.plan.sampling import crop_sides, keep_counts, token_grids
from data_pipeline.shards.manifest import Manifest, WeightedSource
from data_pipeline.shards.masses import Needs, shard_masses, usable_samples
from data_pipeline.shards.sample_rows import release_pages

_ROWS_BETWEEN_RELEASES = 1 << 17


@dataclass
class Plan:
    """The deal of samples to lanes, and the rules by which images get their sizes.

    Args:
        manifest: the indexed shards.
        config: `data.*`, with patch_size and cost_dim set from the model.
        num_lanes: P, the number of packs in a step.
        max_epochs: number of epochs after which the stream of every lane ends (None: never).
        max_patches: most patches of an image; larger ones are made smaller (None: as many as a pack
            holds).
        lanes_may_be_empty: allow fewer samples than lanes, as in a pass over a few held-out images.

    Raises:
        ValueError: there are fewer samples than lanes, the budget cannot hold a single patch, or
            `max_epochs` is given for several sources (each has its own epochs).
    """

    manifest: Manifest
    config: DataConfig
    num_lanes: int
    max_epochs: int | None = None
    max_patches: int | None = None
    lanes_may_be_empty: bool = False
    limits: PackLimits = field(init=False)

    def __post_init__(self) -> None:
        config = self.config
        if config.patch_size is None or config.cost_dim is None:
            raise ValueError("data.patch_size and data.cost_dim must be set (from the model)")
        self.patch_size, self.cost_dim = config.patch_size, config.cost_dim
        self.limits = PackLimits(config.token_budget, config.max_images_per_pack)
        # The views of a sample share a pack, so each may take an equal part of it.
        views = config.views_of_sample
        self.max_tokens = config.token_budget // views - config.prefix_tokens
        if self.max_tokens < 1:
            least = views * (config.prefix_tokens + 1)
            of_each = "an image" if views == 1 else f"a view and {views} views of an image"
            raise ValueError(
                f"data.token_budget is {config.token_budget}; with {config.prefix_tokens} prefix "
                f"tokens {of_each} it must be at least {least}"
            )
        if self.max_patches is not None:
            self.max_tokens = min(self.max_tokens, self.max_patches)
        shards = self.manifest.shards
        self.sources = self.manifest.sources or (
            WeightedSource("data.shards", 0, len(shards), 1.0),
        )
        if self.max_epochs is not None and len(self.sources) > 1:
            raise ValueError(
                "train.max_epochs counts passes over the shards, but each weighted source of "
                "data.shards has its own passes: set train.max_steps instead"
            )
        self._needs = Needs(
            label=config.require_labels and config.max_labels is None,
            label_list=config.require_labels and config.max_labels is not None,
            caption=config.require_captions,
        )
        rules: dict[str, object] = {"max_tokens": self.max_tokens, "patch": self.patch_size}
        rules |= asdict(config.resolution)
        if config.local.views:
            rules |= {"global": config.views, "local": asdict(config.local)}
        self.masses = shard_masses(
            self.manifest,
            self._median_patches,
            needs=self._needs,
            rules=rules,
        )
        self._deals = [self._deal(index, source) for index, source in enumerate(self.sources)]
        self.rules = WindowRules(self._size, self.limits, self.cost_dim, config.pack_window, views)
        self._rows_read = 0

    @property
    def num_images(self) -> int:
        """Number of usable images, views not counted; each is dealt once in every epoch of its
        source."""
        return int(self.masses.usable.sum())

    def lane(self, lane: int, state: LaneState | None = None) -> LanePacker:
        """Return the packs of one lane, from `state` on (None: from the beginning)."""
        return LanePacker(self.lane_mix(lane), self.rules, state)

    def lane_mix(self, lane: int) -> LaneMix:
        """Return the stream of samples of one lane, in the order in which they are dealt."""
        # Rows of samples need not be read to find those that are left out if none is.
        usable = None if self.num_images == len(self.manifest.samples) else self._usable
        return LaneMix(
            [LaneStream(deal, lane, usable, self.max_epochs) for deal in self._deals],
            [source.weight for source in self.sources],
            self.num_lanes,
            self._count_tokens if self.config.mix_by == "tokens" else None,
            self._one_pass(),
        )

    def _one_pass(self) -> int:
        """Return the number of images dealt to a lane in one pass of the fastest source."""
        rates = sum(source.weight for source in self.sources)
        passes = (
            self.masses.usable[source.first_shard : source.stop_shard].sum() * rates / source.weight
            for source in self.sources
        )
        return max(1, int(min(passes) / self.num_lanes))

    def source_of(self, sample_ids: Ints) -> Ints:
        """Return the index in `sources` of each sample, [n]."""
        stops = np.array([source.stop_shard for source in self.sources])
        return np.searchsorted(stops, self.manifest.shard_of(sample_ids), side="right")

    def size_images(self, sample_ids: Ints, epochs: Ints, seen: Ints | None = None) -> PackPlan:
        """Draw the grid and keep count of every view of each sample in its epoch.

        Args:
            sample_ids: [n] samples.
            epochs: [n] epoch of each.
            seen: [n] number of images dealt before each one, views included, for schedules (None:
                0).

        Returns:
            [n * views] images: those of a sample follow one another.
        """
        self._release(len(sample_ids))
        config = self.config
        seen = np.zeros_like(sample_ids) if seen is None else seen
        k = config.views_of_sample
        views = np.tile(np.arange(k), len(sample_ids))
        sample_ids, epochs, seen = (np.repeat(column, k) for column in (sample_ids, epochs, seen))
        if not config.local.views:
            return self._size_views(config, sample_ids, epochs, seen, views)
        kinds = (config, views < config.views), (config.local, views >= config.views)
        parts, places = list[PackPlan](), list[Ints]()
        for rules, chosen in kinds:
            columns = (sample_ids[chosen], epochs[chosen], seen[chosen], views[chosen])
            parts.append(self._size_views(rules, *columns))
            places.append(np.flatnonzero(chosen))
        return PackPlan.concatenate(parts).select(np.argsort(np.concatenate(places)))

    def _size_views(
        self,
        rules: DataConfig | LocalViewsConfig,
        sample_ids: Ints,
        epochs: Ints,
        seen: Ints,
        views: Ints,
    ) -> PackPlan:
        """Draw the grid and keep count of views that follow the same rules; all arrays are [n]."""
        samples = self.manifest.samples[sample_ids]

        def draw(purpose: Draw) -> Floats:
            return sample_uniforms(purpose, self.config.seed, epochs, sample_ids, views)

        crops = np.ones(len(sample_ids))
        if rules.augment.crop_min_area < 1:
            crops = crop_sides(rules.augment, draw(Draw.CROP_AREA))
        rows, columns, shrunk = token_grids(
            rules.resolution,
            samples["height"] * crops,
            samples["width"] * crops,
            draw(Draw.RESOLUTION),
            patch_size=self.patch_size,
            max_tokens=self.max_tokens,
        )
        keep = rows * columns
        if rules.drop.kind != "none":
            keep = keep_counts(
                rules.drop,
                rules.resolution,
                keep,
                draw(Draw.DROP_RATE),
                patch_size=self.patch_size,
                seen=seen,
            )
        lengths = keep + self.config.prefix_tokens
        return PackPlan(
            sample_ids, epochs, seen, rows, columns, keep, lengths, crops, shrunk, views
        )

    def _size(self, dealt: Dealt) -> PackPlan:
        sample_ids, epochs, samples_before = dealt
        return self.size_images(sample_ids, epochs, self.config.views_of_sample * samples_before)

    def _count_tokens(self, sample_ids: Ints, epochs: Ints, samples_before: Ints) -> Ints:
        images = self._size(Dealt(sample_ids, epochs, samples_before))
        return self.rules.by_sample(images.lengths)

    def _usable(self, sample_ids: Ints) -> Bools:
        return usable_samples(self.manifest.samples[sample_ids], self._needs)

    def _median_patches(self, samples: NDArray[np.void]) -> tuple[Ints, Bools]:
        config = self.config
        patches, shrunk = self._median_of_kind(config.resolution, samples)
        if config.local.views:
            local, _ = self._median_of_kind(config.local.resolution, samples)
            patches = config.views * patches + config.local.views * local
        return patches, shrunk

    def _median_of_kind(
        self, resolution: ResolutionConfig, samples: NDArray[np.void]
    ) -> tuple[Ints, Bools]:
        rows, columns, shrunk = token_grids(
            resolution,
            samples["height"].astype(np.int64),
            samples["width"].astype(np.int64),
            np.full(len(samples), 0.5),
            patch_size=self.patch_size,
            max_tokens=self.max_tokens,
        )
        return rows * columns, shrunk

    def _deal(self, index: int, source: WeightedSource) -> LaneDeal:
        shards = self.manifest.shards[source.first_shard : source.stop_shard]
        own = slice(source.first_shard, source.stop_shard)
        usable = int(self.masses.usable[own].sum())
        unlabelled = int(self.masses.unlabelled[own].sum())
        if usable == 0 and unlabelled:
            what, fix = "class label", ".cls members, or label in .json"
            if self.config.require_captions:
                what, fix = "caption", ".txt members, or caption in .json"
            raise ValueError(
                f"none of the {unlabelled} images of {source.name} has the {what} that the "
                f"objective needs: write {fix}, and index the shards again"
            )
        if usable < (1 if self.lanes_may_be_empty else self.num_lanes):
            where = "the shards hold" if len(self.sources) == 1 else f"{source.name} holds"
            raise ValueError(
                f"train.packs_per_step is {self.num_lanes} but {where} only {usable} usable "
                "images: every pack of a step reads its own images, so set "
                f"train.packs_per_step to at most {max(usable, 1)}"
            )
        return LaneDeal(
            firsts=np.array([shard.first for shard in shards], dtype=np.int64),
            counts=np.array([shard.count for shard in shards], dtype=np.int64),
            masses=self.masses.tokens[own],
            num_lanes=self.num_lanes,
            group_shards=self.config.window_shards,
            seed=self.config.seed,
            source=index,
        )

    def _release(self, rows: int) -> None:
        """Release the pages of a mapped manifest from time to time, so that memory stays level."""
        self._rows_read += rows
        if self._rows_read >= _ROWS_BETWEEN_RELEASES:
            release_pages(self.manifest.samples)
            self._rows_read = 0
