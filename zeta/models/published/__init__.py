"""Published encoders as NaViTs: of Hugging Face's transformers, and of timm.

`reading` opens one as an export of ours, `files` finds its weights and configs, `options` reads a
config strictly, `pixels` finds mean and std, `tensors` accounts for every tensor, `asking_timm`
says what an architecture of timm is made of; `fitting` brings weights to a model of other options.
The others know one family each.

Neither transformers nor its weights are imported: a folder is JSON and safetensors. Imports of
`zeta.models` only what reads files and what states the sizes of models.
"""
