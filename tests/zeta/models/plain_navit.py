"""NaViT written a second time, plainly, one image at a time: what zeta is tested against."""

import math

import torch
from torch.nn import functional as F


def layer_norm(x, weight):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def table_row(table, i, n):
    """The i-th of n samples of a table, as F.interpolate(mode="linear") takes them."""
    length = table.shape[0]
    u = min(max((i + 0.5) * length / n - 0.5, 0), length - 1)
    low = min(int(u), length - 2) if length > 1 else 0
    high = min(low + 1, length - 1)
    return table[low] * (1 - (u - low)) + table[high] * (u - low)


def split_heads(x, heads):
    return x.reshape(x.shape[0], heads, -1).permute(1, 0, 2)


def attention(q, k, v):
    weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)
    return (weights @ v).permute(1, 0, 2).flatten(1)


def features(w, image, patch_size, heads, depth, aspect=False):
    """Tokens of one normalised float image [c, H, W] after the last norm."""
    h, width = image.shape[1] // patch_size, image.shape[2] // patch_size
    tokens = []
    for y in range(h):
        for x in range(width):
            rows = slice(y * patch_size, (y + 1) * patch_size)
            columns = slice(x * patch_size, (x + 1) * patch_size)
            patch = image[:, rows, columns].permute(1, 2, 0).flatten()
            ny, nx = (max(h, width),) * 2 if aspect else (h, width)
            position = table_row(w["embeds.pos_embed_y"][0], y, ny)
            position = position + table_row(w["embeds.pos_embed_x"][0], x, nx)
            tokens.append(F.linear(patch, w["embeds.proj.weight"]) + position)
    x = torch.stack(tokens)
    for i in range(depth):
        b = f"blocks.{i}."
        normed = layer_norm(x, w[b + "norm1.weight"])
        q, k, v = F.linear(normed, w[b + "attn.qkv.weight"]).chunk(3, dim=-1)
        q, k, v = (split_heads(t, heads) for t in (q, k, v))
        q = layer_norm(q, w[b + "attn.q_norm.weight"])
        k = layer_norm(k, w[b + "attn.k_norm.weight"])
        x = x + F.linear(attention(q, k, v), w[b + "attn.proj.weight"])
        hidden = gelu(F.linear(layer_norm(x, w[b + "norm2.weight"]), w[b + "mlp.fc1.weight"]))
        x = x + F.linear(hidden, w[b + "mlp.fc2.weight"])
    return layer_norm(x, w["norm.weight"])


def logits(w, image, patch_size, heads, depth, aspect=False):
    """Class logits [K] of one normalised float image [c, H, W]."""
    x = features(w, image, patch_size, heads, depth, aspect)
    p = "attn_pool."
    q = F.linear(w[p + "latent"][0], w[p + "q.weight"])
    k, v = F.linear(x, w[p + "kv.weight"]).chunk(2, dim=-1)
    pooled = attention(*(split_heads(t, heads) for t in (q, k, v)))
    pooled = F.linear(pooled, w[p + "proj.weight"])
    hidden = gelu(F.linear(layer_norm(pooled, w[p + "norm.weight"]), w[p + "mlp.fc1.weight"]))
    pooled = pooled + F.linear(hidden, w[p + "mlp.fc2.weight"])
    return F.linear(pooled, w["head.weight"], w["head.bias"])[0]
