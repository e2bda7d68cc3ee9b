"""Turning queries and keys back in plain PyTorch: the definition that every other path must reproduce."""

from __future__ import annotations

import torch
from torch import Tensor


def unrotate(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, pairs: Tensor, rescale: bool
) -> tuple[Tensor, Tensor]:
    """Undo rotary embedding, see `gap_kernels.unrotate`.

    Args:
        query: [B, Hq, S, D].
        key: [B, Hkv, S, D].
        cos: [B or 1, S, F] or [A, B or 1, S, F].
        sin: The same.
        pairs: [2, D] int32.
        rescale: Whether the length of cos and sin is taken back.

    Returns:
        Query and key.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    other, column = pairs.long()
    turned = column >= 0
    cos, sin = (_by_channel(each.to(dtype), column.clamp(min=0)) for each in (cos, sin))  # [B or 1, 1, S, D]
    if rescale:
        length = cos.square() + sin.square()
        cos, sin = cos / length, sin / length
    # Backwards: the first of a pair gets its other one's share with a plus.
    first = other > torch.arange(len(other), device=other.device)
    sin = torch.where(first, sin, -sin)

    def back(vectors: Tensor) -> Tensor:
        exact = vectors.to(dtype)
        return torch.where(turned, exact * cos + exact[..., other] * sin, exact).to(vectors.dtype)

    return back(query), back(key)


def _by_channel(values: Tensor, column: Tensor) -> Tensor:
    """Return the ``column`` [D] of [B, S, F], or of all axes of [A, B, S, F] in a row, as [B, 1, S, D]."""
    if values.dim() == 4:
        values = values.movedim(0, 2).flatten(2)
    return values[..., column][:, None]
