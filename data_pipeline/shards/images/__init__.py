"""Image files as they lie on storage: formats, headers, limits, pixels, and smaller copies.

Imports zeta.models.pictures and resizing, the rules that training and embedding share.
"""
