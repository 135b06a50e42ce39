"""The packed batch, and the protocol by which the trainer draws the packs of a step.

Letters: C token budget of a pack, I images a pack can hold, P packs a step, W ranks,
p patch side in pixels, c channels. Every shape below is constant over a run, so that compiled
code and ZeRO-3 see the same shapes on every rank; whatever an image does not use is padding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


def packs_per_rank(packs_per_step: int, world_size: int) -> int:
    """Return ceil(P / W): the packs that every rank takes in a step, empty ones included."""
    return -(-packs_per_step // world_size)


def lanes_of_rank(rank: int, world_size: int, packs_per_step: int) -> range:
    """Return the lane of each pack of a rank: lane i belongs to rank i mod W.

    There are `packs_per_rank` on every rank. Those from P on do not exist: their packs are empty.
    """
    count = packs_per_rank(packs_per_step, world_size)
    return range(rank, rank + count * world_size, world_size)


def check_world_size(world_size: int, packs_per_step: int) -> None:
    """Raise ValueError, naming the field, if there are more ranks than packs in a step."""
    if world_size > packs_per_step:
        raise ValueError(
            f"{world_size} ranks but train.packs_per_step is {packs_per_step}: each rank needs a "
            f"pack; start at most {packs_per_step} ranks, or raise train.packs_per_step"
        )


@dataclass(frozen=True)
class PackedBatch:
    """One pack: the kept patches of several images, laid end to end in one token sequence.

    Image i owns the rows ``cu_seqlens[i]:cu_seqlens[i + 1]``: first `prefix_tokens` rows that the
    model fills (class token, registers), then its kept patches in row-major order. Rows from
    ``cu_seqlens[I]`` on are tail padding, a segment of its own, which may be empty. An image that
    failed to decode keeps its rows, with weight 0: nothing else in the pack moves.
    """

    patches: Tensor
    """[C, p*p*c] uint8 pixels, channels last inside a patch; zero in prefix and padding rows."""
    coords: Tensor
    """[C, 2] int32 (y, x) of each patch in its image's grid; -1 in prefix and padding rows."""
    grids: Tensor
    """[I, 2] int32 (h, w) of each image in patches, before dropping; (1, 1) where unused."""
    cu_seqlens: Tensor
    """[I + 2] int32 segment boundaries; unused images have no rows; the last segment is padding."""
    weights: Tensor
    """[I] float32: 1 for an image to learn from, 0 for an unused row or an undecodable image."""
    sample_ids: Tensor
    """[I] int64 row of the sample in the manifest; -1 where unused."""
    labels: Tensor
    """[I] int64 class index; -1 for an image without a label."""
    lengths: tuple[int, ...]
    """Host copy of the I + 1 segment lengths, so that no kernel choice waits for the device."""
    prefix_tokens: int = 0
    """Rows at the start of every image that belong to the model, not to patches."""
    label_sets: Tensor | None = None
    """[I, M] int64 class indices of images with any number of them, -1 after the last one; None
    where every image has one label. `labels` then holds the first."""
    text_ids: Tensor | None = None
    """[text budget] int64 tokens of all captions, end to end (image-text objectives only)."""
    text_cu_seqlens: Tensor | None = None
    """[I + 2] int32 boundaries of the captions, laid out as `cu_seqlens`."""
    text_lengths: tuple[int, ...] = ()
    """Host copy of the I + 1 lengths of the captions; the last one is tail padding."""
    text_cut: Tensor | None = None
    """[I] bool: the caption had more tokens than `data.text.max_tokens`, and was cut."""
    keys: tuple[str, ...] = ()
    """Key of each image in its shard, those that failed to decode included; unused rows have none.
    Empty where the packs do not come from shards, and in joined packs."""
    view_of: Tensor | None = None
    """[I] int64 row of the first view of the same image, -1 where unused: the views of an image are
    the rows with the same number. None: every row is an image of its own."""
    local_views: Tensor | None = None
    """[I] bool: the row is a local view of its image (`data.local`); None: no image has any."""
    mixed_with: Tensor | None = None
    """[I] int64 row of the image that is mixed into each one, of weight 1 as well; -1: none. None:
    no image of the run is mixed (`data.mix`)."""
    own_shares: Tensor | None = None
    """[I] float32 weight of an image's own class; the other image's has the rest. 1 where no image
    is mixed into it."""
    draw_seeds: Tensor | None = None
    """[I] int32 seed of each image's dropout and stochastic depth, see `zeta.models.dropout`; None:
    from torch's global generator."""
    host_seeds: tuple[int, ...] = ()
    """Host copy of `draw_seeds`, so that branches can leave out the images that stochastic depth
    drops without waiting for the device; empty: not known, and these images are zeroed."""
    host_grids: tuple[tuple[int, int], ...] = ()
    """Host copy of `grids`, for work whose shapes depend on them; empty: not known."""
    dropped_patches: Tensor | None = None
    """[D, p*p*c] uint8 pixels of the patches that were dropped, image by image, row-major; zero in
    undecodable images. With `patches` they make up every image. D differs from pack to pack. None:
    they stayed in the worker (`data.drop.keep`)."""
    dropped_coords: Tensor | None = None
    """[D, 2] int32 (y, x) of each dropped patch in its image's grid."""
    dropped_image: Tensor | None = None
    """[D] int64 image of the pack that each dropped patch belongs to."""

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest segment, tail padding included."""
        return max(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens that belong to images: the budget less the tail padding."""
        return sum(self.lengths[:-1])

    @property
    def num_images(self) -> int:
        """Images that count in the loss."""
        return int(self.weights.sum().item())

    @property
    def first_views(self) -> Tensor:
        """[I] bool: the row is an image's first view; every used row if images have one."""
        if self.view_of is None:
            return self.sample_ids >= 0
        return self.view_of == torch.arange(len(self.view_of), device=self.view_of.device)

    def to(self, device: torch.device | str) -> PackedBatch:
        """Return the pack with every tensor on `device` (asynchronously from pinned memory)."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> PackedBatch:
        """Return the pack in page-locked memory; `torch.utils.data.DataLoader` calls this."""
        return self._map(lambda tensor: tensor.pin_memory())

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory of every tensor until the work queued on `stream` so far is done."""
        for tensor in self.tensors().values():
            tensor.record_stream(stream)

    def _map(self, function: Callable[[Tensor], Tensor]) -> PackedBatch:
        changed: Any = {name: function(tensor) for name, tensor in self.tensors().items()}
        return replace(self, **changed)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the pack, by field."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in values if isinstance(value, Tensor)}


