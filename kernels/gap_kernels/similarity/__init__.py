"""Selection of tokens by how similar they are to a few of them, or to each other."""

from __future__ import annotations

import torch
from torch import Tensor

from ..validation import FLOAT_DTYPES, ShapeChecker, describe, is_int, split_count, width_of
from .op import distinct_indices_op, least_similar_indices_op

__all__ = ["distinct_indices", "least_similar_indices"]


def distinct_indices(
    features: Tensor, scores: Tensor, k: int, important: int, *, removed_at_once: int = 8
) -> Tensor:
    """Return the indices of the ``important`` best-scored tokens, and of others among which duplicates are removed.

    This is VisPruner's choice (arXiv 2412.01818, section 3). In order of their scores, the others are dealt into two
    halves: the first, the third and so on, and those between. Of the first half, those with the largest cosine to any token
    of the second are removed, up to ``removed_at_once``. What is left of it, most alike first, and behind it the second half
    are dealt again, until k - ``important`` are left.

    Args:
        features: [B, N, C] float32, float16, bfloat16 or float64, normalised here; any strides. A vector of zeros has
            cosine 0 to everything. A token with NaN or infinity has a cosine to nothing: it is removed as the first of its
            half, and no other one is for its sake. N and C may be 0.
        scores: [B, N] float32. Equal ones go to the lower index, and NaN comes last.
        k: How many to choose, 0..N.
        important: How many of these by score, 0..k.
        removed_at_once: How many are removed before the next are compared, >= 1; VisPruner's code has 8.

    Returns:
        [B, k] int64, ascending. Cosines are computed in float32 (float64 for float64). Of those that are equally alike, the
        earlier ones in their half are removed first: which they are may depend on rounding, and so on the device.

    Raises:
        ValueError: If an argument has another shape, dtype or device than stated, or is out of range.
    """
    shapes = ShapeChecker()
    shapes.check("features", features, "B N C", FLOAT_DTYPES)
    shapes.check("scores", scores, "B N", (torch.float32,))
    num_tokens = features.shape[1]
    if not is_int(k) or not 0 <= k <= num_tokens:
        raise ValueError(f"k: expected an int in 0..{num_tokens} (N of features), got {describe(k)}")
    if not is_int(important) or not 0 <= important <= k:
        raise ValueError(f"important: expected an int in 0..{k} (k), got {describe(important)}")
    if not is_int(removed_at_once) or removed_at_once < 1:
        raise ValueError(f"removed_at_once: expected an int >= 1, got {describe(removed_at_once)}")
    return distinct_indices_op(features, scores, k, important, min(removed_at_once, max(num_tokens, 1)))


def least_similar_indices(
    features: Tensor,
    pivots: Tensor,
    k: int | Tensor,
    *,
    mask: Tensor | None = None,
    length: int | None = None,
) -> Tensor:
    """Return the indices of pivots, and for each pivot in turn of the tokens that are least like it.

    This is DART's choice (arXiv 2502.11494, section 3). What ``k`` leaves beside P pivots, r tokens, they share as equally
    as can be: the first n of them have ``n r // P`` together. What one has taken is none of the next one's.

    Args:
        features: [B, N, C] float32, float16, bfloat16 or float64, normalised here; any strides. A vector of zeros has
            cosine 0 to everything. A token with NaN or infinity comes last. N and C may be 0.
        pivots: [B, P] int64, distinct, in any order; -1 = filler, anywhere.
        k: How many to choose, the pivots among them, >= 0: an int, or an int64 tensor [B] with a count per sample. More
            than there are means all. Of more pivots than that, the first are chosen.
        mask: [B, N] bool, True = a real token; others are never chosen, not even as pivots. None: all are.
        length: Columns of the result; default ``min(k, N)``, or that of the largest ``k`` of the batch, which takes one read
            from the device. Give it under ``torch.compile`` or CUDA graphs if ``k`` is a tensor. More than needed
            means more filler.

    Returns:
        [B, length] int64, ascending. A row with fewer than ``length`` indices is filled with -1 on the left; without a pivot
        it has none. Cosines are computed in float32 (float64 for float64), and equal ones go to the lower index.

    Raises:
        ValueError: If an argument has another shape, dtype or device than stated, or is out of range. Values of ``pivots``
            and of a ``k`` tensor are checked on the CPU only; elsewhere counts beyond ``min(N, length)`` choose that many.
    """
    shapes = ShapeChecker()
    shapes.check("features", features, "B N C", FLOAT_DTYPES)
    shapes.check("pivots", pivots, "B P", (torch.int64,))
    if mask is not None:
        shapes.check("mask", mask, "B N", (torch.bool,))
    count, counts = split_count("k", k, shapes)
    num_tokens = features.shape[1]
    count = min(count, num_tokens)
    largest = width_of("k", count, counts, length)
    length = min(largest, num_tokens) if length is None else length
    return least_similar_indices_op(features, pivots, mask, count, counts, length)
