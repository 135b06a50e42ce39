from __future__ import annotations

import numpy as np

from data_pipeline.shards.index import index_shards
from data_pipeline.shards.stats import shard_stats
from tests.data_pipeline.shard_fixtures import encode, jpeg, photo, write_shard


def test_the_statistics_are_those_of_the_images(tmp_path):
    sizes = [(16, 32), (64, 64), (100, 50), (300, 400)]
    members = []
    for number, (height, width) in enumerate(sizes):
        members.append((f"{number}.jpg", jpeg(height, width)))
        if number < 2:
            members.append((f"{number}.cls", b"3"))
    members += [("png.png", encode(photo(80, 80), "PNG")), ("png.txt", b"a caption")]
    members.append(("bad.jpg", b"no image"))
    write_shard(tmp_path / "0.tar", members)
    stats = shard_stats(index_shards(tmp_path), patch_size=16)
    sizes.append((80, 80))
    assert (stats.shards, stats.images, stats.rejected) == (1, 5, 1)
    assert stats.rejected_reasons == {"not an image (UnidentifiedImageError)": 1}
    assert (stats.labelled, stats.captioned, stats.classes) == (2, 1, None)
    assert stats.formats == {"jpeg": 4, "png": 1}
    assert stats.height["median"] == 80
    assert stats.width["max"] == 400
    tokens = [round(h / 16) * round(w / 16) for h, w in sizes]
    assert stats.tokens["mean"] == np.mean(tokens)
    for histogram in stats.histograms:
        assert sum(histogram.counts) == 5
        assert len(histogram.counts) == len(histogram.edges) - 1
    aspect = stats.histograms[1]
    at_one = aspect.edges.index(1.0)
    assert aspect.counts[at_one] == 2
