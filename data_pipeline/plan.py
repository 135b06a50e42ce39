"""The plan: which images, at which size and keep count, form each pack of each lane.

Token lengths are known from the manifest before any byte of an image is read, so order, sizes,
dropping and packing are a pure function of (manifest, config, seed). Ranks and workers only
execute it: nothing here depends on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.config import DataConfig
from data_pipeline.lanes import Cursor, LaneDeal, LaneStream
from data_pipeline.manifest import Manifest, SampleFlag
from data_pipeline.packing import PackLimits, image_costs, pack_window
from data_pipeline.random_draws import Draw, sample_uniforms
from data_pipeline.sampling import keep_counts, token_grids

Ints = NDArray[np.int64]

_MASS_CHUNK = 1 << 20


@dataclass(frozen=True)
class PackPlan:
    """The images of one pack; arrays of [n] in pack order."""

    sample_ids: Ints
    epochs: Ints
    rows: Ints
    columns: Ints
    """Grid of patches that the image is resized to, before dropping."""
    keep: Ints
    """Patches kept of rows * columns."""
    lengths: Ints
    """Tokens of the budget used: kept patches and prefix tokens."""


@dataclass(frozen=True)
class LaneState:
    """Where a lane stands: the start of its pack window, and the packs taken from that window."""

    cursor: Cursor = field(default_factory=Cursor)
    carry_ids: tuple[int, ...] = ()
    carry_epochs: tuple[int, ...] = ()
    packs_taken: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the state as plain lists and ints."""
        return {
            "cursor": list(self.cursor),
            "carry_ids": list(self.carry_ids),
            "carry_epochs": list(self.carry_epochs),
            "packs_taken": self.packs_taken,
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> LaneState:
        """Read what `to_json` wrote."""
        return cls(
            Cursor(*state["cursor"]),
            tuple(state["carry_ids"]),
            tuple(state["carry_epochs"]),
            int(state["packs_taken"]),
        )


@dataclass
class Plan:
    """The deal of samples to lanes and the rules by which images get their size.

    Args:
        manifest: the indexed shards.
        config: `data.*`, with patch_size and cost_dim set from the model.
        num_lanes: P, packs a step.
        max_epochs: end every lane's stream after so many epochs (None: endless).

    Raises:
        ValueError: fewer samples than lanes, or a budget that cannot hold a single patch.
    """

    manifest: Manifest
    config: DataConfig
    num_lanes: int
    max_epochs: int | None = None
    limits: PackLimits = field(init=False)

    def __post_init__(self) -> None:
        config = self.config
        if config.patch_size is None or config.cost_dim is None:
            raise ValueError("data.patch_size and data.cost_dim must be set (from the model)")
        self.patch_size, self.cost_dim = config.patch_size, config.cost_dim
        self.limits = PackLimits(config.token_budget, config.max_images_per_pack)
        self.max_tokens = config.token_budget - config.prefix_tokens
        if self.max_tokens < 1:
            raise ValueError(
                f"data.token_budget is {config.token_budget}; with {config.prefix_tokens} prefix "
                f"tokens an image it must be at least {config.prefix_tokens + 1}"
            )
        shards = self.manifest.shards
        masses, usable = self._shard_masses()
        if usable < self.num_lanes:
            raise ValueError(
                f"train.packs_per_step is {self.num_lanes} but the shards hold only {usable} "
                f"usable images: every pack of a step reads images of its own, so set "
                f"train.packs_per_step to at most {usable}"
            )
        self.deal = LaneDeal(
            firsts=np.array([shard.first for shard in shards], dtype=np.int64),
            counts=np.array([shard.count for shard in shards], dtype=np.int64),
            masses=masses,
            num_lanes=self.num_lanes,
            window_shards=config.window_shards,
            seed=config.seed,
        )

    def lane(self, lane: int, state: LaneState | None = None) -> LanePacker:
        """Return the packs of one lane, from `state` on."""
        return LanePacker(self, LaneStream(self.deal, lane, self.max_epochs), state or LaneState())

    def size_images(self, sample_ids: Ints, epochs: Ints) -> PackPlan:
        """Draw grid and keep count of each sample in its epoch; [n] each."""
        samples = self.manifest.samples[sample_ids]
        seed = self.config.seed
        rows, columns, _ = self._grids(
            samples, sample_uniforms(Draw.RESOLUTION, seed, epochs, sample_ids)
        )
        keep = keep_counts(
            self.config.drop,
            self.config.resolution,
            rows * columns,
            sample_uniforms(Draw.DROP_RATE, seed, epochs, sample_ids),
            patch_size=self.patch_size,
        )
        lengths = keep + self.config.prefix_tokens
        return PackPlan(sample_ids, epochs, rows, columns, keep, lengths)

    def _grids(
        self, samples: NDArray[np.void], u: NDArray[np.float64]
    ) -> tuple[Ints, Ints, NDArray[np.bool_]]:
        return token_grids(
            self.config.resolution,
            samples["height"].astype(np.int64),
            samples["width"].astype(np.int64),
            u,
            patch_size=self.patch_size,
            max_tokens=self.max_tokens,
        )

    def _shard_masses(self) -> tuple[NDArray[np.float64], int]:
        """Return the tokens of each shard at the median draw, and the number of usable images.

        Reads the manifest in chunks, so that memory does not grow with it.
        """
        masses, count = np.zeros(len(self.manifest.shards)), 0
        for start in range(0, len(self.manifest.samples), _MASS_CHUNK):
            ids = np.arange(start, min(start + _MASS_CHUNK, len(self.manifest.samples)))
            samples = self.manifest.samples[ids]
            usable = (samples["flags"] & SampleFlag.BAD) == 0
            samples, ids = samples[usable], ids[usable]
            rows, columns, _ = self._grids(samples, np.full(len(ids), 0.5))
            count += len(ids)
            masses += np.bincount(
                self.manifest.shard_of(ids), weights=rows * columns, minlength=len(masses)
            )
        return masses, count


class LanePacker:
    """Iterates over the packs of one lane; `state` may be saved after any pack."""

    def __init__(self, plan: Plan, stream: LaneStream, state: LaneState) -> None:
        self._plan = plan
        self._stream = stream
        self._start = state
        """State at the start of the current window."""
        self._packs: list[PackPlan] = []
        self._taken = 0
        self._after = state
        """State at the start of the next window."""
        self.epoch = state.cursor.epoch
        if state.packs_taken:
            self._next_window()
            self._taken = state.packs_taken

    def __iter__(self) -> Iterator[PackPlan]:
        while (pack := self.next_pack()) is not None:
            yield pack

    @property
    def state(self) -> LaneState:
        """State after the packs returned so far; a lane restored from it returns the next one."""
        start = self._start
        return LaneState(start.cursor, start.carry_ids, start.carry_epochs, self._taken)

    def next_pack(self) -> PackPlan | None:
        """Return the next pack of this lane, or None once its stream has ended."""
        if not self._fill():
            return None
        pack = self._packs[self._taken]
        self._taken += 1
        self.epoch = int(pack.epochs.min())
        if self._taken == len(self._packs):  # a finished window is named by where the next starts
            self._start, self._packs, self._taken = self._after, [], 0
        return pack

    def has_more(self) -> bool:
        """Return whether `next_pack` would return a pack."""
        return self._fill()

    def _fill(self) -> bool:
        """Make sure that a pack is waiting; return False once the stream has ended."""
        while self._taken == len(self._packs):
            if self._stream.ended(self._start.cursor) and not self._start.carry_ids:
                return False
            self._next_window()
            if not self._packs:  # too few samples for one full pack: deal on
                self._start = self._after
        return True

    def _next_window(self) -> None:
        """Deal and pack the window that `_start` stands before; set `_packs` and `_after`."""
        start = self._start
        dealt, cursor = np.empty(0, dtype=np.int64), start.cursor
        if not self._stream.ended(cursor):
            dealt, cursor = self._stream.take(cursor, self._plan.config.pack_window)
            flags = self._plan.manifest.samples["flags"][dealt]
            dealt = dealt[(flags & SampleFlag.BAD) == 0]
        ids = np.concatenate([np.array(start.carry_ids, dtype=np.int64), dealt])
        carried = np.array(start.carry_epochs, dtype=np.int64)
        epochs = np.concatenate([carried, np.full(len(dealt), start.cursor.epoch)])
        images = self._plan.size_images(ids, epochs)
        packs, leftovers = pack_window(
            images.lengths,
            image_costs(images.lengths, self._plan.cost_dim),
            self._plan.limits,
            num_first=len(carried),
            flush=self._stream.ended(cursor),
        )
        self._packs = [_select(images, pack) for pack in packs]
        self._taken = 0
        self._after = LaneState(
            cursor, tuple(ids[leftovers].tolist()), tuple(epochs[leftovers].tolist())
        )


def _select(images: PackPlan, indices: Sequence[int]) -> PackPlan:
    index = np.array(indices)
    return PackPlan(*(getattr(images, name)[index] for name in PackPlan.__dataclass_fields__))
