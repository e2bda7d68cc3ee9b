"""``gap_kernels::distinct_indices`` and ``gap_kernels::least_similar_indices``: registration, fake kernels and checks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import use_triton
from ..library import fake, operator
from ..validation import check_counts, check_distinct, check_range
from . import reference


@operator("distinct_indices")
def distinct_indices_op(
    features: Tensor, scores: Tensor, k: int, important: int, removed_at_once: int
) -> Tensor:
    """Run the operator; see `gap_kernels.distinct_indices` and ``reference.py``."""
    given = (features, scores, k, important, removed_at_once)
    if features.dtype != torch.float64 and use_triton(features):
        from . import kernel

        return kernel.distinct_indices(*given)
    return reference.distinct_indices(*given)


@fake("distinct_indices")
def _(features: Tensor, k: int) -> Tensor:
    return features.new_empty((features.shape[0], k), dtype=torch.int64)


@operator("least_similar_indices")
def least_similar_indices_op(
    features: Tensor, pivots: Tensor, mask: Tensor | None, k: int, counts: Tensor | None, length: int
) -> Tensor:
    """Run the operator; see `gap_kernels.least_similar_indices` and ``reference.py``."""
    if features.is_cpu:
        check_range("pivots", pivots, -1, features.shape[1] - 1)
        check_distinct("pivots", pivots, features.shape[1])
    if counts is not None and counts.is_cpu and counts.numel():
        check_counts(counts, features.shape[1], length)
    if not pivots.numel() or not features.shape[1] or not length:
        return torch.full((features.shape[0], length), -1, dtype=torch.int64, device=features.device)
    given = (features, pivots, mask, k, counts, length)
    if features.dtype != torch.float64 and use_triton(features):
        from . import kernel

        return kernel.least_similar_indices(*given)
    return reference.least_similar_indices(*given)


@fake("least_similar_indices")
def _(features: Tensor, length: int) -> Tensor:
    return features.new_empty((features.shape[0], length), dtype=torch.int64)
