"""The cosine to the text in plain PyTorch: the definition that every other path must reproduce."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def text_cosine(embeds: Tensor, visual_index: Tensor, text_rows: Tensor) -> Tensor:
    """Compare visual tokens with the text, see `gap_kernels.text_cosine`.

    Args:
        embeds: [B, Q, C].
        visual_index: [B, V] int64, -1 = filler.
        text_rows: [B, R] int64, -1 = filler.

    Returns:
        [B, V] float32; 0 at filler.
    """

    if not embeds.shape[1]:
        return embeds.new_zeros(visual_index.shape, dtype=torch.float32)

    def at(rows: Tensor) -> Tensor:
        return embeds.gather(1, rows.clamp(min=0)[..., None].expand(-1, -1, embeds.shape[2]))

    text = torch.where((text_rows >= 0)[..., None], at(text_rows), 0)
    return cosine_to_sum(at(visual_index), text).masked_fill_(visual_index < 0, 0.0)


def cosine_to_sum(visual: Tensor, text: Tensor) -> Tensor:
    """Return the cosine of each vector to the sum of others, which has the direction of their mean.

    Args:
        visual: [B, V, C].
        text: [B, R, C], 0 at filler.

    Returns:
        [B, V] float32, computed in that (float64 where ``visual`` is).
    """
    dtype = torch.float64 if visual.dtype == torch.float64 else torch.float32
    direction = F.normalize(text.sum(1, dtype=dtype), dim=-1)[..., None]  # [B, C, 1]
    return (F.normalize(visual.to(dtype), dim=-1) @ direction)[..., 0].float()
