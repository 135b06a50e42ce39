"""Passes that are recorded as CUDA graphs: whether to, and how.

Imports `zeta.train.config`, `zeta.zero`, `zeta.objectives` and below.
"""
