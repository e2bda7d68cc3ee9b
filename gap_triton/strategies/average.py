"""TRIM's merge (arXiv 2409.10994): what is dropped becomes one token, its mean."""

from __future__ import annotations

import torch
from gap_kernels.precision import without_autocast
from torch import Tensor

from .merged import Merged, assemble, check_merge
from .rows import accumulation_dtype, best_of, gather_rows, members


@without_autocast
def average(features: Tensor, scores: Tensor, kept: Tensor) -> Merged:
    """Add the mean of all dropped tokens' features as one more token.

    It gets the row of the best-scored dropped token. The paper and the released code agree on the mean; the code puts it
    after the kept tokens, with the next position.

    Args:
        features: [G, N, C] float32, float16, bfloat16 or float64.
        scores: [G, N] float32. NaN counts as -inf.
        kept: [G, K] int64, the rows that are kept as they are, distinct; -1 = filler. To end with ``keep`` tokens,
            choose ``keep - 1``.

    Returns:
        K + 1 tokens. Where every token is kept, none is added (one more filler). With ``keep = N`` one token is
        dropped, and its mean is itself: nothing changes. The mean is computed in float32 (float64 for float64).

    Raises:
        ValueError: If an argument has another shape, dtype or device than stated; on the CPU also for rows out of range
            or repeated.
    """
    check_merge(features, {"kept": kept}, scores=scores)
    dropped = ~members(kept, features.shape[1])
    count = dropped.sum(1)
    row = best_of(scores, dropped, count.clamp(max=1), length=1)
    # `where`, not a product: features that are kept may be infinite or NaN.
    total = torch.where(dropped[..., None], features.to(accumulation_dtype(features)), 0).sum(1)
    mean = (total / count.clamp(min=1)[:, None]).to(features.dtype)
    return assemble(kept, gather_rows(features, kept), row, mean[:, None])
