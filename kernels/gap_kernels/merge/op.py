"""``gap_kernels::collect_nearest`` and ``gap_kernels::merge_nearest``: registration, fake kernels and value checks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import use_triton
from ..library import fake, no_gradient, operator
from ..validation import check_distinct, check_range
from . import reference


@operator("collect_nearest")
def collect_nearest_op(features: Tensor, keys: Tensor, weights: Tensor, kept: Tensor, count: int) -> Tensor:
    """Run the operator; see `gap_kernels.collect_nearest` and ``reference.py``."""
    if features.is_cpu:
        _check_rows("kept", kept, features.shape[1])
    if not features.shape[1] or not features.numel():
        return features.new_zeros((features.shape[0], kept.shape[1] + 1, features.shape[2]))
    if torch.float64 not in (features.dtype, keys.dtype) and use_triton(features):
        from . import kernel

        return kernel.collect_nearest(features, keys, weights, kept, count)
    return reference.collect_nearest(features, keys, weights, kept, count)


@fake("collect_nearest")
def _(features: Tensor, kept: Tensor) -> Tensor:
    return features.new_empty((features.shape[0], kept.shape[1] + 1, features.shape[2]))


no_gradient("collect_nearest")


@operator("merge_nearest")
def merge_nearest_op(
    features: Tensor, keys: Tensor, targets: Tensor, excluded: Tensor | None, average: bool
) -> Tensor:
    """Run the operator; see `gap_kernels.merge_nearest` and ``reference.py``."""
    if features.is_cpu:
        _check_rows("targets", targets, features.shape[1])
        if excluded is not None:
            _check_rows("excluded", excluded, features.shape[1])
    if not targets.numel() or not features.numel():
        return features.new_zeros((*targets.shape, features.shape[2]))
    if torch.float64 not in (features.dtype, keys.dtype) and use_triton(features):
        from . import kernel

        return kernel.merge_nearest(features, keys, targets, excluded, average)
    return reference.merge_nearest(features, keys, targets, excluded, average)


@fake("merge_nearest")
def _(features: Tensor, targets: Tensor) -> Tensor:
    return features.new_empty((*targets.shape, features.shape[2]))


no_gradient("merge_nearest")


def _check_rows(name: str, index: Tensor, num_rows: int) -> None:
    """Check what can only be checked by reading, on the CPU."""
    check_range(name, index, -1, num_rows - 1)
    check_distinct(name, index, num_rows)
