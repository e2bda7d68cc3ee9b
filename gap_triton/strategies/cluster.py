"""VScan's merge (arXiv 2505.22654): each dropped token goes into the kept one that is most like it."""

from __future__ import annotations

from gap_kernels import merge_nearest
from torch import Tensor

from .merged import Merged, check_merge


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
    return Merged(kept, merge_nearest(features, features, kept, average=True))
