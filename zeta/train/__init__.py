"""The training loop and its parts: engine, optimizer, schedule, progress, evaluation, resume.

The top of `zeta`: imports every other room, and none of them imports it.
"""
