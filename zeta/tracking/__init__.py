"""Metric sinks: metrics.jsonl, and Weights & Biases beside training.

Imports `zeta.run` and the ground of `zeta`.
"""
