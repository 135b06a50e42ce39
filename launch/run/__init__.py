"""One run on this machine: checks, ranks, restarts, lock, and the rank that trains.

Imports `launch.config` and `launch.report` (for the picture of the first pack).
"""
