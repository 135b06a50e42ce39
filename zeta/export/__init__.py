"""Exports: the formats, the folder that is whole or absent, cards, text encoders, timm.

`formats` is the table, `protocol` what a format does, `zeta_format` and `timm.format` the formats,
`saving` writes models that are in memory. `zeta.models.exported` reads exports.

Imports `zeta.checkpoint` and below.
"""
