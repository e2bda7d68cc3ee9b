"""SparseVLM's raters in plain PyTorch: the definition that every other path must reproduce."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..blocks import row_blocks


def text_raters(embeds: Tensor, visual_index: Tensor, text_rows: Tensor) -> Tensor:
    """Find the rows of text that may judge an image, see `gap_kernels.text_raters`.

    Args:
        embeds: [B, Q, C].
        visual_index: [B, V] int64, -1 = filler.
        text_rows: [B, R] int64, -1 = filler.

    Returns:
        [B, Q] bool.
    """
    length = embeds.shape[1]

    def at(rows: Tensor) -> Tensor:
        return embeds.gather(1, rows.clamp(min=0)[..., None].expand(-1, -1, embeds.shape[2]))

    is_text = text_rows >= 0
    rates = raters(at(visual_index), visual_index >= 0, at(text_rows), is_text)
    found = torch.zeros(embeds.shape[0], length + 1, dtype=torch.bool, device=embeds.device)
    return found.scatter_(1, torch.where(rates, text_rows, length), True)[:, :-1].contiguous()


def raters(visual: Tensor, visual_mask: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
    """Return which text tokens are relevant to the visual ones.

    Args:
        visual: [B, V, C].
        visual_mask: [B, V] bool, False at filler.
        text: [B, R, C].
        text_mask: [B, R] bool, False at filler.

    Returns:
        [B, R] bool.
    """
    dtype = torch.float64 if visual.dtype == torch.float64 else torch.float32
    words = torch.where(text_mask[..., None], text.to(dtype), 0)
    patches = torch.where(visual_mask[..., None], visual.to(dtype), 0)

    def shares(block: slice) -> Tensor:  # [B, R], summed over a block of the visual tokens
        product = patches[:, block] @ words.transpose(1, 2)
        return product.masked_fill(~text_mask[:, None], -torch.inf).softmax(-1).sum(1)

    # A sum is enough: all text tokens of a sample are divided by the same number of visual ones. What is masked is a row
    # of zeros and adds the same to each.
    relevance = functools.reduce(Tensor.add_, map(shares, row_blocks(patches.shape[1], text_mask.numel())))
    mean = torch.where(text_mask, relevance, 0).sum(1) / text_mask.sum(1).clamp(min=1)
    is_rater = text_mask & (relevance >= mean[:, None])
    return torch.where(is_rater.any(1, keepdim=True), is_rater, text_mask)
