"""The configuration of a run: composed, checked and resolved into model, data and cluster settings.

Imports `data_pipeline`, `zeta`, and the top level of `launch`.
"""
