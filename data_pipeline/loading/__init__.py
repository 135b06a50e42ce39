"""Execution of the plan into packed batches: fetch, decode, executors, loader.

Imports `data_pipeline.plan` and `data_pipeline.shards`.
"""
