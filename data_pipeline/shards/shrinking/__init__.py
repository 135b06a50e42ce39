"""Shards written again with images of the size that is trained.

Imports of the shards: folders, tars, samples, images, parallel work; and zeta.files.
"""
