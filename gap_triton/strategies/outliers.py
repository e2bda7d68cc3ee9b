"""How many tokens stand out: PruMerge's adaptive count (arXiv 2403.15388)."""

from __future__ import annotations

import numpy as np
import torch
from gap_kernels.validation import MAX_LENGTH, ShapeChecker, describe
from torch import Tensor

from ..constants import Constants
from ..host import to_device

_RANKS = Constants(64)


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
    if scores.shape[1] > MAX_LENGTH:  # more than any image has
        raise ValueError(f"scores: expected N <= {MAX_LENGTH}, got {describe(scores)}")
    if not scores.shape[0]:  # quantiles of nothing are an error
        return scores.new_empty(0, dtype=torch.int64)
    first, third = _quartiles(scores)
    return (scores > (third + 1.5 * (third - first))[:, None]).sum(1).clamp(min=1)


def _quartiles(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first and the third quartile [G] of ``scores`` [G, N], NaN left out; NaN where there is nothing else.

    As ``nanquantile`` does, in a third of its operations and without a copy of the quantiles to the device.
    """
    device, most = scores.device, scores.shape[1]
    ranks, parts = _RANKS.get(
        (most, device), device, lambda: tuple(to_device(torch.from_numpy(x), device) for x in _ranks(most))
    )
    real = (scores == scores).sum(1)
    near = scores.sort(dim=1).values.gather(1, ranks[real])  # NaN is sorted to the end
    first, third = torch.lerp(near[:, :2], near[:, 2:], parts[real]).unbind(1)
    return first, third


def _ranks(most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return by n in 0..``most`` where the quartiles of n ascending numbers lie.

    Returns:
        [most + 1, 4] int64, the ranks below the first and the third quartile and the ranks above them; and [most + 1, 2]
        float32, how far they lie between the two.
    """
    quarters = np.maximum(np.arange(most + 1) - 1, 0)[:, None] * np.array([1, 3])
    below, rest = quarters // 4, quarters % 4
    return np.concatenate([below, below + (rest > 0)], axis=1), (rest / 4).astype(np.float32)
