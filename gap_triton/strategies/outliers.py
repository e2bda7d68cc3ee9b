"""How many tokens stand out: PruMerge's adaptive count (arXiv 2403.15388)."""

from __future__ import annotations

import torch
from gap_kernels.validation import MAX_LENGTH, ShapeChecker, describe
from torch import Tensor


def outlier_count(scores: Tensor) -> Tensor:
    """Count the scores above ``Q3 + 1.5 (Q3 - Q1)``, with quartiles interpolated linearly.

    Paper and released code count this way. The code then keeps ``int(N * (count / N))`` tokens, which rounding may make
    one less, and takes the quartiles over all images of a batch at once; here it is the count, of each row by itself.
    PruMerge adds one token for what is dropped (`nearest`), so its ``keep`` is this plus 1.

    Args:
        scores: [G, N] float32, N >= 1. NaN is left out, of the quartiles too.

    Returns:
        [G] int64, at least 1.

    Raises:
        ValueError: If ``scores`` has another shape or dtype, or N is 0 or more than 2**24.
    """
    ShapeChecker().check("scores", scores, "G N", (torch.float32,))
    if not scores.shape[1]:
        raise ValueError(f"scores: expected N >= 1, got {describe(scores)}")
    if scores.shape[1] > MAX_LENGTH:  # of more, PyTorch finds no quantile
        raise ValueError(f"scores: expected N <= {MAX_LENGTH}, got {describe(scores)}")
    if not scores.shape[0]:  # quantiles of nothing are an error
        return scores.new_empty(0, dtype=torch.int64)
    # 0.25 and 0.75, made on the device: a list would have to be copied there.
    quartiles = torch.arange(1, 4, 2, dtype=torch.float32, device=scores.device) / 4
    first, third = scores.nanquantile(quartiles, dim=1)
    return (scores > (third + 1.5 * (third - first))[:, None]).sum(1).clamp(min=1)
