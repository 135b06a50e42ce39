"""DeepSpeed ZeRO behind one protocol (`zeta.zero.protocol`): no other room imports it.

Imports `zeta.models` and below; training, checkpoints and exports reach DeepSpeed through here.
"""
