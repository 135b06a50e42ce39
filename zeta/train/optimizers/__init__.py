"""The optimizers by name, and those that torch has only in part.

Imports `zeta.config_field` and torch.
"""
