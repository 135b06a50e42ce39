"""The export format `transformers`: `AutoModel.from_pretrained("OUT")`, the same features.

Checked against transformers 5.24.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from zeta.export.protocol import PLACE, ExportFormat, ModelToExport
from zeta.export.transformers import classes
from zeta.export.transformers.classes import DINOV3, SIGLIP2_CLASSIFIER, Target
from zeta.export.transformers.tensors import tensors_for
from zeta.export.zeta_format import preprocessing
from zeta.models.config import with_defaults
from zeta.models.export_checks import CHECKSUMS
from zeta.models.exported import WEIGHTS
from zeta.stored_tensors import StoredTensor, total_bytes, write_sharded

_WEIGHT_FILES = re.compile(rf"{WEIGHTS}((-\d+-of-\d+)?\.safetensors|\.safetensors\.index\.json)")
_PROCESSOR = "preprocessor_config.json"
_BICUBIC = 3


class TransformersFormat(ExportFormat):
    """The format that transformers loads; of an image-text model it is the image encoder alone."""

    def obstacle(self, arguments: Mapping[str, Any]) -> str | None:
        """Return which option no class has, and those that would fit; None if one has all."""
        return classes.obstacle(with_defaults(arguments))

    def nbytes(self, model: ModelToExport) -> int:
        """Return the bytes of the weights, with the biases that the class insists on."""
        return total_bytes(_weights(model)[1])

    def write(self, directory: Path, model: ModelToExport, *, alone: bool) -> dict[str, Any]:
        """Write weights and preprocessor_config.json, as `ExportFormat.write`."""
        target, tensors = _weights(model)
        write_sharded(directory, WEIGHTS, tensors, model.max_file_bytes)
        processor = _processor(target, model)
        (directory / _PROCESSOR).write_text(json.dumps(processor, indent=2) + "\n")
        config = target.config(with_defaults(model.arguments))
        names = model.facts.get("class_names")
        if target is SIGLIP2_CLASSIFIER and names:
            config["id2label"] = {str(i): name for i, name in enumerate(names)}
            if len(set(names)) == len(names):
                config["label2id"] = {name: i for i, name in enumerate(names)}
        dtypes = {str(t.dtype).removeprefix("torch.") for t in tensors.values()}
        return config | {"dtype": dtypes.pop() if len(dtypes) == 1 else "float32"}

    def card(self, arguments: Mapping[str, Any]) -> str:
        """Return how to load the model with transformers."""
        target = classes.target_of(with_defaults(arguments))
        assert target is not None, "`obstacle` was not asked"
        auto = "AutoModelForImageClassification" if target is SIGLIP2_CLASSIFIER else "AutoModel"
        head = "" if target is SIGLIP2_CLASSIFIER else " (a class without a head: features only)"
        use = 'outputs = model(**processor(images=image, return_tensors="pt"))\n'
        if target is SIGLIP2_CLASSIFIER and not arguments["num_classes"]:
            use = (
                "model.classifier = torch.nn.Identity()  # it was never trained\n"
                'inputs = processor(images=image, return_tensors="pt")\n'
                "embeddings = model(**inputs).logits\n"
            )
            head = " (whose classifier was never trained: features only)"
        imports = "import torch\n" if "torch." in use else ""
        return (
            f"With transformers 5.24 or newer, without zeta, as a {target.name}{head}:\n\n"
            f"```python\n{imports}from transformers import AutoImageProcessor, {auto}\n\n"
            f'processor = AutoImageProcessor.from_pretrained("{PLACE}")\n'
            f'model = {auto}.from_pretrained("{PLACE}").eval()\n'
            f"{use}```"
        )

    def files(self, names: Collection[str], config: Mapping[str, Any]) -> set[str]:
        """Return the weights and the settings of the image processor."""
        weights = {name for name in names if _WEIGHT_FILES.fullmatch(name)}
        # Checksums are ours: a folder that was downloaded is not to be replaced.
        ours = _PROCESSOR in names and "model_type" in config and CHECKSUMS in config
        return weights | {_PROCESSOR} if weights and ours else set()


FORMAT = TransformersFormat()


def _weights(model: ModelToExport) -> tuple[Target, dict[str, StoredTensor]]:
    arguments = with_defaults(model.arguments)
    target = classes.target_of(arguments)
    assert target is not None, "`obstacle` was not asked"
    return target, tensors_for(target, model.tensors, arguments)


def _processor(target: Target, model: ModelToExport) -> dict[str, Any]:
    """Return the settings of the class's image processor."""
    arguments = with_defaults(model.arguments)
    pixels, (height, width) = preprocessing(model.tensors, arguments), classes.sides(arguments)
    common = {
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": pixels["mean"],
        "image_std": pixels["std"],
        "resample": _BICUBIC,
    }
    if target is DINOV3:
        own = {"image_processor_type": "DINOv3ViTImageProcessor"}
        return own | common | {"size": {"height": height, "width": width}}
    patch = arguments["patch_size"]
    patches = (height // patch) * (width // patch)
    own = {"image_processor_type": "Siglip2ImageProcessor"}
    return own | common | {"patch_size": patch, "max_num_patches": patches}
