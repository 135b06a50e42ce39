"""Probes of the encoder while it trains: its embeddings classify held-out images.

Imports of `zeta.train` the evaluation, and lower rooms of `zeta`.
"""
