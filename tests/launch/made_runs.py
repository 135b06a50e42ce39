"""Run directories as training leaves them, made in a moment: no rank, no shard, no step."""

import io
import json
import math
from pathlib import Path

import torch

from launch.config.load import ZetaConfig, to_yaml
from zeta.checkpoint.directory import write_manifest
from zeta.checkpoint.hashed_file import write_hashed, write_text
from zeta.models.config import ModelConfig, build_model
from zeta.models.parameters import parameter_shapes
from zeta.run.directory import step_name

SIZES = {"image_size": 16, "patch_size": 4, "num_classes": 3, "dim": 16, "depth": 2}
SIZES |= {"heads": 2, "mlp_dim": 32, "dim_head": 8}
CLASSES = ["cat", "dog", "owl"]


def make_run(folder, steps=(4,), scores=None, ranks=3, average=False, kind="softmax", **model):
    """A run with a checkpoint at each step, whose weights are those of seed `step`.

    scores: metrics.jsonl by step.
    average: also keep one; it is the weights plus 1.
    kind: of the objective, which trains the encoder alone.
    """
    config = ZetaConfig(model=ModelConfig(**(SIZES | model)))
    config.objective.kind = kind
    config.data.shards, config.train.max_steps = "shards", 10
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "classes.json").write_text(json.dumps(CLASSES))
    with (folder / "metrics.jsonl").open("w") as file:
        for step, values in (scores or {}).items():
            file.write(json.dumps({"step": step, "train/loss": 1.0}) + "\n")
            file.write(json.dumps({"step": step, **values}) + "\n")
        file.write('{"step": 9, "val/top1"')  # torn: the run is still going
    for step in steps:
        make_checkpoint(folder / "checkpoints" / step_name(step), config, step, ranks, average)
    return folder


def make_checkpoint(directory, config, step, ranks, average):
    """A checkpoint at ZeRO-3, laid out as DeepSpeed 0.19.8 and `zeta.checkpoint.store` do it."""
    model = build_model(config.model, seed=step)
    weights = {name: tensor.detach() for name, tensor in model.named_parameters()}
    progress = {"step": step, "images": 10 * step, "tokens": 160 * step, "epoch": 0}
    state = {
        "progress": progress | {"data": {"fingerprint": "abc123"}},
        "world_size": ranks,
        "zero_stage": 3,
        "parameters": parameter_shapes(model),
        "code": {"package": "0.1.0", "commit": "c0ffee", "dirty": False},
        "versions": {"torch": "2.0", "deepspeed": "0.19.8"},
    }
    buffers = dict(model.named_buffers())
    contents = {}
    for rank in range(ranks):
        flat = torch.cat([_share(tensor, rank, ranks) for tensor in weights.values()])
        shard = {"fp32_flat_groups": [flat], "partition_count": ranks}
        shard["optimizer_state_dict"] = {"state": {}}
        name = f"zero/zero_pp_rank_{rank}_mp_rank_00"
        contents[f"{name}_optim_states.pt"] = {"optimizer_state_dict": shard}
        shapes = {name: tensor.shape for name, tensor in weights.items()}
        part = {"module": buffers, "buffer_names": list(buffers), "param_shapes": [shapes]}
        contents[f"{name}_model_states.pt"] = part
    if average:
        pieces = {name: (0, tensor.flatten() + 1) for name, tensor in weights.items()}
        contents["average/rank_00000.pt"] = pieces
    records = []
    for name, content in contents.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        path = directory / name
        torch.save(content, buffer := io.BytesIO())
        records.append(write_hashed(directory, path, buffer.getbuffer()))
    for name, text in (("trainer.json", json.dumps(state)), ("config.yaml", to_yaml(config))):
        records.append(write_text(directory, directory / name, text))
    write_manifest(directory, records)


def _share(tensor, rank, ranks):
    """What a rank holds of a parameter: equal shares, the last padded."""
    held = math.ceil(tensor.numel() / ranks)
    padded = torch.full((held * ranks,), float("nan"))
    padded[: tensor.numel()] = tensor.flatten()
    return padded[held * rank : held * (rank + 1)]


def weights_of(step, **model):
    """The weights and buffers of a made checkpoint."""
    return build_model(ModelConfig(**(SIZES | model)), seed=step).state_dict()


def damage(directory: Path):
    """Change one byte of a checkpoint."""
    file = next(directory.glob("zero/*optim_states.pt"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
