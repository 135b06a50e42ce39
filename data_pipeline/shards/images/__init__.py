"""Image files as they lie on storage: formats, headers and limits, without a decode.

Imports zeta.models.pictures, for the rules that training and embedding share.
"""
