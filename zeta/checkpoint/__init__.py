"""Checkpoints: what a checkpoint directory holds, and the store that writes and verifies them.

Imports `zeta.zero` and below.
"""
