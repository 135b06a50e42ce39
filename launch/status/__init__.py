"""How a run is doing: snapshots of its directory, judged and shown; audit and W&B sync.

Imports `launch.run` and below.
"""
