"""From bytes on storage to packed batches: shards, manifest, plan, fetch, decode, loader."""
