"""Merging tokens into those that are kept, by the cosines of their keys."""

from __future__ import annotations

import torch
from torch import Tensor

from ..validation import FLOAT_DTYPES, ShapeChecker, describe, is_int
from .op import collect_nearest_op, merge_nearest_op

__all__ = ["collect_nearest", "merge_nearest"]


def collect_nearest(features: Tensor, keys: Tensor, weights: Tensor, kept: Tensor, count: int) -> Tensor:
    """Add to each kept token the tokens with the most similar keys, and return what is dropped as one more row.

    This is PruMerge's merge (arXiv 2403.15388, as released). With ``a`` the weights, a kept token ``i`` becomes
    ``x_i + sum of a_j x_j`` over the ``count`` other tokens, kept ones too, whose keys have the largest cosine to its own;
    the last row is ``sum of a_j x_j`` over all tokens that aren't kept.

    Args:
        features: [B, N, C] float32, float16, bfloat16 or float64; any strides.
        keys: [B, N, E], any of those dtypes: what tokens are compared by, normalised here; any strides. A vector of zeros
            has cosine 0 to everything.
        weights: [B, N] float32. Those that aren't finite count as 0.
        kept: [B, K] int64, distinct, in any order; -1 = filler, anywhere.
        count: How many each takes in, >= 0; all, if there are fewer.

    Returns:
        [B, K + 1, C] in the dtype of ``features``, computed in float32 (float64 where it is that). Equal cosines go to
        the lower row; a token whose key holds NaN takes nothing in and is not taken in. Filler rows are 0. NaN or infinity
        in ``features`` spoils its channel in every row that takes it in, and may spoil it in all rows of its sample.

    Raises:
        ValueError: If an argument has another shape, dtype or device than stated, or is out of range; on the CPU also if
            a kept token isn't there, or is there twice.
    """
    shapes = ShapeChecker()
    _check_tokens(shapes, features, keys)
    shapes.check("weights", weights, "B N", (torch.float32,))
    shapes.check("kept", kept, "B K", (torch.int64,))
    if not is_int(count) or count < 0:
        raise ValueError(f"count: expected an int >= 0, got {describe(count)}")
    return collect_nearest_op(features, keys, weights, kept, min(count, features.shape[1]))


def merge_nearest(
    features: Tensor, keys: Tensor, targets: Tensor, *, excluded: Tensor | None = None, average: bool = False
) -> Tensor:
    """Merge every other token into the target with the most similar key.

    A target becomes its features plus the mean of the features of those that go to it, as VisionZip's contextual tokens
    (arXiv 2412.04467, as released); or, with ``average``, the mean of itself and those, as VScan's (arXiv 2505.22654).

    Args:
        features: [B, N, C] float32, float16, bfloat16 or float64; any strides.
        keys: [B, N, E], any of those dtypes: what tokens are compared by, normalised here; any strides. A vector of zeros
            has cosine 0 to everything.
        targets: [B, M] int64, distinct, in any order; -1 = filler, anywhere.
        excluded: [B, K] int64, tokens that go nowhere, distinct; -1 = filler, anywhere. None: no token.
        average: Whether a target is one of those that are averaged.

    Returns:
        [B, M, C] in the dtype of ``features``, computed in float32 (float64 where it is that). Equal cosines go to the
        first of the targets. NaN cosines are the smallest, so a token whose key holds NaN goes to the first target. A target
        that nothing goes to keeps its features; filler is 0. NaN or infinity in ``features`` spoils its channel in all rows
        of its sample, as in any matrix product.

    Raises:
        ValueError: If an argument has another shape, dtype or device than stated; on the CPU also if a row isn't there,
            or is there twice.
    """
    shapes = ShapeChecker()
    _check_tokens(shapes, features, keys)
    shapes.check("targets", targets, "B M", (torch.int64,))
    if excluded is not None:
        shapes.check("excluded", excluded, "B K", (torch.int64,))
    if not isinstance(average, bool):
        raise ValueError(f"average: expected a bool, got {describe(average)}")
    return merge_nearest_op(features, keys, targets, excluded, average)


def _check_tokens(shapes: ShapeChecker, features: Tensor, keys: Tensor) -> None:
    shapes.check("features", features, "B N C", FLOAT_DTYPES)
    shapes.check("keys", keys, "B N E", FLOAT_DTYPES)
