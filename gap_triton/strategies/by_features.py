"""Which visual tokens are kept, given what is kept already: coverages that compare tokens by their features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from gap_kernels import greedy_indices, topk_indices
from gap_kernels.precision import without_autocast
from torch import Tensor

from .rows import accumulation_dtype, last_where, rows_at
from .without_filler import best_first

GREEDY = ("max_min", "determinant", "coverage_gain")
"""Rules of `gap_kernels.greedy_indices`."""
WEIGHTED = ("determinant", "coverage_gain")
"""Those that weigh by the score."""
BY_FEATURES = (*GREEDY, "least_similar", "distinct")

SCALE_EPSILON = 1e-6
"""What CDPruner adds to a score that is scaled, so that the least relevant token has a weight."""
PIVOTS = 4
"""Tokens that DART compares all others with: `pivot_image_token` of its released scripts."""
IMPORTANT_OF = 2
"""VisPruner takes one in so many of the tokens kept by their scores: `important_ratio` 0.5 of its released example."""
REMOVED_AT_ONCE = 8
"""Duplicates that VisPruner removes before it looks for the next, as its code does."""


def choose_greedily(
    scores: Tensor,
    features: Tensor,
    keep: int | Tensor,
    coverage: str,
    *,
    exponent: float = 1.0,
    mask: Tensor | None = None,
    length: int | None = None,
) -> Tensor:
    """Choose one token after another, by what each adds to those chosen before: a rule of `gap_kernels.greedy_indices`.

    ``"max_min"`` is DivPrune's (arXiv 2503.02175), ``"determinant"`` CDPruner's (arXiv 2506.10967) and ``"coverage_gain"``
    SCOPE's (arXiv 2510.24214).

    Args:
        scores: [G, N] float32. By ``"max_min"`` they play no part; by ``"determinant"`` each row is scaled to 0..1, as
            CDPruner scales its relevance; by ``"coverage_gain"`` a row with scores below 0 is moved so that its least is 0.
        features: [G, N, C].
        keep: How many to choose, an int or [G] int64.
        coverage: Of `GREEDY`.
        exponent: Power of what the scores become so.
        mask: [G, N] bool, True = a real token; None = all are.
        length: Columns of the result.

    Returns:
        [G, length] int64, ascending, filled with -1 on the left.
    """
    weights = None
    if coverage == "determinant":
        weights = _scaled(scores, mask)
    elif coverage == "coverage_gain":
        least = torch.nan_to_num(scores, nan=0.0, posinf=0.0, neginf=0.0).amin(1, keepdim=True)
        weights = scores - least.clamp(max=0.0)
    given = {"scores": weights, "exponent": exponent, "mask": mask, "length": length}
    return greedy_indices(features, keep, coverage, **given)  # type: ignore[arg-type]


def _scaled(scores: Tensor, mask: Tensor | None) -> Tensor:
    """[G, N] float32 in 0..1, of the finite scores of each row; what is infinite or NaN stays so."""
    real = scores if mask is None else torch.where(mask, scores, torch.nan)
    inf = torch.inf
    least = torch.nan_to_num(real, nan=inf, posinf=inf, neginf=inf).amin(1, keepdim=True)
    most = torch.nan_to_num(real, nan=-inf, posinf=-inf, neginf=-inf).amax(1, keepdim=True)
    return (scores - least + SCALE_EPSILON) / (most - least).clamp(min=SCALE_EPSILON)


@without_autocast
def least_similar(
    scores: Tensor,
    features: Tensor,
    keep: int | Tensor,
    *,
    mask: Tensor | None = None,
    length: int,
) -> Tensor:
    """Choose pivots by score, then for each pivot in turn the tokens that are least like it (DART, arXiv 2502.11494).

    Pivots are the `PIVOTS` best-scored tokens, in ascending order; the others are shared by them, as equally as can be.

    Args:
        scores: [G, N] float32; NaN counts as -inf.
        features: [G, N, C]. A token with NaN or infinity is as like a pivot as nothing else is.
        keep: How many to choose, an int or [G] int64.
        mask: [G, N] bool, True = a real token; None = all are.
        length: Columns of the result.

    Returns:
        [G, length] int64, ascending, filled with -1 on the left.
    """
    if mask is None and not isinstance(keep, Tensor):
        index = _least_similar_of_all(scores, features, keep)
        return F.pad(index, (length - keep, 0), value=-1) if length > keep else index
    most = min(PIVOTS, length)
    num_pivots = keep.clamp(max=PIVOTS) if isinstance(keep, Tensor) else min(keep, PIVOTS)
    scores = (
        last_where(~mask, scores) if mask is not None else torch.where(scores.isnan(), -torch.inf, scores)
    )
    pivots = topk_indices(scores, num_pivots, length=most)
    unit = F.normalize(features.to(accumulation_dtype(features)), dim=-1)
    # Where there are fewer pivots, what stands for them is used for nothing: no other token is chosen.
    cosine = unit @ rows_at(unit, pivots.clamp(min=0)).transpose(1, 2)
    distance = torch.where(cosine.isnan(), -torch.inf, -cosine.float())
    if mask is not None:
        distance = torch.where(mask[..., None], distance, torch.nan)
    # One more row takes the filler.
    distance = F.pad(distance, (0, 0, 0, 1), value=torch.nan)
    chosen, rest = [pivots], keep - num_pivots
    for number in range(most):
        taken = chosen[-1].where(chosen[-1] >= 0, scores.shape[1])
        distance.scatter_(1, taken[..., None].expand(-1, -1, most), torch.nan)
        share = rest * (number + 1) // most - rest * number // most
        width = -(-(length - most) // most) if isinstance(share, Tensor) else share
        chosen.append(topk_indices(distance[:, :-1, number].contiguous(), share, length=width))
    index = torch.cat(chosen, dim=1).sort(dim=1).values  # filler first
    return F.pad(index, (length - index.shape[1], 0), value=-1)


def _least_similar_of_all(scores: Tensor, features: Tensor, keep: int) -> Tensor:
    """Choose as `least_similar` does, the same number of every row and without filler: [G, keep] int64."""
    num_pivots = min(keep, PIVOTS)
    ranked = torch.nan_to_num(scores, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    chosen, rest = [topk_indices(ranked, num_pivots)], keep - num_pivots
    if rest:
        unit = F.normalize(features.to(accumulation_dtype(features)), dim=-1)
        cosine = (rows_at(unit, chosen[0]) @ unit.transpose(1, 2)).float()
        distance = torch.nan_to_num(-cosine, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)  # [G, P, N]
        for number in range(num_pivots):
            distance.scatter_(2, chosen[-1][:, None].expand(-1, num_pivots, -1), torch.nan)  # comes last
            share = rest * (number + 1) // num_pivots - rest * number // num_pivots
            chosen.append(topk_indices(distance[:, number], share))
    return torch.cat(chosen, dim=1).sort(dim=1).values


@without_autocast
def distinct(scores: Tensor, features: Tensor, keep: int) -> Tensor:
    """Choose a half by score, and from the others remove what is most like another (VisPruner, arXiv 2412.01818).

    In order of their scores, the others are dealt into two halves. Of the first, those with the largest cosine to any token
    of the second are removed, up to `REMOVED_AT_ONCE`; what is left is dealt again, until as many are left as are wanted.

    Args:
        scores: [G, N] float32, none of them NaN.
        features: [G, N, C]. A token with NaN or infinity is removed as the first of its half.
        keep: How many to choose, 0..N.

    Returns:
        [G, keep] int64, ascending.
    """
    best = keep // IMPORTANT_OF
    order = best_first(scores, scores.shape[1])
    others, wanted = order[:, best:], keep - best
    unit = F.normalize(features.to(accumulation_dtype(features)), dim=-1)
    fine = unit.isfinite().all(-1, keepdim=True)
    unit = torch.where(fine, unit, 0.0)
    spoiled = torch.where(fine[..., 0], 0.0, torch.inf)
    while wanted and others.shape[1] > wanted:
        first, second = others[:, ::2], others[:, 1::2]
        removed = min(REMOVED_AT_ONCE, others.shape[1] - wanted, first.shape[1])
        cosine = (rows_at(unit, first) @ rows_at(unit, second).transpose(1, 2)).amax(2)
        alike = cosine + spoiled.gather(1, first)
        left = alike.argsort(dim=1, descending=True, stable=True)[:, removed:]
        others = torch.cat([first.gather(1, left), second], dim=1)
    return torch.cat([order[:, :best], others[:, :wanted]], dim=1).sort(dim=1).values
