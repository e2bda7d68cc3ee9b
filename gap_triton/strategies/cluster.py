"""VScan's merge (arXiv 2505.22654): each dropped token goes into the kept one that is most like it."""

from __future__ import annotations

import torch
from torch import Tensor

from .merged import Merged, check_merge
from .without_filler import means_of_all


def cluster(features: Tensor, kept: Tensor) -> Merged:
    """Make each kept token the mean of itself and of the dropped tokens to which no other kept one has a larger cosine.

    Paper and released code agree, but for the order of the tokens, which here is that of their rows.

    Args:
        features: [G, N, C] float32, float16, bfloat16 or float64, as the decoder gets them.
        kept: [G, K] int64, the rows that are kept, distinct; -1 = filler.

    Returns:
        K tokens, computed in float32 (float64 for float64). One that nothing goes to keeps its features. Equal cosines go
        to the lower row, and so does a token with NaN among its features, which spoils its channel in its grid, as in any
        matrix product.

    Raises:
        ValueError: If an argument has another shape, dtype or device than stated; on the CPU also for rows out of range
            or repeated.
    """
    check_merge(features, {"kept": kept})
    kept = kept.sort(dim=1).values
    if not features.shape[1] or not kept.shape[1]:
        return Merged(kept, features.new_zeros(*kept.shape, features.shape[2]))
    filler = kept < 0
    means = means_of_all(features, kept.clamp(min=0), filler)
    return Merged(kept, torch.where(filler[..., None], 0, means))
