"""The export format `onnx`: one graph for any batch and any size, for onnxruntime and others.

The graph is traced by `torch.export` with batch, height and width as symbols, from the dense form
of the model in `zeta.export.onnx.dense`. Checked with torch 2.14, onnx 1.23, onnxscript 0.7 and
onnxruntime 1.32.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from zeta.export.protocol import PLACE, ExportFormat, ModelToExport
from zeta.export.zeta_format import preprocessing
from zeta.models.config import model_from_arguments, with_defaults
from zeta.models.exported import load_weights
from zeta.models.navit import NaViT
from zeta.models.position import table_of

FILE = "model.onnx"
_BESIDE = f"{FILE}.data"
_KEY = "onnx"
_LARGEST = 2**20
"""Bound of a batch and of a side in patches: more than any image has."""


class OnnxFormat(ExportFormat):
    """The format that onnxruntime loads; of an image-text model it is the image encoder alone."""

    def obstacle(self, arguments: Mapping[str, Any]) -> str | None:
        """Return why a model has no graph that is right at every size; None if it has."""
        full = with_defaults(arguments)
        if full["arch"] != NaViT.arch:
            return (
                f"model.arch is {full['arch']}: zeta writes ONNX of a navit only; export it to "
                "timm, and that to ONNX"
            )
        if table_of(full["position"]) == "absolute":
            return (
                f"model.position is {full['position']}: a graph cannot refuse images that are "
                "larger than the table, and would be wrong of them"
            )
        return None

    def nbytes(self, model: ModelToExport) -> int:
        """Return the bytes of the weights, which are fp32 in the graph."""
        fp32 = torch.float32.itemsize
        return sum(t.nbytes // t.dtype.itemsize * fp32 for t in model.tensors.values())

    def write(self, directory: Path, model: ModelToExport, *, alone: bool) -> dict[str, Any]:
        """Write model.onnx, with the whole model in memory, as `ExportFormat.write`."""
        built = load_weights(
            directory, model.arguments, model.tensors, model_from_arguments, torch.float32
        )
        assert isinstance(built, NaViT), "`obstacle` was not asked"
        embeds = model.facts.get("targets") == "none"
        write_onnx(built, directory / FILE, embeddings=embeds)
        pixels = preprocessing(model.tensors, with_defaults(model.arguments))
        names = model.facts.get("class_names")
        return {_KEY: pixels | {"class_names": None if names is None else list(names)}}

    def card(self, arguments: Mapping[str, Any]) -> str:
        """Return how to run the graph with onnxruntime."""
        found = "logits" if arguments["num_classes"] else "embeddings"
        return (
            "With onnxruntime, without zeta or torch:\n\n```python\nimport onnxruntime\n\n"
            f'session = onnxruntime.InferenceSession("{PLACE}/{FILE}")\n'
            f'({found},) = session.run(["{found}"], {{"images": images}})\n'
            "# float32 [n, 3, height, width], normalised with mean and std of config.json;\n"
            f"# sides in multiples of {arguments['patch_size']}, two patches or more\n```"
        )

    def files(self, names: Collection[str], config: Mapping[str, Any]) -> set[str]:
        """Return the graph, and the weights beside it."""
        return {FILE, _BESIDE}.intersection(names) if FILE in names and _KEY in config else set()


FORMAT = OnnxFormat()


def exported_program(model: NaViT, *, embeddings: bool = False) -> torch.export.ExportedProgram:
    """Return the graph of a NaViT on images [B, channels, height, width], normalised floats.

    It gives the logits, and with `embeddings` the pooled embeddings [B, dim] after them.

    Batch, height and width are symbols; a side has two patches or more.
    """
    from zeta.export.onnx.dense import DenseNaViT

    _refuse_inexpressible(model)
    patch = model.patch_size
    images = torch.zeros(2, model.channels, 3 * patch, 5 * patch)
    sides = (torch.export.Dim(name, min=2, max=_LARGEST) for name in ("rows", "columns"))
    dynamic = dict(zip((2, 3), (patch * side for side in sides), strict=True))
    batch = torch.export.Dim("batch", min=1, max=_LARGEST)
    with torch.no_grad(), _evaluating(model):
        return torch.export.export(
            DenseNaViT(model, embeddings=embeddings),
            (images,),
            dynamic_shapes={"images": {0: batch, **dynamic}},
        )


def packed_program(model: NaViT) -> torch.export.ExportedProgram:
    """Return the graph of a NaViT on packs, with the numbers of patches and images as symbols.

    Its arguments are those of `zeta.export.onnx.packed.PackedNaViT`; `packed_inputs` makes them of
    images of any sizes. There are two images and two patches or more.
    """
    from zeta.export.onnx.packed import PackedNaViT, packed_inputs

    _refuse_inexpressible(model)
    patch = model.patch_size
    images = [
        torch.zeros(model.channels, h * patch, w * patch) for h, w in ((2, 3), (1, 4), (3, 2))
    ]
    names = ("patches_TP", "coords_T2", "grids_I2", "index_T")
    patches, count = (torch.export.Dim(n, min=2, max=_LARGEST) for n in ("patches", "images"))
    sizes = ({0: patches}, {0: patches}, {0: count}, {0: patches})
    with torch.no_grad(), _evaluating(model):
        return torch.export.export(
            PackedNaViT(model),
            packed_inputs(model, images),
            dynamic_shapes=dict(zip(names, sizes, strict=True)),
        )


def _refuse_inexpressible(model: NaViT) -> None:
    position = getattr(model.embeds, "position", None)
    if (reason := FORMAT.obstacle({"arch": model.arch, "position": position})) is not None:
        raise ValueError(reason)


@contextmanager
def _evaluating(model: NaViT) -> Iterator[None]:
    """Keep a model in evaluation mode for a while."""
    training = model.training
    try:
        model.eval()
        yield
    finally:
        model.train(training)


def write_onnx(model: NaViT, path: Path, *, embeddings: bool = False) -> None:
    """Write the graph of a NaViT in evaluation mode to a file, and large weights beside it.

    Its output is `logits`, and with `embeddings` also that.

    Raises:
        ValueError: a package that writes ONNX is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"{error.name} is not installed, and it writes ONNX: pip install 'zeta[onnx]'"
        ) from error
    torch.onnx.export(
        exported_program(model, embeddings=embeddings),
        (),
        path,
        dynamo=True,
        input_names=["images"],
        output_names=["logits", *(["embeddings"] if embeddings else [])],
        verbose=False,
    )
