"""``gap_kernels::attention_received``: registration, fake kernel and checks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import use_triton
from ..flash_attention.op import MAX_HEAD_DIM
from ..library import fake, no_gradient, operator
from ..validation import FLOAT_DTYPES, ShapeChecker, check_heads, check_options, describe
from . import reference


@operator("attention_received")
def attention_received_op(
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool,
    scale: float | None,
    lse: Tensor | None,
) -> Tensor:
    """Run the operator; see `gap_kernels.attention_received` and ``reference.py``."""
    if cu_seqlens is not None and cu_seqlens.is_cpu:
        _check_bounds(cu_seqlens, query.shape[2])
    if query.dtype != torch.float64 and use_triton(query):
        from . import kernel

        return kernel.attention_received(query, key, attention_mask, cu_seqlens, causal, scale, lse)
    return reference.attention_received(query, key, attention_mask, cu_seqlens, causal, scale, lse)


@fake("attention_received")
def _(query: Tensor) -> Tensor:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty((query.shape[0], query.shape[2]), dtype=dtype)


no_gradient("attention_received")


def check_received(
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool,
    scale: float | None,
    lse: Tensor | None,
) -> None:
    """Check the arguments of `gap_kernels.attention_received`.

    Raises:
        ValueError: If one has another shape, dtype or device than documented.
    """
    shapes = ShapeChecker()
    shapes.check("query", query, "B H S D", FLOAT_DTYPES)
    shapes.check("key", key, "B Hkv S D", (query.dtype,))
    check_heads(query, key, MAX_HEAD_DIM)
    check_options(causal, scale)
    if attention_mask is not None:
        shapes.check("attention_mask", attention_mask, "B S", (torch.bool,))
    if cu_seqlens is not None:
        shapes.check("cu_seqlens", cu_seqlens, "N+1", (torch.int32,))
        if cu_seqlens.shape[0] == 0:
            raise ValueError(f"cu_seqlens: expected at least one entry, got {describe(cu_seqlens)}")
        if query.shape[0] != 1:
            raise ValueError(f"query: expected B = 1 beside cu_seqlens, got {describe(query)}")
    if lse is not None:
        shapes.check("lse", lse, "B H S", (torch.float32, torch.float64))


def _check_bounds(cu_seqlens: Tensor, num_tokens: int) -> None:
    """Check the values of a CPU ``cu_seqlens`` [N+1]."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != num_tokens or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens: expected ascending values from 0 to S = {num_tokens}, got {bounds}")
