"""The plan, pure: which images, at which size, in which pack of which lane.

Imports `data_pipeline.shards` (the manifest) and the config.
"""
