"""``gap_kernels::topk_indices``: registration, fake kernel and value checks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import use_triton
from ..library import fake, operator
from ..validation import check_range
from . import reference


@operator("topk_indices")
def topk_indices_op(scores: Tensor, k: int, counts: Tensor | None, length: int) -> Tensor:
    """Run the operator; see `gap_kernels.topk_indices` and ``reference.py``."""
    if counts is not None and counts.is_cpu:
        check_range("k", counts, 0, scores.shape[1])
        if counts.numel() and int(counts.max()) > length:
            raise ValueError(f"length: expected at least the largest k, {int(counts.max())}, got {length}")
    if use_triton(scores):
        from . import kernel

        return kernel.topk_indices(scores, k, counts, length)
    return reference.topk_indices(scores, k, counts, length)


@fake("topk_indices")
def _(scores: Tensor, length: int) -> Tensor:
    return scores.new_empty((scores.shape[0], length), dtype=torch.int64)
