"""The export format `timm`: `timm.create_model("local-dir:OUT", pretrained=True)`, same logits.

NaViT becomes timm's NaFlexVit (`zeta.export.timm.naflexvit`), MegaVit its VisionTransformer
(`zeta.export.timm.vision_transformer`). timm takes float images that are normalised with
`pretrained_cfg`'s mean and std, and reads one file of weights, whatever its size. Checked against
timm 1.0.31.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from zeta.export.protocol import PLACE, ExportFormat, ModelToExport
from zeta.export.timm import naflexvit, vision_transformer
from zeta.export.timm.options import with_zero_biases
from zeta.export.zeta_format import preprocessing
from zeta.models.config import with_defaults
from zeta.models.exported import WEIGHTS
from zeta.stored_tensors import StoredTensor, total_bytes, write_safetensors

_FILE = f"{WEIGHTS}.safetensors"


class TimmModel(Protocol):
    """A module that describes one of our models as one of timm's.

    The arguments are those of our model's constructor, defaults included.
    """

    FIXED_SIZE: bool
    """Whether all images have the size `image_size`."""
    FIRST_LAYER: str
    """timm's name of the patch embedding's projection."""

    def entry_point(self, arguments: Mapping[str, Any]) -> str:
        """Return the name of the function in timm that builds the model."""
        ...

    def obstacle(self, arguments: Mapping[str, Any]) -> str | None:
        """Return which option timm does not support; None if it supports all."""
        ...

    def model_args(self, arguments: Mapping[str, Any], sides: Sequence[int]) -> dict[str, Any]:
        """Return the arguments of `entry_point`; `sides` are [height, width] of `image_size`."""
        ...

    def tensors(
        self, own: Mapping[str, StoredTensor], arguments: Mapping[str, Any]
    ) -> dict[str, StoredTensor]:
        """Return the weights, biases included, under timm's names and in timm's layout."""
        ...


_MODELS: dict[str, TimmModel] = {"navit": naflexvit, "megavit": vision_transformer}
"""The model of timm that each architecture becomes."""


class TimmFormat(ExportFormat):
    """The format that timm loads; of an image-text model it is the image encoder alone."""

    def obstacle(self, arguments: Mapping[str, Any]) -> str | None:
        """Return which option timm does not support; None if it supports all."""
        full = with_defaults(arguments)
        dim, heads, dim_head = full["dim"], full["heads"], full["dim_head"]
        if heads * dim_head != dim:
            return (
                f"model.heads x model.dim_head is {heads} x {dim_head}, not model.dim={dim}: timm "
                "needs them equal"
            )
        return _MODELS[full["arch"]].obstacle(full)

    def nbytes(self, model: ModelToExport) -> int:
        """Return the bytes of the weights, with the biases that timm insists on."""
        return total_bytes(timm_tensors(model.tensors, model.arguments))

    def write(self, directory: Path, model: ModelToExport, *, alone: bool) -> dict[str, Any]:
        """Write model.safetensors, as `ExportFormat.write`."""
        fit = (model.resolution or {}).get("fit")
        config = timm_config(model.tensors, model.arguments, fit)
        class_names = model.facts.get("class_names")
        if class_names is not None:
            config["label_names"] = list(class_names)
        write_safetensors(directory / _FILE, timm_tensors(model.tensors, model.arguments))
        return config

    def card(self, arguments: Mapping[str, Any]) -> str:
        """Return how to load the model with timm."""
        sizes = f"sides in multiples of {arguments['patch_size']}"
        if _MODELS[arguments["arch"]].FIXED_SIZE:
            sizes = f"of {arguments['image_size']} pixels"
        found, options = "logits", ""
        if not arguments["num_classes"]:
            found, options = "embeddings", ", num_classes=0"
        return (
            "With timm 1.0.31 or newer, without zeta:\n\n```python\nimport timm\n\n"
            f'model = timm.create_model("local-dir:{PLACE}", pretrained=True{options}).eval()\n'
            f"{found} = model(images)  # float [n, 3, height, width], {sizes},\n"
            '# normalised with model.pretrained_cfg["mean"] and ["std"]\n```'
        )

    def files(self, names: Collection[str], config: Mapping[str, Any]) -> set[str]:
        """Return model.safetensors, if config.json is one of timm's."""
        return {_FILE} if _FILE in names and "architecture" in config else set()


FORMAT = TimmFormat()


def timm_config(
    tensors: Mapping[str, StoredTensor], model_arguments: Mapping[str, Any], fit: str | None = None
) -> dict[str, Any]:
    """Return timm's config.json for this model.

    Args:
        tensors: holds the buffers mean and std.
        model_arguments: `ModelConfig.resolve()`: arch and constructor arguments.
        fit: `data.resolution.fit` of the training, which timm's transform is to do as well.
    """
    arguments = with_defaults(model_arguments)
    model, pixels = _MODELS[arguments["arch"]], preprocessing(tensors, arguments)
    side = arguments["image_size"]
    sides = [side, side] if isinstance(side, int) else list(side)
    return {
        "architecture": model.entry_point(arguments),
        "num_classes": arguments["num_classes"],
        "pretrained_cfg": {
            "input_size": [pixels["channels"], *sides],
            "fixed_input_size": model.FIXED_SIZE,
            "num_classes": arguments["num_classes"],
            "mean": pixels["mean"],
            "std": pixels["std"],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "squash" if fit == "squash" else "center",
            "first_conv": model.FIRST_LAYER,
            "classifier": "head",
        },
        "model_args": model.model_args(arguments, sides),
    }


def timm_tensors(
    tensors: Mapping[str, StoredTensor], model_arguments: Mapping[str, Any]
) -> dict[str, StoredTensor]:
    """Return the weights under timm's names, with zeros for the biases that timm insists on."""
    own = {name: tensor for name, tensor in tensors.items() if name not in ("mean", "std")}
    arguments = with_defaults(model_arguments)
    complete = with_zero_biases(own, model_arguments)
    return _MODELS[arguments["arch"]].tensors(complete, arguments)
