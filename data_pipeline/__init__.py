"""The data pipeline: it turns bytes on storage into packed batches.

The way of an image: shards, manifest, plan, fetch, decode, loader. The pipeline may import only
packed tensors, config marks, host memory and the rules for pictures from `zeta`, never `launch`.

The names below are the library: index shards, plan, and read packs in your own loop, as
docs/data.md shows. They are loaded on first use, so that command-line tools start quickly.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_pipeline.config import DataConfig as DataConfig
    from data_pipeline.config import DropConfig as DropConfig
    from data_pipeline.config import ResolutionConfig as ResolutionConfig
    from data_pipeline.loading.loader import PackLoader as PackLoader
    from data_pipeline.plan.plan import Plan as Plan
    from data_pipeline.shards.build import build_shards as build_shards
    from data_pipeline.shards.index import index_shards as index_shards
    from data_pipeline.shards.manifest import Manifest as Manifest

_MODULES = {
    "DataConfig": "config",
    "DropConfig": "config",
    "Manifest": "shards.manifest",
    "PackLoader": "loading.loader",
    "Plan": "plan.plan",
    "ResolutionConfig": "config",
    "build_shards": "shards.build",
    "index_shards": "shards.index",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return getattr(importlib.import_module(f"data_pipeline.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'data_pipeline' has no attribute {name!r}")
