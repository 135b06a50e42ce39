"""Runs on Slurm: submission, doctor, preflight, bad nodes, and which models fit which GPUs.

Imports `launch.run` and below.
"""
