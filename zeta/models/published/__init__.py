"""Published encoders as NaViTs: folders of Hugging Face's transformers, and of timm's Eva.

`reading` opens a folder as an export of ours, `files` finds its weights and configs, `options`
reads a config strictly, `tensors` accounts for every tensor; the others know one family each.

Neither transformers nor its weights are imported: a folder is JSON and safetensors. Imports of
`zeta.models` only what reads files and what states the sizes of models.
"""
