"""The plan, a pure function: it decides image sizes, order, and the packs of each lane.

Imports `data_pipeline.shards` (the manifest) and the config.
"""
