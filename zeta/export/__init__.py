"""Models on their way out and in: export folders, cards, text encoders, timm.

Imports `zeta.checkpoint` and below.
"""