def join_packs(packs: Sequence[PackedBatch], device: torch.device | str) -> PackedBatch:
    """Return packs as one on `device`: their images in order, then the tail padding of all.

    Image i of pack k has row k * I + i, so outputs of [n * I] rows are those of the packs in order.

    Args:
        packs: on the host, at least one.
        device: where the joined pack goes.
    """
    on_cuda = torch.device(device).type == "cuda"

    def pinned(tensor: Tensor) -> Tensor:
        """A copy from memory that is not pinned would wait for the device."""
        return tensor.pin_memory() if on_cuda else tensor

    def moved(tensor: Tensor) -> Tensor:
        return pinned(tensor).to(device, non_blocking=True)

    def stacked(name: str) -> Tensor:
        return moved(torch.cat([getattr(pack, name) for pack in packs]))

    if len(packs) == 1:
        return packs[0]._map(moved)
    first, rows = packs[0], [pack.num_tokens for pack in packs]
    tail = sum(len(pack.patches) for pack in packs) - sum(rows)
    patches = first.patches.new_empty(sum(rows) + tail, first.patches.shape[1], device=device)
    for part, pack in zip(patches[: sum(rows)].split(rows), packs, strict=True):
        part.copy_(pinned(pack.patches[: len(part)]), non_blocking=True)
    patches[sum(rows) :].zero_()
    coords = [pack.coords[:used] for pack, used in zip(packs, rows, strict=True)]
    lengths = _joined_lengths([pack.lengths for pack in packs])
    joined = PackedBatch(
        patches=patches,
        coords=moved(torch.cat([*coords, first.coords.new_full((tail, 2), -1)])),
        grids=stacked("grids"),
        cu_seqlens=moved(_boundaries(lengths)),
        weights=stacked("weights"),
        sample_ids=stacked("sample_ids"),
        labels=stacked("labels"),
        lengths=lengths,
        prefix_tokens=first.prefix_tokens,
        label_sets=None if first.label_sets is None else stacked("label_sets"),
        view_of=None if first.view_of is None else moved(_joined_rows(packs, "view_of")),
        local_views=None if first.local_views is None else stacked("local_views"),
        mixed_with=None if first.mixed_with is None else moved(_joined_rows(packs, "mixed_with")),
        own_shares=None if first.own_shares is None else stacked("own_shares"),
        draw_seeds=None if first.draw_seeds is None else stacked("draw_seeds"),
        host_seeds=tuple(seed for pack in packs for seed in pack.host_seeds),
        host_grids=tuple(grid for pack in packs for grid in pack.host_grids),
    )
    if first.dropped_image is not None:
        joined = replace(
            joined,
            dropped_patches=stacked("dropped_patches"),
            dropped_coords=stacked("dropped_coords"),
            dropped_image=moved(_joined_images(packs)),
        )
    if first.text_ids is None:
        return joined
    used = [sum(pack.text_lengths[:-1]) for pack in packs]
    texts = [
        pack.text_ids[:n] for pack, n in zip(packs, used, strict=True) if pack.text_ids is not None
    ]
    padding = sum(pack.text_lengths[-1] for pack in packs)
    text_lengths = _joined_lengths([pack.text_lengths for pack in packs])
    return replace(
        joined,
        text_ids=moved(torch.cat([*texts, first.text_ids.new_zeros(padding)])),
        text_cu_seqlens=moved(_boundaries(text_lengths)),
        text_lengths=text_lengths,
        text_cut=None if first.text_cut is None else stacked("text_cut"),
    )


