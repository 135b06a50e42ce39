"""zeta's models as classes of Hugging Face's transformers: `format` writes them, `classes` decides.

Nothing here imports transformers: a folder is JSON and safetensors.
"""
