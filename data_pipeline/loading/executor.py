"""The executor: it turns a recipe into a packed batch and keeps no state.

The stages are read, decode, resize, patchify and drop.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.loading.colour import recoloured
from data_pipeline.loading.decode import ImageError, decode
from data_pipeline.loading.fetch import SampleReader
from data_pipeline.loading.layout import pack_layout
from data_pipeline.loading.pack_patches import MixedPatches, PackPatches
from data_pipeline.loading.rand_augment import rand_augmented
from data_pipeline.loading.recipe import ImageRecipe, PackRecipe
from data_pipeline.loading.targets import PackTargets
from data_pipeline.shards.sample import Sample, SampleError
from zeta.packed import PackedBatch, Rejected

PutView = Callable[[int, NDArray[np.uint8]], None]
"""Function that takes the row of a view in the pack, and its pixels."""
_VIEWS_AT_ONCE = 32
"""Views that are read, and then decoded, before their labels are read. With 45 kB a photograph and
1 MiB of L2 cache a core, executors took 1.16, 1.12, 1.11, 1.11 and 1.10 times the CPU time of bare
decoding for 1, 8, 16, 32 and 64 at once."""


@dataclass
class StageTimes:
    """Seconds that an executor spent on a pack."""

    read: float = 0.0
    """Seconds of waiting for bytes."""
    decode: float = 0.0
    """Seconds of decoding and resizing, and of copying kept patches into the pack."""
    pack: float = 0.0
    """Seconds of everything else: layout and labels, and images that are mixed (`data.mix`)."""
    finished_at: float = 0.0
    """Time when the pack was finished, by the monotonic clock of the system."""
    process: int = 0
    """Id of the process that made the pack."""
    cpu_at: float = 0.0
    """CPU seconds that this process had used when the pack was finished."""


@dataclass(frozen=True)
class ExecutedPack:
    """The pack that an executor returns."""

    batch: PackedBatch
    epoch: int
    rejected: tuple[Rejected, ...]
    times: StageTimes

    def __reduce__(self) -> tuple[Callable[..., ExecutedPack], tuple[object, ...]]:
        # Between processes every tensor would become a shared-memory file, too slow for small
        # ones: they travel as plain arrays (and the large ones by `PackBuffers`).
        batch = self.batch
        tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
        arrays = {
            name: value.numpy()
            for name, value in tensors.items()
            if isinstance(value, torch.Tensor)
        }
        counts = {
            name: tensors[name]
            for name in ("lengths", "text_lengths", "prefix_tokens", "keys", "host_grids")
        }
        return _unpack, (arrays, counts, self.epoch, self.rejected, self.times)


def _unpack(
    arrays: dict[str, NDArray[np.generic]],
    counts: dict[str, Any],
    epoch: int,
    rejected: tuple[Rejected, ...],
    times: StageTimes,
) -> ExecutedPack:
    values = counts | {name: torch.from_numpy(array) for name, array in arrays.items()}
    batch = PackedBatch(**values)
    return ExecutedPack(batch, epoch, rejected, times)


class Executor:
    """An executor of recipes, one at a time; it keeps nothing of one pack for the next.

    Args:
        class_names: class map for labels that are names.
        deadline_s: seconds for which a failing read of a sample is retried.
    """

    def __init__(self, class_names: Sequence[str] | None, deadline_s: float) -> None:
        self._class_names = class_names
        self._reader = SampleReader(deadline_s)

    def execute(self, recipe: PackRecipe, patches: NDArray[np.uint8] | None = None) -> ExecutedPack:
        """Read and decode the images of `recipe` into a packed batch.

        `patches` [token budget, p * p * 3] uint8 is memory for its patches; None allocates it.

        An image that cannot be decoded, or whose bytes are not those that were indexed, keeps the
        rows of all its views, as zeros of weight 0, and is listed once in `rejected`. Its
        neighbours in the pack, and all other packs, do not change, but for an image that would have
        been mixed with it (`data.mix`): it is shown alone.

        Raises:
            OSError: a shard cannot be read (the error names shard and byte).
            TarError: a shard differs from its index.
        """
        if patches is None:
            side = recipe.patch_size
            patches = np.empty((recipe.token_budget, side * side * 3), dtype=np.uint8)
        return _execute(recipe, patches, self._class_names, self._reader)


def _execute(
    recipe: PackRecipe,
    patches: NDArray[np.uint8],
    class_names: Sequence[str] | None,
    reader: SampleReader,
) -> ExecutedPack:
    start, times = time.perf_counter(), StageTimes()
    limit, prefix = recipe.max_images, recipe.prefix_tokens
    layout = pack_layout(recipe)
    weights = np.zeros(limit, dtype=np.float32)
    targets = PackTargets(recipe)
    rejected: list[Rejected] = []
    keys: list[str] = []
    written = PackPatches(recipe, layout.places, patches)
    views = MixedPatches(recipe, layout.places, written) if recipe.mixes else written
    for image, sample, failure in _shown(recipe, reader, views.put, times):
        first, end = len(keys), len(keys) + len(image.views)
        keys += [sample.key] * len(image.views)
        try:
            if sample.fault:
                raise SampleError(sample.fault)
            target = targets.read(sample, class_names)
            if failure is not None:
                raise failure
            for row in range(first, end):
                targets.put(row, target)
            weights[first:end] = 1
        except (SampleError, ImageError) as error:
            views.clear(first, end)
            rejected.append(Rejected(image.sample_id, sample.key, image.shard, str(error)))
    lengths, more = layout.lengths, views.finish()
    batch = PackedBatch(
        patches=torch.from_numpy(patches),
        coords=torch.from_numpy(layout.coords),
        grids=torch.from_numpy(layout.grids),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)),
        weights=torch.from_numpy(weights),
        sample_ids=torch.from_numpy(layout.sample_ids),
        lengths=tuple(lengths.tolist()),
        prefix_tokens=prefix,
        keys=tuple(keys),
        view_of=None if layout.view_of is None else torch.from_numpy(layout.view_of),
        local_views=None if layout.local is None else torch.from_numpy(layout.local),
        host_grids=tuple((h, w) for h, w in layout.grids.tolist()),
        **targets.fields(),
        **more,
    )
    times.pack = time.perf_counter() - start - times.read - times.decode
    times.finished_at = time.monotonic()
    times.process, times.cpu_at = os.getpid(), time.process_time()
    return ExecutedPack(batch, recipe.epoch, tuple(rejected), times)


def _shown(
    recipe: PackRecipe, reader: SampleReader, put: PutView, times: StageTimes
) -> Iterator[tuple[ImageRecipe, Sample, SampleError | ImageError | None]]:
    """Put the views of each image into the pack; yield its sample, and why it has none, if so.

    A few images are read, and then decoded, before targets are read of the first: decoding empties
    the caches of the processor, and what comes after it takes twice as long as when it is repeated.
    """
    images, row = iter(recipe.images), 0
    for samples, waited in reader.read(recipe.images, max(1, _VIEWS_AT_ONCE // recipe.views)):
        group = list(islice(images, len(samples)))
        before = time.perf_counter()
        failures = list[SampleError | ImageError | None]()
        for sample, image in zip(samples, group, strict=True):
            failures.append(_show(sample, image, recipe, put, row))
            row += len(image.views)
        times.read, times.decode = times.read + waited, times.decode + time.perf_counter() - before
        yield from zip(group, samples, failures, strict=True)
    assert next(images, None) is None, "every image has a sample"


def _show(
    sample: Sample,
    image: ImageRecipe,
    recipe: PackRecipe,
    put: PutView,
    first: int,
) -> SampleError | ImageError | None:
    try:
        views = decode_views(sample.image, image, recipe.patch_size, recipe.fit)
        for row, pixels in enumerate(views, start=first):
            put(row, pixels)
    except (SampleError, ImageError) as error:
        return error
    return None


def decode_views(
    data: bytes, image: ImageRecipe, side: int, fit: str
) -> Iterator[NDArray[np.uint8]]:
    """Decode an image once, and yield its views at their planned sizes.

    Each is [rows * p, columns * p, 3] uint8.

    Raises:
        ImageError: the image cannot be decoded, or not at the size in the index.
    """
    picture = decode(data, scale=image.scale, stored_size=image.stored_size)
    several = len(image.views) > 1
    for view in image.views:
        pixels = picture.resized(
            height=view.grid[0] * side,
            width=view.grid[1] * side,
            fit=fit,
            box=view.box,
            flip=view.flip,
            snap=several,  # resizing is most of the work once decoding is shared
        )
        if view.rand_augment is not None:
            pixels = rand_augmented(pixels, view.rand_augment, view.rand_augment_key)
        yield pixels if view.colour is None else recoloured(pixels, view.colour, view.colour_key)
