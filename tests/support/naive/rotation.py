"""Rotary embedding, one pair of channels after another."""

from __future__ import annotations

import torch
from torch import Tensor


def pairs_of(head_dim: int, turned: int, interleaved: bool, axes: int = 1) -> Tensor:
    """[2, D] int32 for RoPE on the first ``turned`` channels, of halves or of neighbours; axes take turns."""
    rows = [[channel, -1] for channel in range(head_dim)]
    half = turned // 2
    for pair in range(half):
        first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half)
        column = pair % axes * turned + pair
        rows[first], rows[second] = [second, column], [first, column]
    return torch.tensor(rows, dtype=torch.int32).view(head_dim, 2).T.contiguous()


def rotated(vectors: Tensor, cos: Tensor, sin: Tensor, pairs: Tensor) -> Tensor:
    """What RoPE makes of [B, H, S, D], in float64."""
    cos, sin = (each if each.dim() == 4 else each[None] for each in (cos.double(), sin.double()))
    result, batch = vectors.double().clone(), len(vectors)
    for first, (second, column) in enumerate(pairs.T.tolist()):
        if column < 0 or second < first:
            continue
        axis, column = divmod(column, cos.shape[3])
        c, s = (each[axis, :, :, column].expand(batch, -1)[:, None] for each in (cos, sin))
        x, y = vectors[..., first].double(), vectors[..., second].double()
        result[..., first], result[..., second] = x * c - y * s, y * c + x * s
    return result
