"""The commands `zeta launch ...`: start training, and follow it.

Imports all rooms of `launch` below the commands, inside `run`.
"""