def _joined_lengths(lengths: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the lengths of all packs without their tails, then the sum of the tails."""
    images = chain.from_iterable(each[:-1] for each in lengths)
    return (*images, sum(each[-1] for each in lengths))


def _joined_rows(packs: Sequence[PackedBatch], name: str) -> Tensor:
    """Return a field that holds numbers of rows, of packs whose rows follow one another."""
    parts, row = list[Tensor](), 0
    for pack in packs:
        rows = getattr(pack, name)
        assert rows is not None, "all packs of a run have the field, or none has"
        parts.append(torch.where(rows < 0, rows, rows + row))
        row += len(rows)
    return torch.cat(parts)


def _joined_images(packs: Sequence[PackedBatch]) -> Tensor:
    """Return `dropped_image` of packs whose images follow one another."""
    parts, before = list[Tensor](), 0
    for pack in packs:
        assert pack.dropped_image is not None, "all packs of a run keep what is dropped, or none"
        parts.append(pack.dropped_image + before)
        before += len(pack.weights)
    return torch.cat(parts)


def _boundaries(lengths: Sequence[int]) -> Tensor:
    # By numpy: torch takes a microsecond for each number of a tuple.
    return torch.from_numpy(np.cumsum((0, *lengths), dtype=np.int32))


@dataclass(frozen=True)
class StepPacks:
    """All packs of one optimizer step for this rank: `packs_per_rank` on every rank."""

    step: int
    """Index of the step that these packs belong to; the first step of a run is 0."""
    packs: tuple[PackedBatch, ...]
    """Packs of the lanes of this rank; an empty, zero-weight pack where there is no lane left."""
    lanes: tuple[int, ...]
    """Lane of each pack (`lanes_of_rank`), which its random seed and the ledger are keyed by."""
    num_images: int
    """Images of weight 1 over `packs`, counted after decode: the trainer all-reduces this
    before the first backward, so that every image weighs the same in the step's mean."""
    num_tokens: int
    """Tokens of images over `packs`, padding excluded."""
    epoch: int
    """Lowest epoch that a lane of this rank drew a sample of this step from."""
    more: bool
    """Whether a lane of this rank has samples left after this step. A run by epochs ends when
    the all-reduced OR of this is false."""
    rejected: tuple[Rejected, ...] = ()
    """Samples of this step that could not be decoded, for quarantine.jsonl and the ledger."""

    @property
    def num_rejected(self) -> int:
        """Images that could not be used: all views of each rejected sample."""
        if not self.rejected or self.packs[0].view_of is None:
            return len(self.rejected)
        unused = ((pack.sample_ids >= 0) & (pack.weights == 0) for pack in self.packs)
        return sum(int(rows.sum()) for rows in unused)


@dataclass(frozen=True)
class Rejected:
    """A sample that a step planned but could not train on."""

    sample_id: int
    """Row of the sample in the manifest."""
    key: str
    """Key of the sample in its shard, as far as it could be read."""
    shard: str
    """Path of the shard."""
    reason: str
    """Why it could not be used, in words."""


class StepSource(Protocol):
    """Gives the trainer its packs; `data_pipeline.loading.loader.PackLoader` is the real one."""

    def steps(self, state: Mapping[str, Any] | None) -> Iterator[StepPacks]:
        """Yield the packs of each step, from `state` on (None: from the first step).

        `state` is the merged state of all lanes, as saved by any number of ranks. The iterator
        never ends before the trainer stops it: finished lanes give empty packs.
        """
        ...

    def state_after(self, step: int) -> Mapping[str, Any]:
        """Return the JSON-able state of this rank's lanes once `step` is committed.

        Only the steps that were yielded and not yet superseded by a later call are known;
        any other step raises `KeyError`. States of the ranks are merged with `merge_states`.
        """
        ...


def merge_states(states: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge the data states of all ranks into the state of the run: the union of their lanes."""
    lanes: dict[str, Any] = {}
    for state in states:
        lanes.update(state["lanes"])
    return {**states[0], "lanes": dict(sorted(lanes.items(), key=lambda item: int(item[0])))}


def id_digest(ids: Sequence[int]) -> str:
    """Return a short digest of sample ids in order."""
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:16]
