"""How many tokens stand out: the adaptive counts of PruMerge (arXiv 2403.15388) and TRIM (arXiv 2409.10994)."""

from __future__ import annotations

import numpy as np
import torch
from gap_kernels.validation import MAX_LENGTH, ShapeChecker, describe
from torch import Tensor

from ..constants import Constants
from ..host import to_device

SIMILARITY_SCALE = 100.0
"""What a cosine to the text is multiplied by before the softmax of `similarity_outlier_count`.

TRIM's code takes dot products of CLIP embeddings as they are, whose norms have a product of that order; it is also the
scale that CLIP itself was trained to.
"""

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


def similarity_outlier_count(similarities: Tensor) -> Tensor:
    """Count the outliers of the softmax of similarities to the text, as TRIM's released code does.

    The softmax has a long tail above, so that far more stand out than among the similarities themselves. TRIM negates
    CLIP's similarities, which are small where an image shows what the text says; ``similarities`` here are large there.

    Args:
        similarities: [G, N] float32, cosines, N >= 1. NaN is left out.

    Returns:
        [G] int64, at least 1.

    Raises:
        ValueError: As `outlier_count`.
    """
    ShapeChecker().check("similarities", similarities, "G N", (torch.float32,))
    missing = similarities.isnan()
    weights = (similarities.masked_fill(missing, -torch.inf) * SIMILARITY_SCALE).softmax(dim=1)
    return outlier_count(weights.masked_fill(missing, torch.nan))


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
