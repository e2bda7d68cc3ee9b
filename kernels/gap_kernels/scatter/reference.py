"""Putting rows among others in plain PyTorch: the definition that every other path must reproduce."""

from __future__ import annotations

import torch
from torch import Tensor


def scatter_rows(
    values: Tensor, index: Tensor, num_rows: int, among: Tensor | None, base: Tensor | None
) -> Tensor:
    """Put vectors at the places of an index, see `gap_kernels.scatter_rows`.

    Args:
        values: [B, L, C].
        index: [B, L] int64, -1 = filler.
        num_rows: Q.
        among: [B, S] int64, -1 = filler; or None.
        base: [B, Q, C] or None.

    Returns:
        [B, Q, C] in the dtype of ``values``.
    """
    batch, _, channels = values.shape
    total = batch * num_rows
    # One row more than there are takes the filler.
    output = values.new_zeros(total + 1, channels) if base is None else values.new_empty(total + 1, channels)
    result = output[:total].view(batch, num_rows, channels)
    if base is not None:
        result.copy_(base)
    place = places_of(index, among)
    start = torch.arange(batch, device=index.device)[:, None] * num_rows
    output.index_copy_(0, torch.where(place < 0, total, place + start).flatten(), values.flatten(0, 1))
    return result


def places_of(index: Tensor, among: Tensor | None) -> Tensor:
    """Return the rows of the result [B, L] that ``index`` [B, L] names among ``among`` [B, S]; -1 = none."""
    if among is None:
        return index
    if not among.shape[1]:
        return torch.full_like(index, -1)
    return torch.where(index < 0, -1, among.gather(1, index.clamp(min=0)))
