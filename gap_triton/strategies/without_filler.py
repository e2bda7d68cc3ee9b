"""The merges where every grid keeps equally many tokens and no index holds filler, in the fewest operations.

They give what `average` and `contextual` give, of the tokens that change alone: no row is kept that has not taken others in.
Nothing is checked, and no number is counted on the device that the host knows.
"""

from __future__ import annotations

import torch
from gap_kernels import merge_nearest, topk_indices
from gap_kernels.precision import without_autocast
from torch import Tensor

from .merged import Merged
from .rows import accumulation_dtype, nan_last


def best_first(scores: Tensor, count: int) -> Tensor:
    """Return the ``count`` best of ``scores`` [G, N] float32, best first: [G, count] int64.

    Ties go to the lower row, and NaN comes last. Of K + 1, the last one is the best of what is not among the K best.
    """
    return torch.sort(0.0 - scores, dim=1, stable=True).indices[:, :count]


def best_of_rest(scores: Tensor, kept: Tensor) -> Tensor:
    """Return the best-scored token of each grid that is not ``kept`` [G, K] int64: [G, 1] int64; NaN counts as -inf."""
    return topk_indices(nan_last(scores).scatter_(1, kept, torch.nan), 1)


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


def rest_of(kept: Tensor, num_rows: int) -> Tensor:
    """Return the rows that are not ``kept`` [G, K] int64: [G, ``num_rows`` - K] int64, ascending."""
    is_rest = torch.ones((len(kept), num_rows), dtype=torch.float32, device=kept.device).scatter_(
        1, kept, 0.0
    )
    return topk_indices(is_rest, num_rows - kept.shape[1])


def contextual_of_rest(features: Tensor, keys: Tensor, kept: Tensor, rest: Tensor, count: int) -> Merged:
    """Return the contextual tokens of `contextual`.

    Args:
        features: [G, N, C].
        keys: [G, N, E].
        kept: [G, K] int64, the dominant tokens, distinct.
        rest: [G, N - K] int64, the others, ascending.
        count: Contextual tokens, 1..N - K.

    Returns:
        ``count`` tokens.
    """
    stride = rest.shape[1] // count
    targets = rest[:, : count * stride : stride]
    return Merged(targets, merge_nearest(features, keys, targets, excluded=kept))
