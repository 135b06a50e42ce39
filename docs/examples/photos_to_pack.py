"""Embed a folder of photos, and draw the first pack that they make.

    python docs/examples/photos_to_pack.py photos out

`photos` has one folder for each class; `out` gets `embeddings.npy`, `keys.txt` and `pack.svg`.
The weights are random here: put `NaViT.from_pretrained("exports/first")` in their place.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from data_pipeline import DataConfig, PackLoader, Plan, ResolutionConfig, build_shards
from launch.report.first_pack import first_pack_picture
from launch.report.pack_picture import draw_pack
from zeta import NaViT

photos, out = Path(sys.argv[1]), Path(sys.argv[2])
manifest = build_shards(str(photos), out / "shards")
config = DataConfig(
    token_budget=1024,
    resolution=ResolutionConfig(max=160),  # native sizes, a side of 160 pixels at most
    patch_size=16,
    cost_dim=192,
    workers=0,
)
plan = Plan(manifest, config, num_lanes=1, max_epochs=1)
model = NaViT(
    image_size=160, patch_size=16, num_classes=1, dim=192, depth=4, heads=3, mlp_dim=768
).eval()

keys, embeddings = [], []
for step in PackLoader(plan).steps(None):
    for pack in step.packs:
        with torch.inference_mode():
            pooled = model.forward_embeddings(pack)  # [images of the pack, dim]
        embeddings.append(pooled[pack.weights > 0].numpy())
        keys += [key for key, weight in zip(pack.keys, pack.weights, strict=False) if weight > 0]
    if not step.more:
        break

np.save(out / "embeddings.npy", np.concatenate(embeddings))
(out / "keys.txt").write_text("".join(f"{key}\n" for key in keys))
(out / "pack.svg").write_bytes(draw_pack(first_pack_picture(plan, lane=0)))
print(f"{len(keys)} images embedded, {out}/pack.svg drawn")
