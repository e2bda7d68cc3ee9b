"""``gap_kernels::attention``: registration, fake kernel and checks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import use_triton
from ..library import fake, no_gradient, operator
from ..validation import FLOAT_DTYPES, ShapeChecker, check_heads, check_options, check_range, describe
from . import reference

MAX_HEAD_DIM = 256
"""Kernels hold whole vectors in registers; longer ones would be spilled."""


@operator("attention")
def attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    attention_mask: Tensor | None,
    scale: float | None,
    importance_rows: Tensor | None,
    importance_columns: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the operator; see `gap_kernels.attention` and ``reference.py``."""
    if query.is_cpu:
        if importance_rows is not None:
            check_range("importance_rows", importance_rows, -1, query.shape[2] - 1)
        if importance_columns is not None:
            check_range("importance_columns", importance_columns, -1, query.shape[2] - 1)
    arguments = (query, key, value, causal, attention_mask, scale, importance_rows, importance_columns)
    if query.dtype != torch.float64 and use_triton(query):
        from . import kernel

        return kernel.attention(*arguments)
    return reference.attention(*arguments)


@fake("attention")
def _(query: Tensor, importance_columns: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    wanted = (query.shape[0], 0) if importance_columns is None else importance_columns.shape
    return (
        query.new_empty(query.shape),
        query.new_empty(query.shape[:3], dtype=dtype),
        query.new_empty(wanted, dtype=dtype),
    )


no_gradient("attention")


def check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    attention_mask: Tensor | None,
    scale: float | None,
    importance_rows: Tensor | None,
    importance_columns: Tensor | None,
) -> None:
    """Check the arguments of `gap_kernels.attention`.

    Raises:
        ValueError: If one has another shape, dtype or device than documented, or they don't go together.
    """
    shapes = ShapeChecker()
    shapes.check("query", query, "B Hq Q D", FLOAT_DTYPES)
    shapes.check("key", key, "B Hkv S D", (query.dtype,))
    shapes.check("value", value, "B Hkv S D", (query.dtype,))
    check_heads(query, key, MAX_HEAD_DIM)
    if query.shape[2] == 0:
        raise ValueError(f"query: expected at least one row, got {describe(query)}")
    if query.shape[2] > key.shape[2]:
        raise ValueError(
            f"key: expected at least the {query.shape[2]} positions of query, got {describe(key)}"
        )
    check_options(causal, scale)
    if attention_mask is not None:
        shapes.check("attention_mask", attention_mask, "B S", (torch.bool,))
    if importance_columns is None:
        if importance_rows is not None:
            raise ValueError("importance_rows: expected importance_columns beside it, got None")
        return
    shapes.check("importance_columns", importance_columns, "B V", (torch.int64,))
    if importance_rows is not None:
        shapes.check("importance_rows", importance_rows, "B R", (torch.int64,))
