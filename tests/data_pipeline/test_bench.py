"""`zeta data bench` measures the loader as training uses it."""

from __future__ import annotations

from data_pipeline.bench import bench
from data_pipeline.loading.pack_buffers import PackBuffers
from data_pipeline.plan.plan import Plan
from data_pipeline.shards.index import index_shards
from tests.data_pipeline.synthetic import config, write_shards


def test_no_pack_comes_by_the_slow_way_because_the_benchmark_still_holds_others(
    tmp_path, monkeypatch
):
    taken = list[int | None]()
    take = PackBuffers.take

    def noted(self: PackBuffers) -> int | None:
        taken.append(take(self))
        return taken[-1]

    monkeypatch.setattr(PackBuffers, "take", noted)
    manifest = index_shards([str(write_shards(tmp_path / "shards", [40, 30]))], progress=False)
    plan = Plan(manifest, config(workers=1), num_lanes=2)
    result = bench(plan, packs=32, rounds=2)
    assert len(taken) >= 2 * 32
    assert None not in taken  # a slot for every pack
    assert result.efficiency > 0
