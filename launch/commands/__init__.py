"""The commands of `zeta`, one module each: arguments, then a call.

Imports all rooms of `launch`, inside `run`, so that `zeta --help` answers at once.
"""
