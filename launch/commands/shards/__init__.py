"""The commands `zeta shards ...`: write, index, check and shrink shards.

Imports data_pipeline, inside `run`.
"""
