"""Read config.json of a model of transformers strictly: what is not known is refused by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
}
_TRAINING = {
    "attention_dropout", "attention_probs_dropout_prob", "dropout", "drop_path_rate",
    "hidden_dropout_prob", "initializer_factor", "initializer_range", "layerscale_value",
    "logit_scale_init_value", "pos_embed_jitter", "pos_embed_rescale", "pos_embed_shift",
}  # fmt: skip
"""Options of training and of initial values, which do not change what an image becomes."""
_GENERAL = {
    "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "add_cross_attention",
    "architectures", "apply_layernorm", "bad_words_ids", "base_model_tp_plan",
    "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward",
    "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample",
    "dtype", "early_stopping", "encoder_no_repeat_ngram_size", "encoder_stride", "eos_token_id",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "id2label", "is_decoder", "is_encoder_decoder", "label2id",
    "length_penalty", "max_length", "min_length", "model_type", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_labels", "num_return_sequences", "out_features",
    "out_indices", "output_attentions", "output_hidden_states", "output_scores", "pad_token_id",
    "prefix", "problem_type", "projection_dim", "pruned_heads", "remove_invalid_values",
    "repetition_penalty", "reshape_hidden_states", "return_dict", "return_dict_in_generate",
    "sep_token_id", "sha256", "stage_names", "suppress_tokens", "task_specific_params",
    "temperature",
    "text_config", "text_config_dict", "tf_legacy_loss", "tie_encoder_decoder",
    "tie_word_embeddings", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers_version", "typical_p", "use_bfloat16", "use_mask_token", "vision_config",
    "vision_config_dict", "zeta",
}  # fmt: skip
"""Keys that any config may have, and that do not change what an image becomes."""


class Options:
    """The options of one config, with the defaults of its class.

    Args:
        config: content of config.json, or of its `vision_config`.
        defaults: the options of the class that change its outputs, with its defaults.
        what: name of the class, for messages.

    Raises:
        ValueError: the config has an option that the class is not known to have, by name.
    """

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any], what: str) -> None:
        known: Collection[str] = {*defaults, *_TRAINING, *_GENERAL}
        for key, value in config.items():
            if key not in known and value not in (None, False, 0, "", [], {}):
                raise ValueError(
                    f"config.json has {key}={value!r}, which zeta does not know of {what}: a newer "
                    "version of the class may have written it; upgrade zeta"
                )
        self.what = what
        self._values = {key: config.get(key, default) for key, default in defaults.items()}

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def whole(self, key: str) -> int:
        """Return a size.

        Raises:
            ValueError: it is not a whole number of at least 1.
        """
        value = self[key]
        if isinstance(value, list | tuple) and len(set(value)) == 1:
            value = value[0]
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
            raise ValueError(f"{key} is {value!r} in config.json: zeta needs one whole number")
        return value

    def sides(self, key: str) -> tuple[int, int]:
        """Return (height, width)."""
        value = self[key]
        if isinstance(value, list | tuple) and len(value) == 2:
            return int(value[0]), int(value[1])
        side = self.whole(key)
        return side, side

    def activation(self) -> str:
        """Return NaViT's name of the activation.

        Raises:
            ValueError: NaViT does not have it.
        """
        value = self["hidden_act"]
        if value not in _ACTIVATIONS:
            raise ValueError(
                f"hidden_act is {value!r} in config.json, which NaViT does not have: it has "
                f"{', '.join(_ACTIVATIONS)}"
            )
        return _ACTIVATIONS[value]

    def refuse_unless(self, key: str, *values: Any) -> None:
        """Raise ValueError unless an option has one of these values."""
        if self[key] not in values:
            raise ValueError(
                f"{key} is {self[key]!r} in config.json of {self.what}: NaViT computes "
                f"{' or '.join(map(repr, values))} only"
            )

    def sizes(self) -> dict[str, Any]:
        """Return NaViT's names of the sizes that all classes have."""
        dim, heads = self.whole("hidden_size"), self.whole("num_attention_heads")
        if dim % heads:
            raise ValueError(
                f"hidden_size is {dim} in config.json, not a multiple of {heads} heads"
            )
        return {
            "arch": "navit",
            "patch_size": self.whole("patch_size"),
            "dim": dim,
            "depth": self.whole("num_hidden_layers"),
            "heads": heads,
            "dim_head": dim // heads,
            "channels": self.whole("num_channels"),
            "norm_eps": float(self["layer_norm_eps"]),
            "activation": self.activation(),
            "qk_norm": False,
            "bias": True,
        }
