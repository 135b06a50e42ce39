"""Images as sources to write shards from: a folder, a table of files, and what each row says.

Imports of the shards: samples, parallel reading and the headers of images.
"""
