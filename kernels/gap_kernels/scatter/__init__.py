"""Rows put where they belong among others."""

from __future__ import annotations

import torch
from torch import Tensor

from ..validation import FLOAT_DTYPES, ShapeChecker, check_length, describe, is_int
from .op import scatter_rows_op

__all__ = ["scatter_rows"]


def scatter_rows(
    values: Tensor, index: Tensor, num_rows: int, *, among: Tensor | None = None, base: Tensor | None = None
) -> Tensor:
    """Return vectors at the places of an index, and between them zeros or the rows of another tensor.

    So survivors of a prompt are put back to where they stood, and merged tokens among the embeddings of a prompt.

    Args:
        values: [B, L, C] float32, float16, bfloat16 or float64; any strides.
        index: [B, L] int64, the place of each of them, distinct; -1 = filler, anywhere: it goes nowhere.
        num_rows: Q, how many rows the result has.
        among: [B, S] int64, which rows of the result ``index`` counts, distinct where it names them; -1 = filler, where
            nothing is put. None: it counts all of them.
        base: [B, Q, C] in the dtype of ``values``, any strides: what the result has where nothing is put. None: zeros.

    Returns:
        [B, Q, C] in the dtype of ``values``, contiguous. Gradients flow back to ``values`` and ``base``.

    Raises:
        ValueError: If an argument has another shape, dtype or device than stated, or ``num_rows`` isn't an int >= 0; on
            the CPU also if a place isn't there (elsewhere it counts as filler), or is there twice (elsewhere the last one
            stays).
    """
    shapes = ShapeChecker()
    shapes.check("values", values, "B L C", FLOAT_DTYPES)
    shapes.check("index", index, "B L", (torch.int64,))
    if not is_int(num_rows) or num_rows < 0:
        raise ValueError(f"num_rows: expected an int >= 0, got {describe(num_rows)}")
    check_length(num_rows, 0, "num_rows")
    shapes.sizes["Q"] = num_rows
    if among is not None:
        shapes.check("among", among, "B S", (torch.int64,))
    if base is not None:
        shapes.check("base", base, "B Q C", (values.dtype,))
    return scatter_rows_op(values, index, num_rows, among, base)
