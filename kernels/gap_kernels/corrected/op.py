"""``gap_kernels::corrected_importance``: registration, fake kernel and checks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import use_triton
from ..importance.op import check_importance, check_positions
from ..library import fake, no_gradient, operator
from ..validation import FLOAT_DTYPES, ShapeChecker, check_range, describe, is_int
from . import reference


@operator("corrected_importance")
def corrected_importance_op(
    query: Tensor,
    key: Tensor,
    visual_index: Tensor,
    cos: Tensor,
    sin: Tensor,
    turns: Tensor,
    heads: int,
    rows: Tensor | None,
    attention_mask: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Run the operator; see `gap_kernels.corrected_importance` and ``reference.py``."""
    check_positions(query, visual_index, rows)
    if turns.is_cpu:
        check_range("turns", turns, -cos.shape[2], cos.shape[2])
    optional = (rows, attention_mask, scale)
    if torch.float64 not in (query.dtype, cos.dtype) and use_triton(query):
        from . import kernel

        return kernel.corrected_importance(query, key, visual_index, cos, sin, turns, heads, *optional)
    return reference.corrected_importance(query, key, visual_index, cos, sin, turns, heads, *optional)


@fake("corrected_importance")
def _(query: Tensor, visual_index: Tensor) -> Tensor:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(visual_index.shape, dtype=dtype)


no_gradient("corrected_importance")


def check_corrected(
    shapes: ShapeChecker,
    query: Tensor,
    key: Tensor,
    visual_index: Tensor,
    cos: Tensor,
    sin: Tensor,
    turns: Tensor,
    heads: object,
    rows: Tensor | None,
    attention_mask: Tensor | None,
    scale: float | None,
) -> None:
    """Check the arguments of `gap_kernels.corrected_importance` and record their sizes in ``shapes``.

    Raises:
        ValueError: If one has another shape, dtype or device than documented, or ``heads`` is out of range.
    """
    check_importance(shapes, query, key, visual_index, rows, attention_mask, None, scale)
    shapes.check("cos", cos, "B Q E", FLOAT_DTYPES)
    shapes.check("sin", sin, "B Q E", (cos.dtype,))
    shapes.check("turns", turns, "D", (torch.int64,))
    query_heads = query.shape[1]
    if not is_int(heads) or not 1 <= heads <= query_heads:
        raise ValueError(f"heads: expected an int in 1..{query_heads}, got {describe(heads)}")
