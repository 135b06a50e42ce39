"""Shards on storage: read, written, indexed, described; the manifest.

Imports nothing else of the data pipeline.
"""
