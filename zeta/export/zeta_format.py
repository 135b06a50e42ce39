"""The export format `zeta`: the weights, the text encoder and the tokenizer, for zeta itself.

`zeta.models.exported` reads it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from zeta.export.protocol import PLACE, ExportFormat, ModelToExport
from zeta.models.config import ARCHITECTURES
from zeta.models.exported import FORMAT as VERSION
from zeta.models.exported import TEXT, TOKENIZER_FILE, WEIGHTS, ZETA_WEIGHTS
from zeta.stored_tensors import StoredTensor, total_bytes, write_safetensors, write_sharded

_PARTS = r"(-\d+-of-\d+)?\.safetensors|\.safetensors\.index\.json"
_WEIGHT_FILES = re.compile(rf"({WEIGHTS}|{ZETA_WEIGHTS})({_PARTS})")
_TEXT_FILES = {f"{TEXT}.safetensors", TOKENIZER_FILE}


class ZetaFormat(ExportFormat):
    """The format that `zeta eval`, `zeta finetune` and `NaViT.from_pretrained` load."""

    def obstacle(self, arguments: Mapping[str, Any]) -> str | None:
        """Return None: every model can be written."""
        return None

    def nbytes(self, model: ModelToExport) -> int:
        """Return the bytes of the weights, those of the text encoder included."""
        return total_bytes(model.tensors) + (total_bytes(model.text.tensors) if model.text else 0)

    def write(self, directory: Path, model: ModelToExport, *, alone: bool) -> dict[str, Any]:
        """Write the files, as `ExportFormat.write`. Beside another format they are `zeta*`."""
        config: dict[str, Any] = {
            "format": VERSION,
            "model": dict(model.arguments),
            "preprocessing": preprocessing(model.tensors, model.arguments),
            "info": dict(model.facts),
        }
        stem = WEIGHTS if alone else ZETA_WEIGHTS
        if not alone:
            config["weights"] = stem
        if model.resolution is not None:
            config["preprocessing"]["resolution"] = dict(model.resolution)
        write_sharded(directory, stem, model.tensors, model.max_file_bytes)
        text = model.text
        if text is not None:
            tokenizer = "bytes" if text.tokenizer is None else TOKENIZER_FILE
            config["text"] = {"model": dict(text.arguments), "tokenizer": tokenizer}
            write_safetensors(directory / f"{TEXT}.safetensors", text.tensors)
            if text.tokenizer is not None:
                shutil.copyfile(text.tokenizer, directory / TOKENIZER_FILE)
        return config

    def card(self, arguments: Mapping[str, Any]) -> str:
        """Return how to load the model with zeta."""
        model = ARCHITECTURES[arguments["arch"]].__name__
        needed = "torch, einops and safetensors are enough"
        sizes = f"uint8 [3, height, width], sides in multiples of {arguments['patch_size']}"
        use = f"logits = model([image])  # {sizes}"
        if not arguments["num_classes"]:
            needed = "torch, einops, safetensors and Pillow are enough"
            use = "embeddings = model.embed([image])  # [n, dim], of PIL images of any sizes"
        return (
            f"With zeta ({needed}):\n\n```python\nfrom zeta import {model}\n\n"
            f'model = {model}.from_pretrained("{PLACE}")\n{use}\n```'
        )

    def files(self, names: Collection[str], config: Mapping[str, Any]) -> set[str]:
        """Return the files of weights, text encoder and tokenizer."""
        weights = {name for name in names if _WEIGHT_FILES.fullmatch(name)}
        if not weights or not str(config.get("format")).startswith("zeta-"):
            return set()
        return weights | _TEXT_FILES.intersection(names)


FORMAT = ZetaFormat()


def preprocessing(
    tensors: Mapping[str, StoredTensor], model_arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what an image goes through before the model: mean, std (of [0, 1]) and patch size."""
    return {
        "mean": tensors["mean"].read().float().tolist(),
        "std": tensors["std"].read().float().tolist(),
        "channels": model_arguments.get("channels", 3),
        "patch_size": model_arguments["patch_size"],
    }
