"""Exact, ordered top-k."""

from __future__ import annotations

import torch
from torch import Tensor

from ..validation import ShapeChecker, describe_number, split_count, width_of
from .op import topk_indices_op

__all__ = ["topk_indices"]


def topk_indices(scores: Tensor, k: int | Tensor, *, length: int | None = None) -> Tensor:
    """Return the indices of the ``k`` largest scores of each sample, in ascending index order.

    The result is exact and the same on every device and at every run: equal scores (-0.0 equals 0.0) go to
    the lower index, and NaN ranks below everything, -inf included.

    Args:
        scores: [B, N] float32; B and N may be 0.
        k: How many to select, 0..N: an int, or an int64 tensor [B] with a count per sample.
        length: Columns of the result; default ``k``, or the largest ``k`` of the batch, which takes one read
            from the device. Give it under ``torch.compile`` or CUDA graphs if ``k`` is a tensor. More than
            needed means more filler.

    Returns:
        [B, length] int64. A row with fewer than ``length`` indices is filled with -1 on the left.

    Raises:
        ValueError: If an argument has another shape, dtype or device, or ``k`` or ``length`` is out of range.
            The values of a ``k`` tensor are checked on the CPU only; elsewhere counts beyond ``min(N,
            length)`` select the best ``min(N, length)``.
    """
    shapes = ShapeChecker()
    shapes.check("scores", scores, "B N", (torch.float32,))
    count, counts = split_count("k", k, shapes)
    if counts is None and count > scores.shape[1]:
        raise ValueError(f"k: expected 0..{scores.shape[1]} (N of scores), got {describe_number(count)}")
    length = width_of("k", count, counts, length)
    return topk_indices_op(scores, count, counts, length)
