"""Merging tokens by the cosines of their keys in plain PyTorch: the definition that every other path must reproduce."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..blocks import row_blocks
from ..select import reference as select_reference

NAN_COSINE, NO_TARGET = -2.0, -3.0
"""What ranks below every cosine: NaN, and below that filler."""


def collect_nearest(features: Tensor, keys: Tensor, weights: Tensor, kept: Tensor, count: int) -> Tensor:
    """Add to tokens those with the most similar keys, see `gap_kernels.collect_nearest`.

    Args:
        features: [B, N, C], N >= 1.
        keys: [B, N, E].
        weights: [B, N] float32.
        kept: [B, K] int64, -1 = filler.
        count: How many each takes in.

    Returns:
        [B, K + 1, C] in the dtype of ``features``.
    """
    num_rows, values, unit = features.shape[1], _accumulated(features), unit_vectors(keys)
    shares = torch.nan_to_num(weights, nan=0.0, posinf=0.0, neginf=0.0).to(values.dtype)[:, None]
    most = min(count, num_rows - 1)
    output = features.new_empty((features.shape[0], kept.shape[1] + 1, features.shape[2]))
    for block in row_blocks(kept.shape[1], features.shape[0] * num_rows):
        rows = kept[:, block].clamp(min=0)
        # A token does not take in itself, nor what it has no cosine to: both are NaN, which comes last.
        cosine = (rows_at(unit, rows) @ unit.transpose(1, 2)).float().scatter_(2, rows[..., None], torch.nan)
        best = select_reference.topk_indices(cosine.flatten(0, 1), most, None, most).view(*rows.shape, most)
        near = (
            torch.zeros_like(cosine, dtype=torch.bool).scatter_(2, best, True).logical_and_(cosine == cosine)
        )
        collected = torch.baddbmm(rows_at(values, rows), near * shares, values)
        output[:, : kept.shape[1]][:, block] = collected.masked_fill_(kept[:, block, None] < 0, 0.0)
    dropped = torch.where(_others(num_rows, kept)[:, None], shares, 0.0)
    output[:, -1:] = dropped @ values
    return output


def merge_nearest(
    features: Tensor, keys: Tensor, targets: Tensor, excluded: Tensor | None, average: bool
) -> Tensor:
    """Merge every token into the target with the most similar key, see `gap_kernels.merge_nearest`.

    Args:
        features: [B, N, C], N >= 1.
        keys: [B, N, E].
        targets: [B, M] int64, M >= 1, -1 = filler.
        excluded: [B, K] int64, -1 = filler; or None.
        average: A target is one of those that are averaged.

    Returns:
        [B, M, C] in the dtype of ``features``.
    """
    groups, num_targets = targets.shape
    num_rows, unit, dtype = features.shape[1], unit_vectors(keys), accumulation_dtype(features)
    rows, filler = targets.clamp(min=0), targets < 0
    target_units = rows_at(unit, rows).transpose(1, 2)  # [B, E, M]
    merged = _others(num_rows, targets if excluded is None else torch.cat([targets, excluded], dim=1))
    total = torch.zeros((groups, num_targets, features.shape[2]), dtype=dtype, device=features.device)
    number = torch.zeros((groups, num_targets), dtype=dtype, device=features.device)
    for block in row_blocks(num_rows, groups * num_targets):
        cosine = (unit[:, block] @ target_units).float()  # [B, n, M]
        cosine = torch.where(cosine.isnan(), NAN_COSINE, cosine).masked_fill_(filler[:, None], NO_TARGET)
        best = cosine.argmax(2, keepdim=True)  # the first of equal ones
        goes_to = torch.zeros_like(cosine, dtype=dtype).scatter_(2, best, merged[:, block, None].to(dtype))
        total.baddbmm_(goes_to.transpose(1, 2), features[:, block].to(dtype))
        number += goes_to.sum(1)
    own = rows_at(features, rows).to(dtype)
    if average:
        total, number = total.add_(own), number.add_(1.0)
    mean = total / number.clamp_(min=1.0)[..., None]
    result = mean if average else mean.add_(own)
    return result.masked_fill_(filler[..., None], 0.0).to(features.dtype)


def accumulation_dtype(features: Tensor) -> torch.dtype:
    """Return what sums over features are computed in: float64 for float64, else float32."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def _accumulated(features: Tensor) -> Tensor:
    return features.to(accumulation_dtype(features))


def unit_vectors(keys: Tensor) -> Tensor:
    """Return vectors [B, N, E] with length 1, or 0, in the dtype of sums; those with NaN or infinity have no cosine."""
    return F.normalize(_accumulated(keys), dim=-1)


def rows_at(tensor: Tensor, index: Tensor) -> Tensor:
    """Gather [B, N, C] at [B, K] int64, which holds no filler, into [B, K, C]."""
    return tensor.gather(1, index[..., None].expand(-1, -1, tensor.shape[2]))


def _others(num_rows: int, index: Tensor) -> Tensor:
    """Return [B, N] bool, the tokens that are not in ``index`` [B, K] int64, -1 = filler."""
    others = torch.ones((index.shape[0], num_rows + 1), dtype=torch.bool, device=index.device)
    # One more column takes the filler.
    return others.scatter_(1, index.where(index >= 0, num_rows), False)[:, :num_rows]
