"""Selection by similarity in plain PyTorch: the definition that every other path must reproduce."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import blocks
from ..merge.reference import rows_at, unit_vectors
from ..select.reference import best_first, topk_indices


def distinct_indices(
    features: Tensor, scores: Tensor, k: int, important: int, removed_at_once: int
) -> Tensor:
    """Choose by score, and others among which duplicates are removed, see `gap_kernels.distinct_indices`.

    Args:
        features: [B, N, C].
        scores: [B, N] float32.
        k: How many to choose.
        important: How many of these by score.
        removed_at_once: How many are removed before the next are compared.

    Returns:
        [B, k] int64, ascending.
    """
    order = best_first(scores)
    best, others, wanted = order[:, :important], order[:, important:], k - important
    if wanted and others.numel():
        others = _without_duplicates(unit_vectors(features), others, wanted, removed_at_once)
    return torch.cat([best, others[:, :wanted]], dim=1).sort(dim=1).values


def _without_duplicates(unit: Tensor, tokens: Tensor, wanted: int, at_once: int) -> Tensor:
    """Remove duplicates among ``tokens`` [B, M] until ``wanted`` are left, [B, wanted].

    As soon as the cosines of all pairs that are left fit a block, they are computed once; before, in every step those that
    it needs, block by block.
    """
    batch, cosine = len(tokens), None
    place = torch.arange(tokens.shape[1], device=tokens.device).expand(batch, -1)
    while place.shape[1] > wanted:
        count = place.shape[1]
        if cosine is None and batch * count * count <= blocks.BLOCK_ELEMENTS:
            tokens = tokens.gather(1, place)
            place = torch.arange(count, device=tokens.device).expand(batch, -1)
            rows = rows_at(unit, tokens)
            cosine = _or_least(rows @ rows.transpose(1, 2))
        first, second = place[:, ::2], place[:, 1::2]
        removed = min(at_once, count - wanted, first.shape[1])
        if cosine is None:
            alike = _most_alike(unit, tokens.gather(1, first), tokens.gather(1, second))
        else:
            # Sample by sample: this takes a quarter of the time of gathering from all on a CPU.
            pairs = zip(cosine, first, second, strict=True)
            alike = torch.stack([each[own].index_select(1, other).amax(1) for each, own, other in pairs])
        alike = torch.where(alike == -math.inf, math.inf, alike)  # like nothing, as it is spoiled
        left = alike.argsort(dim=1, descending=True, stable=True)[:, removed:]
        place = torch.cat([first.gather(1, left), second], dim=1)
    return tokens.gather(1, place)


def _most_alike(unit: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return the largest cosine of each of some tokens [B, F] to others [B, S]: [B, F]."""
    alike = unit.new_empty(first.shape)
    others = rows_at(unit, second).transpose(1, 2)
    for block in blocks.row_blocks(first.shape[1], second.numel()):
        alike[:, block] = _or_least(rows_at(unit, first[:, block]) @ others).amax(2)
    return alike


def _or_least(cosine: Tensor) -> Tensor:
    """Return cosines with -inf in the place of NaN, in their memory."""
    return cosine.nan_to_num_(nan=-math.inf)


def least_similar_indices(
    features: Tensor, pivots: Tensor, mask: Tensor | None, k: int, counts: Tensor | None, length: int
) -> Tensor:
    """Choose for each pivot in turn what is least like it, see `gap_kernels.least_similar_indices`.

    Args:
        features: [B, N, C], N >= 1.
        pivots: [B, P] int64, P >= 1, -1 = filler.
        mask: [B, N] bool, or None.
        k: How many to choose in every sample; unused where ``counts`` is given.
        counts: [B] int64 or None.
        length: Columns of the result.

    Returns:
        [B, length] int64, ascending in each row, filled with -1 on the left.
    """
    num_tokens, unit, rows = features.shape[1], unit_vectors(features), pivots.clamp(min=0)
    cosine = (rows_at(unit, rows) @ unit.transpose(1, 2)).float()  # [B, P, N]
    distance = torch.where(cosine.isnan(), -math.inf, -cosine)
    real = torch.ones_like(distance[:, 0], dtype=torch.bool) if mask is None else mask
    wanted = real.sum(1).clamp(max=min(k if counts is None else num_tokens, length))
    if counts is not None:
        wanted = torch.minimum(wanted, counts)
    is_pivot = (pivots >= 0) & real.gather(1, rows)
    number = is_pivot.cumsum(1)
    is_pivot &= number <= wanted[:, None]
    total = is_pivot.sum(1)
    # One more column takes what is no pivot. What is hidden counts as taken until the end.
    taken = torch.nn.functional.pad(~real, (0, 1))
    taken.scatter_(1, torch.where(is_pivot, pivots, num_tokens), True)
    taken = taken[:, :num_tokens]
    rest, before = wanted - total, torch.zeros_like(wanted)
    rank = torch.arange(num_tokens, device=features.device)
    for slot in range(pivots.shape[1]):
        until = torch.where(is_pivot[:, slot], rest * number[:, slot] // total.clamp(min=1), before)
        order = best_first(torch.where(taken, torch.nan, distance[:, slot]))  # what is taken comes last
        share = rank < (until - before)[:, None]
        taken = taken | torch.zeros_like(taken).scatter_(1, order, share)
        before = until
    return topk_indices((taken & real).float(), 0, (taken & real).sum(1), length)
