"""``gap_kernels::visual_importance``: registration, fake kernel and checks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import use_triton
from ..library import fake, no_gradient, operator
from ..validation import FLOAT_DTYPES, ShapeChecker, check_heads, check_options, check_range, describe
from . import reference


@operator("visual_importance")
def visual_importance_op(
    query: Tensor,
    key: Tensor,
    visual_index: Tensor,
    rows: Tensor | None,
    attention_mask: Tensor | None,
    lse: Tensor | None,
    scale: float | None,
    causal: bool = True,
    value: Tensor | None = None,
    head_reduction: str = "mean",
) -> Tensor:
    """Run the operator; see `gap_kernels.visual_importance` and ``reference.py``."""
    check_positions(query, visual_index, rows)
    optional = (rows, attention_mask, lse, scale, causal, value, head_reduction)
    if query.dtype != torch.float64 and use_triton(query):
        from . import kernel

        return kernel.visual_importance(query, key, visual_index, *optional)
    return reference.visual_importance(query, key, visual_index, *optional)


@fake("visual_importance")
def _(query: Tensor, visual_index: Tensor) -> Tensor:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(visual_index.shape, dtype=dtype)


no_gradient("visual_importance")


def check_positions(query: Tensor, visual_index: Tensor, rows: Tensor | None) -> None:
    """Check on the CPU that ``query`` has the rows that are named; elsewhere it would need a read."""
    if query.is_cpu:
        check_range("visual_index", visual_index, -1, query.shape[2] - 1)
        if rows is not None:
            check_range("rows", rows, -1, query.shape[2] - 1)


def check_importance(
    shapes: ShapeChecker,
    query: Tensor,
    key: Tensor,
    visual_index: Tensor,
    rows: Tensor | None,
    attention_mask: Tensor | None,
    lse: Tensor | None,
    scale: float | None,
    causal: bool = True,
    value: Tensor | None = None,
    head_reduction: str = "mean",
) -> None:
    """Check the arguments of `gap_kernels.visual_importance` and record their sizes in ``shapes``.

    Raises:
        ValueError: If one has another shape, dtype or device than documented.
    """
    shapes.check("query", query, "B Hq Q D", FLOAT_DTYPES)
    shapes.check("key", key, "B Hkv S D", (query.dtype,))
    shapes.check("visual_index", visual_index, "B V", (torch.int64,))
    check_heads(query, key)
    num_rows, num_keys = query.shape[2], key.shape[2]
    if num_rows == 0:
        raise ValueError(f"query: expected at least one row, got {describe(query)}")
    if num_rows > num_keys:
        raise ValueError(f"key: expected at least the {num_rows} positions of query, got {describe(key)}")
    if rows is not None:
        shapes.check("rows", rows, "B R", (torch.int64,))
    if attention_mask is not None:
        shapes.check("attention_mask", attention_mask, "B S", (torch.bool,))
    if lse is not None:
        shapes.sizes.setdefault("R", 1)  # without `rows` there is one row, the last
        shapes.check("lse", lse, "B Hq R", (torch.float32, torch.float64))
    check_options(causal, scale)
    if value is not None:
        shapes.check("value", value, "B Hkv S Dv", (query.dtype,))
    if not isinstance(head_reduction, str) or head_reduction not in ("mean", "max"):
        raise ValueError(f"head_reduction: expected 'mean' or 'max', got {describe(head_reduction)}")
