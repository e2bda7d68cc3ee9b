"""``gap_kernels::unrotate``: registration, fake kernel and value checks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import use_triton
from ..library import fake, no_gradient, operator
from ..validation import check_range
from . import reference


@operator("unrotate")
def unrotate_op(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, pairs: Tensor, rescale: bool
) -> tuple[Tensor, Tensor]:
    """Run the operator; see `gap_kernels.unrotate` and ``reference.py``."""
    if query.is_cpu:
        axes = cos.shape[0] if cos.dim() == 4 else 1
        check_range("pairs", pairs[0], 0, query.shape[3] - 1)
        check_range("pairs", pairs[1], -1, axes * cos.shape[-1] - 1)
    if not cos.numel() or (not query.numel() and not key.numel()):
        return query.clone(memory_format=torch.contiguous_format), key.clone(
            memory_format=torch.contiguous_format
        )
    if query.dtype != torch.float64 and use_triton(query):
        from . import kernel

        return kernel.unrotate(query, key, cos, sin, pairs, rescale)
    return reference.unrotate(query, key, cos, sin, pairs, rescale)


@fake("unrotate")
def _(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


no_gradient("unrotate")
