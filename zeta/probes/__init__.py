"""Scores of frozen features: nearest neighbours, linear probe, per-image scores, feature files.

Imports only the ground of `zeta`.
"""
