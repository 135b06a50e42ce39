"""Status of a run, from snapshots of its directory; the audit of its data; and W&B sync.

Imports `launch.run` and below.
"""
