"""Shards on storage and their manifest: reading, writing, indexing, statistics.

Imports nothing else of the data pipeline but the config.
"""
