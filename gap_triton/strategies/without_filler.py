"""The merges where every grid keeps equally many tokens and no index holds filler, in the fewest operations.

They give what `average`, `nearest`, `contextual` and `cluster` give, of the tokens that change alone: no row is kept that
has not taken others in. Nothing is checked, and no number is counted on the device that the host knows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from gap_kernels import topk_indices
from gap_kernels.blocks import row_blocks
from gap_kernels.precision import without_autocast
from torch import Tensor

from .merged import Merged
from .nearest import COLLECT_COUNT
from .rows import accumulation_dtype, rows_at


def best_first(scores: Tensor, count: int) -> Tensor:
    """Return the ``count`` best of ``scores`` [G, N] float32, best first: [G, count] int64.

    Ties go to the lower row, and NaN comes last. Of K + 1, the last one is the best of what is not among the K best.
    """
    return torch.sort(0.0 - scores, dim=1, stable=True).indices[:, :count]


def best_of_rest(scores: Tensor, kept: Tensor) -> Tensor:
    """Return the best-scored token of each grid that is not ``kept`` [G, K] int64: [G, 1] int64; NaN counts as -inf."""
    ranked = torch.nan_to_num(scores, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return topk_indices(ranked.scatter_(1, kept, torch.nan), 1)


@without_autocast
def average_of_rest(features: Tensor, kept: Tensor) -> Tensor:
    """Return the features of the token that `average` adds, [G, 1, C].

    Args:
        features: [G, N, C].
        kept: [G, K] int64, distinct, K < N.
    """
    is_kept = torch.zeros(features.shape[:2], dtype=torch.bool, device=features.device).scatter_(
        1, kept, True
    )
    # Not a product: features that are kept may be infinite or NaN.
    rest = features.masked_fill(is_kept[..., None], 0)
    total = rest.sum(1, keepdim=True, dtype=accumulation_dtype(features))
    mean = total.div_(features.shape[1] - kept.shape[1])
    return mean.to(features.dtype)


@without_autocast
def nearest_of_all(features: Tensor, keys: Tensor, scores: Tensor, kept: Tensor) -> Tensor:
    """Return the features of the tokens of `nearest`, each kept one with what it collects, and the one that is added.

    Args:
        features: [G, N, C].
        keys: [G, N, E].
        scores: [G, N] float32.
        kept: [G, K] int64, distinct, K < N - 1.

    Returns:
        [G, K + 1, C], the added one last.
    """
    num_rows, dtype = features.shape[1], accumulation_dtype(features)
    values = features.to(dtype)
    weights = torch.nan_to_num(scores, nan=0.0, posinf=0.0, neginf=0.0).to(dtype)[:, None]
    unit = F.normalize(keys.to(accumulation_dtype(keys)), dim=-1)
    most = min(COLLECT_COUNT, num_rows - 1)

    def collected(block: slice) -> Tensor:
        rows = kept[:, block]
        # A token does not collect itself, nor what it has no cosine to: both are NaN, which comes last.
        cosine = (rows_at(unit, rows) @ unit.transpose(1, 2)).float().scatter_(2, rows[..., None], torch.nan)
        best = topk_indices(cosine.flatten(0, 1), most).view(*rows.shape, most)
        near = torch.zeros_like(cosine, dtype=torch.bool).scatter_(2, best, True)
        shares = near.logical_and_(cosine == cosine) * weights
        return torch.baddbmm(rows_at(values, rows), shares, values)

    blocks = list(row_blocks(kept.shape[1], features.shape[0] * num_rows))
    parts = list(map(collected, blocks))
    parts.append(weights.scatter(2, kept[:, None], 0.0) @ values)
    return torch.cat(parts, dim=1).to(features.dtype)


@without_autocast
def contextual_of_rest(features: Tensor, keys: Tensor, kept: Tensor, count: int) -> Merged:
    """Return the contextual tokens of `contextual`.

    Args:
        features: [G, N, C].
        keys: [G, N, E].
        kept: [G, K] int64, the dominant tokens, distinct.
        count: Contextual tokens, 1..N - K.

    Returns:
        ``count`` tokens.
    """
    groups, num_rows, dtype = len(features), features.shape[1], accumulation_dtype(features)
    is_rest = features.new_ones(groups, num_rows, dtype=torch.float32).scatter_(1, kept, 0.0)
    num_rest = num_rows - kept.shape[1]
    rest = topk_indices(is_rest, num_rest)  # ascending
    stride = num_rest // count
    targets = slice(0, count * stride, stride)
    unit = F.normalize(rows_at(keys, rest).to(accumulation_dtype(keys)), dim=-1)
    values = rows_at(features, rest).to(dtype)
    target_units = unit[:, targets].transpose(1, 2)  # [G, E, M]
    goes_to = values.new_zeros(groups, num_rest, count)
    for block in row_blocks(num_rest, groups * count):
        cosine = (unit[:, block] @ target_units).float()
        best = topk_indices(cosine.flatten(0, 1), 1)
        goes_to[:, block].scatter_(2, best.view(groups, -1, 1), 1.0)
    goes_to[:, targets] = 0.0
    number = goes_to.sum(1)[..., None].clamp_(min=1.0)  # [G, M, 1]
    total = goes_to.transpose(1, 2) @ values
    return Merged(rest[:, targets], torch.addcdiv(values[:, targets], total, number).to(features.dtype))


@without_autocast
def means_of_all(features: Tensor, kept: Tensor, filler: Tensor | None = None) -> Tensor:
    """Return the features of the tokens of `cluster`, [G, K, C].

    Args:
        features: [G, N, C], N >= 1.
        kept: [G, K] int64, distinct.
        filler: [G, K] bool, True where nothing is kept; None = nowhere.
    """
    groups, num_rows, dtype = len(features), features.shape[1], accumulation_dtype(features)
    values = features.to(dtype)
    unit = F.normalize(values, dim=-1)
    target_units = rows_at(unit, kept).transpose(1, 2)  # [G, C, K]
    goes_to = values.new_zeros(groups, num_rows + 1, kept.shape[1])  # the last row takes filler
    for block in row_blocks(num_rows, groups * kept.shape[1]):
        cosine = (unit[:, block] @ target_units).float()
        if filler is not None:
            # What has no cosine to anything goes to what is kept all the same.
            cosine = torch.where(cosine.isnan(), -torch.inf, cosine).masked_fill(filler[:, None], torch.nan)
        best = topk_indices(cosine.flatten(0, 1), 1)
        goes_to[:, block].scatter_(2, best.view(*cosine.shape[:2], 1), 1.0)
    own = kept if filler is None else kept.masked_fill(filler, num_rows)
    goes_to = goes_to.scatter_(1, own[..., None].expand(-1, -1, kept.shape[1]), 0.0)[:, :-1]
    number = goes_to.sum(1)[..., None] + 1
    total = rows_at(values, kept) + goes_to.transpose(1, 2) @ values
    return (total / number).to(features.dtype)
