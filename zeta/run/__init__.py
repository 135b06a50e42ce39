"""The run directory and the life of a run: files, heartbeat, watchdog, signals, console, ledger.

Imports only the ground of `zeta`: no model, no DeepSpeed.
"""
