"""Zero-shot classification with an image-text model: a class is given by the text of its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.loading.tokenizer import BYTES, open_tokenizer
from zeta.export.text_encoder import load_text_encoder
from zeta.models.export_checks import check_file
from zeta.models.exported import TOKENIZER_FILE
from zeta.models.sources import read_config
from zeta.packed import PackedBatch

TEMPLATES = ("a photo of a {}",)
_PROMPTS_AT_ONCE = 256


class ZeroShotClassifier:
    """Scores images by the similarity of their embedding with those of the class names.

    Args:
        export: export of an image-text model.
        class_names: names of the classes.
        templates: prompts with {} in the place of the name; the embeddings of all are averaged
            (Radford et al. 2021, section 3.1.4).

    Raises:
        ValueError: no text encoder in the export, a template without {}, or a prompt that is too
            long.
    """

    def __init__(self, export: Path, class_names: Sequence[str], templates: Sequence[str]) -> None:
        for template in templates:
            if "{}" not in template:
                raise ValueError(f"the template {template!r} has no {{}} for the name of a class")
        text, self._scale, self._bias = load_text_encoder(export)
        config = read_config(export)
        named = config["text"].get("tokenizer")
        if named not in (BYTES, TOKENIZER_FILE):  # a name in a file is never used as a path
            raise ValueError(f"{export} names no tokenizer of its own: export the model again")
        if named != BYTES:
            check_file(export / named, config)
        tokenizer = open_tokenizer(BYTES if named == BYTES else str(export / named))
        sums = torch.zeros(len(class_names), text.head.out_features)
        for template in templates:
            prompts = [template.replace("{}", name.replace("_", " ")) for name in class_names]
            ids = [tokenizer.encode(prompt) for prompt in prompts]
            for prompt, tokens in zip(prompts, ids, strict=True):
                if not 1 <= len(tokens) <= text.max_tokens:
                    raise ValueError(
                        f"the prompt {prompt!r} has {len(tokens)} tokens, and the text encoder of "
                        f"{export} takes 1 to {text.max_tokens}: choose another --template"
                    )
            with torch.no_grad():
                for start in range(0, len(ids), _PROMPTS_AT_ONCE):
                    part = slice(start, start + _PROMPTS_AT_ONCE)
                    sums[part] += F.normalize(text(ids[part]), dim=-1)
        self.classes_KD = F.normalize(sums, dim=-1)

    def on(self, image: nn.Module, device: torch.device) -> Callable[[PackedBatch], Tensor]:
        """Return the function from a pack on `device` to [I, K] logits."""
        classes_KD = self.classes_KD.to(device)

        def predict(pack: PackedBatch) -> Tensor:
            similarity = F.normalize(image(pack).float(), dim=-1) @ classes_KD.T
            return self._scale * similarity + self._bias

        return predict
