"""DeepSpeed ZeRO: the only room that imports it, and that knows how it lays out weights and state.

Imports `zeta.models` and below; training, checkpoints and exports come to DeepSpeed through here.
"""
