"""Which visual tokens are kept, given what is kept already: coverages that compare tokens by their features."""

from __future__ import annotations

import torch
from gap_kernels import distinct_indices, greedy_indices, least_similar_indices, topk_indices
from torch import Tensor

from .rows import last_where, nan_last

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
    num_pivots = keep.clamp(max=PIVOTS) if isinstance(keep, Tensor) else min(keep, PIVOTS)
    ranked = nan_last(scores) if mask is None else last_where(~mask, scores)
    pivots = topk_indices(ranked, num_pivots, length=min(PIVOTS, length))
    return least_similar_indices(features, pivots, keep, mask=mask, length=length)


def distinct(scores: Tensor, features: Tensor, keep: int) -> Tensor:
    """Choose a half by score, and from the others remove what is most like another (VisPruner, arXiv 2412.01818).

    See `gap_kernels.distinct_indices`.

    Args:
        scores: [G, N] float32; NaN counts as -inf.
        features: [G, N, C]. A token with NaN or infinity is removed as the first of its half.
        keep: How many to choose, 0..N.

    Returns:
        [G, keep] int64, ascending.
    """
    given = {"important": keep // IMPORTANT_OF, "removed_at_once": REMOVED_AT_ONCE}
    return distinct_indices(features, nan_last(scores), keep, **given)
