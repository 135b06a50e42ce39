"""Evaluation of exports: scores, groups, zero-shot, features and embeddings.

Imports `launch.run` and below.
"""
