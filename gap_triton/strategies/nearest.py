"""PruMerge's merge (arXiv 2403.15388): each kept token collects those with the most similar keys."""

from __future__ import annotations

import torch
from gap_kernels import collect_nearest
from gap_kernels.precision import without_autocast
from torch import Tensor

from .merged import Merged, assemble, check_merge
from .rows import best_of, gather_rows, members

COLLECT_COUNT = 32
"""How many tokens each kept one collects."""


@without_autocast
def nearest(features: Tensor, keys: Tensor, scores: Tensor, kept: Tensor) -> Merged:
    """Add to each kept token the tokens with the most similar keys, and what is dropped as one more token.

    With ``a`` the scores, a kept token ``i`` becomes ``x_i + sum of a_j x_j`` over the ``COLLECT_COUNT`` other tokens whose
    keys have the largest cosine to its own, and the one more token is ``sum of a_j x_j`` over all dropped ones. It gets
    the row of the best-scored dropped token.

    This is what the released code does. The paper's abstract describes merging the pruned tokens with the others; in the
    code a token collects from all others, kept ones too. Nothing is divided by the sum of the weights, which are attention
    and add up to 1 at most. Where we differ: the code puts the tokens in order of score, the one more last, and renumbers
    them; and its ``a`` is the attention of the CLS row at the tower's last layer, with all heads taken as one, here it is
    what the caller scores by.

    Args:
        features: [G, N, C] float32, float16, bfloat16 or float64.
        keys: [G, N, E], any of those dtypes: keys of the scoring layer, all heads together.
        scores: [G, N] float32. NaN counts as -inf in the order. As weights, scores that aren't finite count as 0.
        kept: [G, K] int64, the tokens that collect, distinct; -1 = filler. To end with ``keep`` tokens, choose
            ``keep - 1``.

    Returns:
        K + 1 tokens, computed in float32 (float64 for float64). Where at most one token is dropped, so with
        ``keep = N``, there is nothing to make up for: all N tokens are returned unchanged, which the released code
        doesn't do. Equal cosines go to the lower row. A token whose key holds NaN collects nothing and is not collected.
        NaN or infinity in ``features`` spoils its channel in what takes it in, and may spoil it in all tokens of its grid.

    Raises:
        ValueError: If an argument has another shape, dtype or device than stated; on the CPU also for rows out of range
            or repeated.
    """
    check_merge(features, {"kept": kept}, keys=keys, scores=scores)
    num_rows = features.shape[1]
    merged = collect_nearest(features, keys, scores, kept, COLLECT_COUNT)
    dropped = ~members(kept, num_rows)
    added = best_of(scores, dropped, dropped.sum(1).clamp(max=1), length=1)
    unchanged = (dropped.sum(1) <= 1)[:, None, None]
    own = gather_rows(features, torch.cat([kept, added], dim=1))
    both = torch.where(unchanged, own, merged)
    return assemble(kept, both[:, :-1], added, both[:, -1:])
