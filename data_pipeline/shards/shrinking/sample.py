"""A sample with a smaller image, and its line in the report of its shard."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping

import torch

from data_pipeline.shards.images.header import ImageError
from data_pipeline.shards.images.smaller import Shrinking, smaller_copy, suffix_of_copy
from data_pipeline.shards.sample import SampleError, pick_image
from data_pipeline.shards.shrinking.report import ShardReport


def shrunk_sample(
    key: str, members: Mapping[str, bytes], rule: Shrinking, report: ShardReport
) -> dict[str, bytes] | None:
    """Return the members of a sample, content by suffix, with a smaller image in its place.

    Return None if the sample is left out. `report` counts it.
    """
    try:
        image = pick_image(members)
    except SampleError as error:
        report.refuse(key, str(error))
        return dict(members)
    try:
        copy = counted_copy(members[image], rule, report)
    except ImageError as error:
        report.refuse(key, str(error))
        return None if rule.drop_unreadable else dict(members)
    if copy is None:
        return dict(members)
    return {
        suffix_of_copy(suffix) if suffix == image else suffix: copy if suffix == image else content
        for suffix, content in members.items()
    }


def counted_copy(data: bytes, rule: Shrinking, report: ShardReport) -> bytes | None:
    """Return the smaller copy of an image, None if it stays, and count it in `report`.

    Raises:
        ImageError: the image cannot be read; it is counted too, but not yet listed.
    """
    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)  # of a worker: there is one for every core
    report.images += 1
    report.bytes_before += len(data)
    try:
        copy = smaller_copy(data, rule)
    except ImageError:
        report.bytes_after += 0 if rule.drop_unreadable else len(data)
        raise
    report.bytes_after += len(data if copy is None else copy)
    report.copies += copy is not None
    return copy
