"""The commands `zeta data ...`: plan, measure and audit the data of a run.

Imports data_pipeline and launch.config, inside `run`.
"""
